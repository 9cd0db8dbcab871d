"""From a detector's maps to boxes: `refold.detections`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from refold.boxes.suppression import Suppression, first_of_each
from refold.errors import InputError

# Of each image, before overlapping ones are suppressed.
_LOOKED_AT = 1000
# The side of a box in pixels of the network's image; nothing smaller can be seen in it.
_SMALLEST = 1.0


@runtime_checkable
class Detector(Protocol):
    """A network from images to maps that knows what boxes its maps mean."""

    needs_suppression: bool
    """Whether several boxes of one object may have high scores."""

    def __call__(self, images: Tensor) -> Sequence[Tensor]: ...

    def decode(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Scores ``(batch, boxes, classes)`` from 0 to 1 and boxes ``(batch, boxes, 4)`` in pixels of the image."""


@runtime_checkable
class DetectorWithMasks(Detector, Protocol):
    """A detector of two stages, whose second looks at the boxes that the first one chose."""

    def candidates(
        self, maps: Sequence[Tensor], size: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Boxes ``(n, 4)``, scores, labels and image indices ``(n,)`` for images of a size (height, width)."""

    def masks(self, maps: Sequence[Tensor], boxes: Tensor, labels: Tensor, image_index: Tensor) -> Tensor:
        """How surely each point of a box belongs to what is in it, from 0 to 1: ``(n, side, side)``."""


class Detections(nn.Module):
    """Images ``(batch, channels, height, width)`` to boxes, scores, labels and the index of the image of each.

    Boxes ``(n, 4)`` are x1, y1, x2, y2 in pixels of the images, scores ``(n,)`` from 0 to 1, labels and image indices
    ``(n,)`` whole numbers. Of all pairs of a box and a class those above ``threshold`` stay, of overlapping ones of a
    class the best (by more than ``iou``; None: nothing is suppressed), and of each image the best ``count``; boxes of
    less than a pixel in either direction are left out. Of a detector of two stages there are ``masks`` ``(n, 28, 28)``
    before the image indices: how surely each point of the box belongs to what is in it. ``outputs`` are the names of
    what is given, in its order.
    What the detector knows of itself, such as its checkpoint's card, is known of this module, too.
    """

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

    @property
    def output_kind(self) -> str:
        """What an exported file says that it gives."""
        return "instances" if isinstance(self.detector, DetectorWithMasks) else "detections"

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of what is given."""
        masks = ("masks",) if isinstance(self.detector, DetectorWithMasks) else ()
        return ("boxes", "scores", "labels", *masks, "image_index")

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.of_maps(self.detector(images), images.shape[-2:])

    def of_maps(self, maps: Sequence[Tensor], size: Sequence[int]) -> tuple[Tensor, ...]:
        """The same of what the detector gave for images of a ``size`` (height, width)."""
        number = maps[0].shape[0]
        if isinstance(self.detector, DetectorWithMasks):
            boxes, scores, labels, image_index = self.detector.candidates(maps, size)
        else:
            boxes, scores, labels, image_index = self._best(maps)
        height, width = size
        boxes = torch.stack([boxes[:, i].clamp(0, (width, height)[i % 2]) for i in range(4)], -1)
        # What is beside the image leaves a sliver at most once it is cut to it, and whether it does is rounding.
        has_area = (boxes[:, 2:] - boxes[:, :2] >= _SMALLEST).all(1)
        found = [boxes, scores, labels, image_index]
        kept = ((scores > self.threshold) & has_area).nonzero()[:, 0]
        boxes, scores, labels, image_index = found = [part[kept] for part in found]
        if self.suppression is not None:
            # The best come first.
            kept = self.suppression(boxes, scores, labels * number + image_index)
            found = [part[kept] for part in found]
            kept = first_of_each(found[3], number, self.count)
            boxes, scores, labels, image_index = found = [part[kept] for part in found]
        if isinstance(self.detector, DetectorWithMasks):
            found.insert(3, self.detector.masks(maps, boxes, labels, image_index))
        return tuple(found)

    def _best(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The best pairs of a box and a class of each image: as many as stay, or as are looked at for overlaps."""
        count = self.count if self.suppression is None else max(self.count, _LOOKED_AT)
        scores, boxes = self.detector.decode(maps)  # type: ignore[operator]  # a `Detector`'s
        number, _, classes = scores.shape
        # Filled up, for a small image has fewer boxes than are taken; nothing is above zero among these.
        filled = torch.cat([scores.flatten(1), scores.new_zeros(1, count).expand(number, count)], 1)
        best, places = filled.topk(count, dim=1)
        rows = (places // classes).clamp(max=boxes.shape[1] - 1)
        boxes = boxes.gather(1, rows[..., None].expand(-1, -1, 4)).flatten(0, 1)
        image_index = torch.arange(number, device=places.device)[:, None].expand(number, count).flatten()
        return boxes, best.flatten(), (places % classes).flatten(), image_index

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
