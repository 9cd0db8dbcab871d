"""Finding objects: boxes with labels, the losses of the detectors, mean average precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import tv_tensors

from refold.boxes import Letterbox, detections
from refold.boxes.comparing import difference
from refold.boxes.detections import Detector, DetectorWithMasks
from refold.boxes.losses import box_loss
from refold.errors import InputError
from refold.training.batches import Batch, Transform
from refold.training.labels import BoxLabels
from refold.training.recipe import Recipe
from refold.training.tasks.augmentation import changing, geometry, normalized, resampling, sanitized
from refold.training.tasks.base import Measures, Task


class BoxTarget(NamedTuple):
    """What an image of a batch holds.

    ``boxes`` ``(n, 4)`` and ``labels`` ``(n,)`` are to be learnt, in pixels of the batch's image. ``whole`` ``(m, 4)``,
    ``whole_labels`` and ``crowds`` ``(m,)`` are those of the whole picture in its own pixels, ``size`` ``(2,)`` is its
    height and width.
    """

    boxes: Tensor
    labels: Tensor
    whole: Tensor
    whole_labels: Tensor
    crowds: Tensor
    size: Tensor


class BoxAnswer(NamedTuple):
    """What was found in an image: boxes ``(n, 4)`` in its own pixels, scores and labels ``(n,)``, on the CPU."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


class TrainingBoxes:
    """Resize, cut, mirror and colour an image and its boxes as a recipe says."""

    def __init__(self, recipe: Recipe, preprocessing: Mapping[str, Any], mirror: bool) -> None:
        self.change = geometry(recipe, preprocessing, mirror)
        self.finish = normalized(preprocessing)

    def __call__(self, image: Image.Image, target: BoxLabels) -> tuple[Tensor, BoxTarget]:
        whole, labels, crowds = target.on(image)
        boxes: Any = tv_tensors.BoundingBoxes(
            whole[~crowds], format="XYXY", canvas_size=(image.height, image.width)
        )
        changed, learnt = sanitized(*self.change(image, {"boxes": boxes, "labels": labels[~crowds]}))
        size = torch.tensor([image.height, image.width])
        kept = learnt["boxes"].as_subclass(Tensor)
        return self.finish(changed), BoxTarget(kept, learnt["labels"], whole, labels, crowds, size)


class MeasuredBoxes:
    """Put an image into a frame of the network's size, and its boxes with it."""

    def __init__(self, preprocessing: Mapping[str, Any]) -> None:
        _, height, width = preprocessing["input_size"]
        self.frame = (height, width)
        self.resampling = resampling(preprocessing)
        self.finish = normalized(preprocessing)

    def __call__(self, image: Image.Image, target: BoxLabels) -> tuple[Tensor, BoxTarget]:
        whole, labels, crowds = target.on(image)
        fitted = Letterbox((image.height, image.width), self.frame)
        size = torch.tensor([image.height, image.width])
        framed = BoxTarget(fitted.into(whole[~crowds]), labels[~crowds], whole, labels, crowds, size)
        return self.finish(fitted.picture(image, self.resampling)), framed


class DetectionTask(Task):
    """Outputs are a detector's maps, targets `BoxTarget` and answers `BoxAnswer`."""

    name = "detect"
    score = "map"
    answers_have_places = True
    score_title = "mAP@.5:.95"
    export_options: ClassVar[Mapping[str, Any]] = {"detections": True, "dynamic_size": True}

    def transforms(
        self, recipe: Recipe, preprocessing: Mapping[str, Any], mirror: bool
    ) -> tuple[Transform, Transform]:
        return TrainingBoxes(recipe, preprocessing, mirror), MeasuredBoxes(preprocessing)

    def chance(self, recipe: Recipe, mirror: bool) -> list[str]:
        return changing(recipe, mirror)

    def loss(self, net: Any, outputs: Any, targets: Any) -> Tensor:
        loss: Tensor = net.loss(outputs, [(t.boxes, t.labels) for t in targets])
        return loss

    def divergence(self, net: nn.Module, outputs: Any, teacher: Any, temperature: float = 1.0) -> Tensor:
        return box_divergence(net, outputs, teacher)

    def measures(self) -> Measures:
        return BoxMeasures()

    def answers(self, net: nn.Module, outputs: Any, batch: Batch) -> list[Any]:
        return self.answers_of_file(detections(net).of_maps(outputs, batch.images.shape[-2:]), batch)

    def answers_of_file(self, outputs: Sequence[Tensor], batch: Batch) -> list[Any]:
        return [BoxAnswer(*parts) for parts in of_each_image(outputs, batch)]

    def same(self, answer: Any, other: Any) -> bool:
        sets = [(*each, torch.zeros_like(each.labels)) for each in (answer, other)]
        return difference(*sets).unmatched == 0

    def check_network(self, net: nn.Module, name: str) -> None:
        if not isinstance(net, Detector):
            raise InputError(
                f"{name} is no detector, and the data have boxes; name one, such as dense/{name}."
            )
        if isinstance(net, DetectorWithMasks):
            raise InputError(
                f"{name} learns masks of objects beside their boxes; train it with --task instances."
            )


def of_each_image(found: Sequence[Tensor], batch: Batch) -> list[list[Tensor]]:
    """What `refold.detections` gives for a batch, by image: boxes in the pixels of its picture, and the others."""
    boxes, *others, image_index = (part.detach().cpu() for part in found)
    frame = (batch.images.shape[-2], batch.images.shape[-1])
    answers = []
    for index, target in enumerate(batch.targets):
        own = image_index == index
        height, width = target.size.tolist()
        fitted = Letterbox((height, width), frame)
        rest = [part[own].float() if part.is_floating_point() else part[own] for part in others]
        answers.append([fitted.back(boxes[own].float()), *rest])
    return answers


def mean_average_precision(*kinds: Literal["bbox", "segm"]) -> Any:
    """torchmetrics' mean average precision of "bbox" and "segm" with COCO's own thresholds.

    Raises `InputError` where its package is missing.
    """
    try:
        from torchmetrics.detection import MeanAveragePrecision

        # In float64: torchmetrics' own are rounded, and a recall of exactly 0.6 misses that of 0.60000002.
        precision = MeanAveragePrecision(
            iou_type=kinds,
            backend="faster_coco_eval",
            iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
            rec_thresholds=np.linspace(0.0, 1.0, 101).tolist(),
        )
    except (ImportError, ModuleNotFoundError) as error:
        raise InputError(
            "Mean average precision needs the package faster-coco-eval; install it: pip install 'refold[detect]'."
        ) from error
    # A hundred boxes an image are all that are asked for.
    precision.warn_on_many_detections = False
    return precision


class BoxMeasures(Measures):
    """COCO's mean average precision, over ten overlaps from 0.5 to 0.95, and at 0.5 alone."""

    def __init__(self) -> None:
        super().__init__()
        self.precision = mean_average_precision("bbox")

    def update(self, answers: Sequence[BoxAnswer], targets: Sequence[BoxTarget]) -> None:
        device = self.precision.device
        self.precision.update(
            [{name: value.to(device) for name, value in answer._asdict().items()} for answer in answers],
            [
                {
                    "boxes": target.whole.to(device),
                    "labels": target.whole_labels.to(device),
                    "iscrowd": target.crowds.to(device, torch.int64),
                }
                for target in targets
            ],
        )

    def compute(self) -> dict[str, float]:
        found = self.precision.compute()
        # COCO says -1 where there is no box at all to be found.
        return {name: max(0.0, float(found[name])) for name in ("map", "map_50")}

    def reset(self) -> None:
        self.precision.reset()


def box_divergence(net: Any, outputs: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """How far a detector's maps are from those of a teacher with the same head and classes, a mean over the images.

    Of all scores the cross entropy, counted by the square of how far the two are apart, and of all boxes 1 - GIoU,
    counted by the teacher's score; both divided by the sum of the teacher's scores.

    Source: Generalized Focal Loss, eq. 2, for the scores.
    """
    wanted, taught = net.decode(teacher)
    counts = wanted.amax(-1)
    total = counts.sum().clamp(min=1.0)
    loss: Tensor = counts.new_zeros(())
    # Of a detector with two sets of prediction layers, both learn.
    for start in range(0, len(outputs), len(teacher)):
        scores, boxes = net.decode(outputs[start : start + len(teacher)])
        apart = (scores.detach() - wanted).abs() ** 2
        entropy = F.binary_cross_entropy(scores.clamp(1e-6, 1 - 1e-6), wanted, reduction="none")
        distance = box_loss(boxes.flatten(0, 1), taught.flatten(0, 1), counts.flatten())
        loss = loss + ((entropy * apart).sum() + distance) / total
    return loss
