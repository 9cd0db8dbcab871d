"""Masks of boxes, put into the picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image


def pasted(masks: Tensor, boxes: Tensor, size: Sequence[int]) -> Tensor:
    """Masks ``(n, side, side)`` from 0 to 1 of boxes ``(n, 4)`` as truth values ``(n, height, width)`` of a picture.

    A pixel belongs to an object where its mask, resized to the box, is above a half. ``size`` is (height, width).

    Source: Mask R-CNN, section 3.1, "Inference".
    """
    height, width = size
    if not len(masks):
        return torch.zeros(0, height, width, dtype=torch.bool, device=masks.device)
    whole: Tensor = paste_masks_in_image(masks[:, None].float(), boxes.float(), (height, width))
    return whole[:, 0] > 0.5


def run_lengths(mask: Tensor) -> dict[str, list[int]]:
    """Truth values ``(height, width)`` as COCO's run lengths: of zeros and ones in turn, down the columns.

    Examples:
        >>> import torch
        >>> from refold.boxes.pasting import run_lengths
        >>> run_lengths(torch.tensor([[False, True], [False, True]]))
        {'size': [2, 2], 'counts': [2, 2]}
    """
    values = mask.cpu().numpy().ravel(order="F")
    edges = np.flatnonzero(np.diff(values, prepend=False)).tolist()
    counts = np.diff([0, *edges, len(values)]).tolist()
    return {"size": list(mask.shape), "counts": counts}
