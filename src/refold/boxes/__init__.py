"""Boxes in images: grids and anchors, coding, matching, losses, letterboxing, and suppression as a module."""

from refold.boxes.coding import (
    boxes_from_deltas,
    boxes_from_distances,
    deltas_from_boxes,
    distances_from_boxes,
)
from refold.boxes.detections import Detections, detections
from refold.boxes.grids import anchor_boxes, cell_centres
from refold.boxes.letterbox import Letterbox
from refold.boxes.suppression import Suppression

__all__ = [
    "Detections",
    "Letterbox",
    "Suppression",
    "anchor_boxes",
    "boxes_from_deltas",
    "boxes_from_distances",
    "cell_centres",
    "deltas_from_boxes",
    "detections",
    "distances_from_boxes",
]
