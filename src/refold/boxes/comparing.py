"""Whether two sets of boxes are the same, whatever their order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torchvision.ops import box_iou


@dataclass(frozen=True)
class Difference:
    """How two sets of boxes differ.

    ``boxes`` are those of both together, ``unmatched`` of them have no partner, and ``scores`` is the largest
    difference of two partners' scores.
    """

    boxes: int
    unmatched: int
    scores: float


def difference(
    expected: Sequence[Tensor], found: Sequence[Tensor], *, overlap: float = 0.99, score: float = 1e-4
) -> Difference:
    """Pair boxes of the same image and label that overlap by more than that and have scores closer than ``score``.

    Both are boxes ``(n, 4)``, scores, labels and image indices ``(n,)``, as `refold.detections` gives them. A box whose
    score is as close to the lowest of all may be in one of them alone: it is there by rounding, and does not count.
    """
    boxes, scores, labels, image = (part.detach().cpu() for part in expected)
    other_boxes, other_scores, other_labels, other_image = (part.detach().cpu() for part in found)
    total = len(boxes) + len(other_boxes)
    if not total:
        return Difference(0, 0, 0.0)
    apart = (scores[:, None] - other_scores[None]).abs()
    same = (labels[:, None] == other_labels) & (image[:, None] == other_image) & (apart < score)
    same &= box_iou(boxes.double(), other_boxes.double()) > overlap
    lowest = min(float(part.min()) for part in (scores, other_scores) if len(part)) + score
    alone = int((~same.any(1) & (scores > lowest)).sum() + (~same.any(0) & (other_scores > lowest)).sum())
    return Difference(total, alone, float(apart[same].max()) if same.any() else 0.0)
