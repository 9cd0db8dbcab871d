"""Whether two sets of boxes are the same, whatever their order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torchvision.ops import box_iou


@dataclass(frozen=True)
class Difference:
    """How two sets of boxes differ.

    ``boxes`` are those of both together, ``unmatched`` of them have no partner, ``scores`` is the largest difference of
    two partners' scores, and ``masks`` that of two partners' masks in any point.
    """

    boxes: int
    unmatched: int
    scores: float
    masks: float = 0.0

    @property
    def worst(self) -> float:
        """The largest difference, infinite where a box has no partner."""
        return math.inf if self.unmatched else max(self.scores, self.masks)


def difference(
    expected: Sequence[Tensor], found: Sequence[Tensor], *, overlap: float = 0.99, score: float = 1e-4
) -> Difference:
    """Pair boxes of the same image and label that overlap by more than that and have scores closer than ``score``.

    Both are boxes ``(n, 4)``, scores, labels and image indices ``(n,)``, with masks ``(n, side, side)`` before the last
    if there are some, as `refold.detections` gives them. A box whose
    score is as close to the lowest of all may be in one of them alone: it is there by rounding, and does not count.
    """
    boxes, scores, labels, *masks, image = (part.detach().cpu() for part in expected)
    other_boxes, other_scores, other_labels, *other_masks, other_image = (
        part.detach().cpu() for part in found
    )
    total = len(boxes) + len(other_boxes)
    if not total:
        return Difference(0, 0, 0.0)
    apart = (scores[:, None] - other_scores[None]).abs()
    same = (labels[:, None] == other_labels) & (image[:, None] == other_image) & (apart < score)
    same &= box_iou(boxes.double(), other_boxes.double()) > overlap
    lowest = min(float(part.min()) for part in (scores, other_scores) if len(part)) + score
    alone = int((~same.any(1) & (scores > lowest)).sum() + (~same.any(0) & (other_scores > lowest)).sum())
    if not same.any():
        return Difference(total, alone, 0.0)
    of_masks = 0.0
    for own, others in zip(masks, other_masks, strict=True):
        # The likest of the partners is the one: several boxes may lie in one place.
        pairs = same.any(1).nonzero()[:, 0].tolist()
        of_masks = max(float((others[same[row]] - own[row]).abs().amax((1, 2)).min()) for row in pairs)
    return Difference(total, alone, float(apart[same].max()), of_masks)
