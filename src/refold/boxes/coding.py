"""Boxes as the numbers that a network predicts, and back."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# A box grows by at most this factor, so that a wild prediction stays finite (Detectron's bound, 1000 / 16).
_LARGEST_GROWTH = math.log(1000.0 / 16)


def boxes_from_distances(distances: Tensor, points: Tensor) -> Tensor:
    """Boxes x1, y1, x2, y2 from the distances (left, top, right, bottom) to points ``(x, y)``, all in pixels.

    Shapes ``(..., 4)`` and ``(..., 2)`` give ``(..., 4)``.

    Source: FCOS, section 3.1.
    """
    return torch.cat([points - distances[..., :2], points + distances[..., 2:]], -1)


def distances_from_boxes(boxes: Tensor, points: Tensor) -> Tensor:
    """The inverse of `boxes_from_distances`; a distance is negative where the point lies outside of the box."""
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], -1)


def boxes_from_deltas(deltas: Tensor, anchors: Tensor) -> Tensor:
    """Boxes x1, y1, x2, y2 from shifts in parts of the anchor's sides and logarithms of growth.

    ``deltas`` ``(..., 4)`` are (dx, dy, dw, dh), ``anchors`` ``(..., 4)`` are x1, y1, x2, y2 in pixels, as the result.

    Source: Fast R-CNN, section 2.3.
    """
    centres, sides = _centres_and_sides(anchors)
    centres = centres + deltas[..., :2] * sides
    halves = sides * deltas[..., 2:].clamp(max=_LARGEST_GROWTH).exp() / 2
    return torch.cat([centres - halves, centres + halves], -1)


def deltas_from_boxes(boxes: Tensor, anchors: Tensor) -> Tensor:
    """The inverse of `boxes_from_deltas`, for boxes with an area.

    Examples:
        >>> import torch
        >>> from refold.boxes import boxes_from_deltas, deltas_from_boxes
        >>> boxes, anchors = torch.tensor([[2., 3., 10., 9.]]), torch.tensor([[0., 0., 8., 8.]])
        >>> boxes_from_deltas(deltas_from_boxes(boxes, anchors), anchors).round(decimals=3)
        tensor([[ 2.,  3., 10.,  9.]])
    """
    centres, sides = _centres_and_sides(boxes)
    anchor_centres, anchor_sides = _centres_and_sides(anchors)
    return torch.cat([(centres - anchor_centres) / anchor_sides, (sides / anchor_sides).log()], -1)


def _centres_and_sides(boxes: Tensor) -> tuple[Tensor, Tensor]:
    return (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
