"""Naming the class of every pixel: logits of the size of the image, cross-entropy, mean intersection over union."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex
from torchvision import tv_tensors

from refold.boxes import Letterbox
from refold.errors import InputError
from refold.training.batches import Batch, Example, Transform, collate
from refold.training.labels import IGNORED, MaskFile
from refold.training.recipe import Recipe
from refold.training.tasks.augmentation import changing, geometry, normalized, resampling
from refold.training.tasks.base import Measures, Task

# Two forms of a network may see a pixel between two classes differently, by rounding.
_SAME_PIXELS = 0.999


class TrainingMasks:
    """Resize, cut, mirror and colour an image and its mask as a recipe says."""

    def __init__(self, recipe: Recipe, preprocessing: Mapping[str, Any], mirror: bool) -> None:
        self.change = geometry(recipe, preprocessing, mirror)
        self.finish = normalized(preprocessing)

    def __call__(self, image: Image.Image, target: MaskFile) -> tuple[Tensor, Tensor]:
        changed, mask = self.change(image, tv_tensors.Mask(target.on(image)))
        return self.finish(changed), mask.as_subclass(Tensor).long()


class MeasuredMasks:
    """Put an image and its mask into a frame of the network's size; what is beside them counts nowhere."""

    def __init__(self, preprocessing: Mapping[str, Any]) -> None:
        _, height, width = preprocessing["input_size"]
        self.frame = (height, width)
        self.resampling = resampling(preprocessing)
        self.finish = normalized(preprocessing)

    def __call__(self, image: Image.Image, target: MaskFile) -> tuple[Tensor, Tensor]:
        fitted = Letterbox((image.height, image.width), self.frame)
        mask = Image.fromarray(target.on(image).numpy()).resize(fitted.inner[::-1], Image.Resampling.NEAREST)
        framed = torch.full(self.frame, IGNORED, dtype=torch.int64)
        height, width = fitted.inner
        framed[:height, :width] = torch.from_numpy(np.array(mask)).long()
        return self.finish(fitted.picture(image, self.resampling)), framed


class SegmentationTask(Task):
    """Outputs are logits ``(n, classes, height, width)``, targets and answers the numbers of the pixels' classes.

    Pixels of no class have the number 255 and count nowhere. Measures are those of pictures in the network's size.
    """

    name = "segment"
    score = "mean_iou"
    answers_have_places = True
    score_title = "mean IoU"
    export_options: ClassVar[Mapping[str, Any]] = {"dynamic_size": True}

    def transforms(
        self, recipe: Recipe, preprocessing: Mapping[str, Any], mirror: bool
    ) -> tuple[Transform, Transform]:
        return TrainingMasks(recipe, preprocessing, mirror), MeasuredMasks(preprocessing)

    def chance(self, recipe: Recipe, mirror: bool) -> list[str]:
        return changing(recipe, mirror)

    def collate(self, examples: Sequence[Example]) -> Batch:
        batch = collate(examples)
        empty = torch.empty(0, 1, 1, dtype=torch.int64)
        return batch._replace(targets=torch.stack(batch.targets) if batch.targets else empty)

    def loss(self, net: nn.Module, outputs: Any, targets: Any) -> Tensor:
        counted = (targets != IGNORED).sum().clamp(min=1)
        loss: Tensor = F.cross_entropy(outputs, targets, ignore_index=IGNORED, reduction="sum") / counted
        return loss

    def divergence(self, net: nn.Module, outputs: Any, teacher: Any, temperature: float = 1.0) -> Tensor:
        rows, taught = (F.log_softmax(value / temperature, dim=1) for value in (outputs, teacher))
        pixels = outputs[:, 0].numel()
        distance: Tensor = F.kl_div(rows, taught, reduction="sum", log_target=True) / pixels
        return temperature**2 * distance

    def measures(self) -> Measures:
        return MaskMeasures(len(self.class_names))

    def answers(self, net: nn.Module, outputs: Any, batch: Batch) -> list[Tensor]:
        return list(outputs.argmax(1).to(torch.uint8).cpu())

    def answers_of_file(self, outputs: Sequence[Tensor], batch: Batch) -> list[Tensor]:
        return list(outputs[0].argmax(1).to(torch.uint8))

    def same(self, answer: Tensor, other: Tensor) -> bool:
        return float((answer == other).float().mean()) >= _SAME_PIXELS

    def check_network(self, net: nn.Module, name: str) -> None:
        if getattr(net, "output_kind", None) != "segmentation":
            raise InputError(
                f"{name} is no segmenter, and the data have masks; name one, such as lraspp/{name}."
            )


class MaskMeasures(Measures):
    """The mean over the classes of intersection over union, and the share of right pixels."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        settings: dict[str, Any] = {"num_classes": max(2, classes), "ignore_index": IGNORED}
        self.overlap = MulticlassJaccardIndex(average="macro", **settings)
        self.accuracy = MulticlassAccuracy(average="micro", **settings)

    def update(self, answers: Sequence[Tensor], targets: Any) -> None:
        for answer, target in zip(answers, targets, strict=True):
            for metric in (self.overlap, self.accuracy):
                device = metric.device
                metric.update(answer.to(device, torch.int64)[None], target.to(device)[None])

    def compute(self) -> dict[str, float]:
        return {"mean_iou": float(self.overlap.compute()), "pixel_accuracy": float(self.accuracy.compute())}

    def reset(self) -> None:
        self.overlap.reset()
        self.accuracy.reset()
