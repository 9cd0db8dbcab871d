"""Of boxes of one object the best alone, as a module that exports with free sizes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.ops import nms

from refold.errors import InputError

_GROUPS_A_ROW = 64


class Suppression(nn.Module):
    """Remove boxes that overlap a better one of the same group by more than ``iou``.

    Boxes ``(n, 4)`` as x1, y1, x2, y2 in pixels, scores ``(n,)`` and whole numbers ``groups`` ``(n,)`` give the places
    of those that stay, the best first. Groups are moved apart, so that one pass of `torchvision.ops.nms` does for all.
    Raises `InputError` where ``iou`` is none between 0 and 1.
    """

    def __init__(self, iou: float = 0.6) -> None:
        super().__init__()
        if not 0 <= iou <= 1:
            raise InputError(
                f"iou is {iou}; give the largest overlap of two boxes that both stay, from 0 to 1."
            )
        self.iou = iou

    def forward(self, boxes: Tensor, scores: Tensor, groups: Tensor) -> Tensor:
        # Zero is among the values of the maximum, so that there is one without boxes.
        apart = torch.cat([boxes.flatten().abs(), boxes.new_zeros(1)]).max() * 2 + 1
        # Along both axes: in one row of a thousand groups float32 has no fractions of a pixel left.
        shift = torch.stack([groups % _GROUPS_A_ROW, groups // _GROUPS_A_ROW], -1).to(boxes.dtype) * apart
        kept: Tensor = nms(boxes + torch.cat([shift, shift], -1), scores, self.iou)
        return kept

    def extra_repr(self) -> str:
        return f"iou={self.iou}"


def first_of_each(groups: Tensor, number: int, count: int) -> Tensor:
    """The places of the first ``count`` rows of each group; ``groups`` ``(n,)`` are whole numbers below ``number``.

    Examples:
        >>> import torch
        >>> from refold.boxes.suppression import first_of_each
        >>> first_of_each(torch.tensor([1, 0, 1, 1]), 2, 2)
        tensor([0, 1, 2])
    """
    return (rank_in_group(groups, number) < count).nonzero()[:, 0]


def rank_in_group(groups: Tensor, number: int) -> Tensor:
    """How many rows of its own group come before each; ``groups`` ``(n,)`` are whole numbers below ``number``."""
    own = groups[:, None] == torch.arange(number, device=groups.device)
    return own.long().cumsum(0).gather(1, groups[:, None])[:, 0] - 1
