"""Which predictions learn which boxes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_iou

BACKGROUND, IGNORED = -1, -2

Truth = tuple[Tensor, Tensor]
"""The boxes ``(n, 4)`` of an image, x1, y1, x2, y2 in pixels, and their labels ``(n,)``."""


def match_by_overlap(
    anchors: Tensor, boxes: Tensor, *, foreground: float, background: float, every_box: bool = True
) -> Tensor:
    """For each anchor ``(a, 4)`` the number of its box ``(b, 4)``, `BACKGROUND` or `IGNORED`: ``(a,)``.

    An anchor takes the box that it overlaps most, if by ``foreground`` or more; it is background below
    ``background`` and ignored between the two. With ``every_box`` the anchors that overlap a box more than all others
    do take it, however little that is.

    Source: RetinaNet, section 4, "Anchors"; Faster R-CNN, section 3.1.2.
    """
    if not len(boxes):
        return torch.full((len(anchors),), BACKGROUND, device=anchors.device)
    overlaps = box_iou(anchors, boxes)
    best, number = overlaps.max(1)
    taken: Tensor = number.clone()
    taken[best < foreground] = IGNORED
    taken[best < background] = BACKGROUND
    if every_box:
        most = overlaps.amax(0)
        is_best = ((overlaps == most) & (most > 0)).any(1)
        taken[is_best] = number[is_best]
    return taken


@dataclass(frozen=True)
class Alignment:
    """What predictions of one image learn: ``places`` ``(p,)`` of those that have a box, ``boxes`` ``(p,)`` its number,
    and ``qualities`` ``(p,)`` from 0 to 1 that their score of its class should reach."""

    places: Tensor
    boxes: Tensor
    qualities: Tensor


@torch.no_grad()
def align(
    scores: Tensor,
    predicted: Tensor,
    centres: Tensor,
    strides: Tensor,
    boxes: Tensor,
    labels: Tensor,
    *,
    count: int,
    reach: float = 1.5,
    score_power: float = 0.5,
    overlap_power: float = 4.0,
) -> Alignment:
    """Give each box of an image the ``count`` predictions that agree with it most in class and place.

    ``scores`` ``(a, classes)`` are from 0 to 1, ``predicted`` ``(a, 4)`` and ``boxes`` ``(b, 4)`` x1, y1, x2, y2,
    ``centres`` ``(a, 2)`` and ``strides`` ``(a,)`` in pixels. Agreement is score^score_power * overlap^overlap_power;
    predictions whose centre lies in the box, or within ``reach`` strides of its middle, can be given it. One that two
    boxes want takes that which it overlaps more; with ``count`` 1 no box has two. Of predictions that do not overlap
    their box at all the nearest are taken, so that a box is learnt from the first step on.

    Source: TOOD, sections 3.3 and 3.4.
    """
    if not len(boxes):
        none = boxes.new_zeros(0)
        return Alignment(none.long(), none.long(), none)
    distances = (centres[:, None] - (boxes[:, :2] + boxes[:, 2:])[None] / 2).abs() / strides[:, None, None]
    inside = ((centres[:, None] > boxes[None, :, :2]) & (centres[:, None] < boxes[None, :, 2:])).all(-1)
    possible = inside | (distances.amax(-1) < reach)
    overlaps = box_iou(predicted, boxes) * possible
    agreement = scores[:, labels].clamp(min=1e-4) ** score_power * overlaps**overlap_power
    # Less than any overlap that counts, more the nearer.
    ranking = (agreement + 1e-9 * (-distances.norm(dim=-1)).exp()) * possible
    taken = _best(ranking, min(count, len(ranking)))
    # Where two boxes want one prediction, the tiny part decides as long as there is no overlap.
    overlap, number = (overlaps * taken + 1e-6 * ranking.clamp(max=1) * taken).max(1)
    places = ((overlap > 0) & taken.any(1)).nonzero()[:, 0]
    number = number[places]
    kept = agreement * taken
    # The best prediction of a box should reach the overlap that it has; in the beginning a little at least.
    highest = (overlaps * taken).amax(0).clamp(min=0.1)
    qualities = kept[places, number] / (kept.amax(0)[number] + 1e-12) * highest[number]
    return Alignment(places, number, qualities)


def _best(ranking: Tensor, count: int) -> Tensor:
    """Of each column the ``count`` largest values that are above zero."""
    places = ranking.topk(count, 0).indices
    chosen = torch.zeros_like(ranking, dtype=torch.bool).scatter_(0, places, value=True)
    return chosen & (ranking > 0)
