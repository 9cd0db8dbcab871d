"""From a detector's maps to boxes: `refold.detections`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from refold.boxes.suppression import Suppression
from refold.errors import InputError

OUTPUTS = ("boxes", "scores", "labels", "image_index")
"""What `Detections` gives, in its order."""


@runtime_checkable
class Detector(Protocol):
    """A network from images to maps that knows what boxes its maps mean."""

    needs_suppression: bool
    """Whether several boxes of one object may have high scores."""

    def __call__(self, images: Tensor) -> Sequence[Tensor]: ...

    def decode(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Scores ``(batch, boxes, classes)`` from 0 to 1 and boxes ``(batch, boxes, 4)`` in pixels of the image."""


class Detections(nn.Module):
    """Images ``(batch, channels, height, width)`` to boxes, scores, labels and the index of the image of each.

    Boxes ``(n, 4)`` are x1, y1, x2, y2 in pixels of the images, scores ``(n,)`` from 0 to 1, labels and image indices
    ``(n,)`` whole numbers. Of each image the ``count`` best pairs of a box and a class are looked at, those above
    ``threshold`` stay, of overlapping ones of a class the best (by more than ``iou``; None: nothing is suppressed).
    What the detector knows of itself, such as its checkpoint's card, is known of this module, too.
    """

    output_kind: ClassVar[str] = "detections"

    def __init__(self, detector: nn.Module, threshold: float, iou: float | None, count: int) -> None:
        super().__init__()
        self.detector = detector
        self.suppression = None if iou is None else Suppression(iou)
        self.threshold, self.count = threshold, count
        for name in ("card", "pretrained_cfg", "architecture", "fold_report"):
            if hasattr(detector, name):
                setattr(self, name, getattr(detector, name))

    def of(self, detector: nn.Module) -> Detections:
        """The same for another form of the detector."""
        iou = None if self.suppression is None else self.suppression.iou
        return Detections(detector, self.threshold, iou, self.count).train(self.training)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.of_maps(self.detector(images), images.shape[-2:])

    def of_maps(self, maps: Sequence[Tensor], size: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same of what the detector gave for images of a ``size`` (height, width)."""
        scores, boxes = self.detector.decode(maps)  # type: ignore[operator]  # a `Detector`'s
        number, _, classes = scores.shape
        # Filled up, for a small image has fewer boxes than are taken; nothing is above zero among these.
        filled = torch.cat([scores.flatten(1), scores.new_zeros(1, self.count).expand(number, self.count)], 1)
        best, places = filled.topk(self.count, dim=1)
        rows = (places // classes).clamp(max=boxes.shape[1] - 1)
        boxes = boxes.gather(1, rows[..., None].expand(-1, -1, 4)).flatten(0, 1)
        labels = (places % classes).flatten()
        image_index = torch.arange(number, device=places.device)[:, None].expand(number, self.count).flatten()
        height, width = size
        boxes = torch.stack([boxes[:, i].clamp(0, (width, height)[i % 2]) for i in range(4)], -1)
        best = best.flatten()
        # A box beside the image has no area once it is cut to it.
        has_area = (boxes[:, 2:] > boxes[:, :2]).all(1)
        kept = ((best > self.threshold) & has_area).nonzero()[:, 0]
        boxes, best, labels, image_index = (part[kept] for part in (boxes, best, labels, image_index))
        if self.suppression is not None:
            kept = self.suppression(boxes, best, image_index * classes + labels)
            boxes, best, labels, image_index = (part[kept] for part in (boxes, best, labels, image_index))
        return boxes, best, labels, image_index

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}, count={self.count}"


def detections(
    detector: nn.Module,
    *,
    threshold: float = 0.05,
    iou: float = 0.6,
    count: int = 100,
    suppress: bool | None = None,
) -> Detections:
    """A module from images to boxes, in training or plain form: the detector, decoding, and suppression if it needs it.

    ``threshold`` is the least score of a box, ``iou`` the largest overlap of two boxes of a class that both stay,
    ``count`` the most boxes an image. ``suppress`` is the detector's own need unless given.
    Raises `InputError` where ``detector`` is no detector or a number cannot be used.

    Examples:
        >>> import torch, refold
        >>> net = refold.create_model("dense/repghostnet_050", num_classes=3)
        >>> boxes, scores, labels, image_index = refold.detections(net.eval())(torch.randn(2, 3, 64, 64))
        >>> boxes.shape[1], len(boxes) == len(scores) == len(labels) == len(image_index)
        (4, True)
    """
    if not isinstance(detector, Detector):
        raise InputError(
            f"{type(detector).__name__} is no detector of refold, which knows what boxes its maps mean; build one with "
            'refold.create_model("dense/BACKBONE").'
        )
    if not 0 <= threshold < 1:
        raise InputError(f"threshold is {threshold}; give the least score of a box, from 0 up to 1.")
    if count < 1:
        raise InputError(f"count is {count}; give the most boxes an image, at least 1.")
    suppress = detector.needs_suppression if suppress is None else suppress
    return Detections(detector, threshold, iou if suppress else None, count)
