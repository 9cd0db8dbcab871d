"""Finding objects and their outlines: boxes with labels and a mask for each, mean average precision of the masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from refold.boxes import Letterbox, detections
from refold.boxes.comparing import difference
from refold.boxes.detections import DetectorWithMasks
from refold.boxes.pasting import pasted
from refold.errors import InputError
from refold.training.batches import Batch, Transform
from refold.training.labels import OutlinedLabels
from refold.training.recipe import Recipe
from refold.training.tasks.augmentation import geometry, normalized, resampling, sanitized
from refold.training.tasks.base import Measures
from refold.training.tasks.detection import DetectionTask, mean_average_precision, of_each_image

# Two forms of a network may be as far apart in a point of a mask, by rounding.
_SAME_MASK = 1e-2


class InstanceTarget(NamedTuple):
    """What an image of a batch holds.

    ``boxes`` ``(n, 4)``, ``labels`` ``(n,)`` and ``masks`` ``(n, height, width)`` uint8 are to be learnt, in the image
    of the batch. ``whole`` ``(m, 4)``, ``whole_labels``, ``crowds`` ``(m,)`` and ``whole_masks`` ``(m, ...)`` are those
    of the whole picture in its own pixels, ``size`` ``(2,)`` is its height and width.
    """

    boxes: Tensor
    labels: Tensor
    masks: Tensor
    whole: Tensor
    whole_labels: Tensor
    crowds: Tensor
    whole_masks: Tensor
    size: Tensor


class InstanceAnswer(NamedTuple):
    """What was found in an image: boxes ``(n, 4)`` in its own pixels, scores and labels ``(n,)``, and how surely each
    point of a box belongs to it, ``masks`` ``(n, 28, 28)``; on the CPU."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor


class TrainingOutlines:
    """Resize, cut, mirror and colour an image, its boxes and its masks as a recipe says."""

    def __init__(self, recipe: Recipe, preprocessing: Mapping[str, Any], mirror: bool) -> None:
        self.change = geometry(recipe, preprocessing, mirror, mask_fill=0)
        self.finish = normalized(preprocessing)

    def __call__(self, image: Image.Image, target: OutlinedLabels) -> tuple[Tensor, InstanceTarget]:
        whole, labels, crowds = target.on(image)
        masks = target.masks_on(image)
        boxes: Any = tv_tensors.BoundingBoxes(
            whole[~crowds], format="XYXY", canvas_size=(image.height, image.width)
        )
        marks = {"boxes": boxes, "labels": labels[~crowds], "masks": tv_tensors.Mask(masks[~crowds])}
        changed, learnt = sanitized(*self.change(image, marks))
        size = torch.tensor([image.height, image.width])
        kept, shapes = (learnt[name].as_subclass(Tensor) for name in ("boxes", "masks"))
        return self.finish(changed), InstanceTarget(
            kept, learnt["labels"], shapes, whole, labels, crowds, masks, size
        )


class MeasuredOutlines:
    """Put an image into a frame of the network's size, and its boxes and masks with it."""

    def __init__(self, preprocessing: Mapping[str, Any]) -> None:
        _, height, width = preprocessing["input_size"]
        self.frame = (height, width)
        self.resampling = resampling(preprocessing)
        self.finish = normalized(preprocessing)

    def __call__(self, image: Image.Image, target: OutlinedLabels) -> tuple[Tensor, InstanceTarget]:
        whole, labels, crowds = target.on(image)
        masks = target.masks_on(image)
        fitted = Letterbox((image.height, image.width), self.frame)
        height, width = fitted.inner
        framed = torch.zeros(int((~crowds).sum()), *self.frame, dtype=torch.uint8)
        framed[:, :height, :width] = transforms.resize(
            masks[~crowds], [height, width], interpolation=InterpolationMode.NEAREST
        )
        size = torch.tensor([image.height, image.width])
        boxes = fitted.into(whole[~crowds])
        return self.finish(fitted.picture(image, self.resampling)), InstanceTarget(
            boxes, labels[~crowds], framed, whole, labels, crowds, masks, size
        )


class InstanceTask(DetectionTask):
    """Outputs are the maps of a detector with masks, targets `InstanceTarget` and answers `InstanceAnswer`.

    A teacher teaches the first stage: where there is something at all.
    """

    name = "instances"
    score = "mask_map"
    score_title = "mask mAP@.5:.95"

    def transforms(
        self, recipe: Recipe, preprocessing: Mapping[str, Any], mirror: bool
    ) -> tuple[Transform, Transform]:
        return TrainingOutlines(recipe, preprocessing, mirror), MeasuredOutlines(preprocessing)

    def loss(self, net: Any, outputs: Any, targets: Any) -> Tensor:
        loss: Tensor = net.loss(outputs, [(t.boxes, t.labels, t.masks) for t in targets])
        return loss

    def measures(self) -> Measures:
        return MaskPrecision()

    def answers(self, net: nn.Module, outputs: Any, batch: Batch) -> list[InstanceAnswer]:
        found = detections(net).of_maps(outputs, batch.images.shape[-2:])
        return self.answers_of_file(found, batch)

    def answers_of_file(self, outputs: Sequence[Tensor], batch: Batch) -> list[InstanceAnswer]:
        return [InstanceAnswer(*parts) for parts in of_each_image(outputs, batch)]

    def same(self, answer: InstanceAnswer, other: InstanceAnswer) -> bool:
        return (
            difference(*([*each, torch.zeros_like(each.labels)] for each in (answer, other))).worst
            < _SAME_MASK
        )

    def check_network(self, net: nn.Module, name: str) -> None:
        if not isinstance(net, DetectorWithMasks):
            backbone = name.rpartition("/")[2]
            raise InputError(
                f"{name} draws no masks of objects, and the data have them; name a network that does, such as "
                f"maskrcnn/{backbone}, or learn boxes alone: --task detect."
            )


class MaskPrecision(Measures):
    """COCO's mean average precision of masks, and of boxes beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.precision = mean_average_precision("bbox", "segm")

    def update(self, answers: Sequence[InstanceAnswer], targets: Sequence[InstanceTarget]) -> None:
        device = self.precision.device
        found, wanted = [], []
        for answer, target in zip(answers, targets, strict=True):
            masks = pasted(answer.masks, answer.boxes, target.size.tolist())
            found.append({**answer._asdict(), "masks": masks})
            wanted.append(
                {
                    "boxes": target.whole,
                    "labels": target.whole_labels,
                    "iscrowd": target.crowds.to(torch.int64),
                    "masks": target.whole_masks.bool(),
                    # COCO's area is that of the outline, for boxes as well.
                    "area": target.whole_masks.sum((1, 2)),
                }
            )
        self.precision.update(
            *(
                [{name: value.to(device) for name, value in each.items()} for each in both]
                for both in (found, wanted)
            )
        )

    def compute(self) -> dict[str, float]:
        found = self.precision.compute()
        names = {"mask_map": "segm_map", "mask_map_50": "segm_map_50", "map": "bbox_map"}
        # COCO says -1 where there is no box at all to be found.
        return {name: max(0.0, float(found[theirs])) for name, theirs in names.items()}

    def reset(self) -> None:
        self.precision.reset()
