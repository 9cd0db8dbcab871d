"""Naming the class of an image: logits, cross-entropy, accuracy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from timm.data import Mixup, create_transform
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy
from torchvision import transforms as torchvision_transforms

from refold.errors import InputError
from refold.training.batches import Batch, Example, Transform, collate
from refold.training.distillation import divergence
from refold.training.recipe import Recipe
from refold.training.tasks.base import Measures, Task


class ClassificationTask(Task):
    """Outputs are logits ``(n, classes)``, targets and answers the numbers of classes ``(n,)``.

    ``mixup``, ``cutmix`` and ``label_smoothing`` are those of a recipe.
    """

    name = "classify"
    score = "accuracy"
    score_title = "accuracy"

    def __init__(
        self,
        class_names: Sequence[str],
        *,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(class_names)
        self.label_smoothing = label_smoothing
        self._mixup = (
            Mixup(mixup, cutmix, label_smoothing=label_smoothing, num_classes=len(class_names))
            if mixup or cutmix
            else None
        )

    def transforms(
        self, recipe: Recipe, preprocessing: Mapping[str, Any], mirror: bool
    ) -> tuple[Transform, Transform]:
        training, measuring = recipe_transforms(recipe, preprocessing, mirror)
        return OfImage(training), OfImage(measuring)

    def chance(self, recipe: Recipe, mirror: bool) -> list[str]:
        return chance_in(recipe, mirror)

    def collate(self, examples: Sequence[Example]) -> Batch:
        batch = collate(examples)
        return batch._replace(targets=torch.tensor(batch.targets, dtype=torch.int64))

    def mix(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """With mixup or cutmix the targets are probabilities ``(n, classes)``, smoothed already."""
        if self._mixup is None:
            return images, targets
        pairs = len(images) // 2 * 2
        mixed: tuple[Tensor, Tensor] = self._mixup(images[:pairs], targets[:pairs])
        return mixed

    def loss(self, net: nn.Module, outputs: Any, targets: Any) -> Tensor:
        smoothing = 0.0 if targets.is_floating_point() else self.label_smoothing
        return F.cross_entropy(outputs, targets, label_smoothing=smoothing)

    def held_out_loss(self, net: nn.Module, outputs: Any, targets: Any) -> Tensor:
        return F.cross_entropy(outputs, targets)

    def divergence(self, net: nn.Module, outputs: Any, teacher: Any, temperature: float = 1.0) -> Tensor:
        return divergence(outputs, teacher, temperature)

    def check_teacher(
        self, teacher: nn.Module, is_reordered: bool, title: str, student: nn.Module, size: Sequence[int]
    ) -> None:
        with torch.no_grad():
            answered = teacher(torch.zeros(1, 3, *size)).shape[-1]
        if answered != len(self.class_names):
            raise InputError(
                f"The teacher '{title}' knows {answered} classes and the data has {len(self.class_names)}; "
                "give a teacher that was trained on the same classes."
            )

    def measures(self) -> Measures:
        return ClassificationMeasures(len(self.class_names))

    def answers(self, net: nn.Module, outputs: Any, batch: Batch) -> list[int]:
        numbers: list[int] = outputs.argmax(dim=1).tolist()
        return numbers

    def answers_of_file(self, outputs: Sequence[Tensor], batch: Batch) -> list[int]:
        numbers: list[int] = outputs[0].argmax(dim=1).tolist()
        return numbers

    def same(self, answer: int, other: int) -> bool:
        return answer == other

    def check_network(self, net: nn.Module, name: str) -> None:
        if getattr(net, "output_kind", None) is not None:
            raise InputError(
                f"{name} gives {net.output_kind}, and the data are images with one class each; name a classifier, such "
                "as the part behind the slash."
            )


class OfImage:
    """A transform of an image that leaves its target alone."""

    def __init__(self, transform: Callable[[Image.Image], Tensor]) -> None:
        self.transform = transform

    def __call__(self, image: Image.Image, target: Any) -> tuple[Tensor, Any]:
        return self.transform(image), target


class ClassificationMeasures(Measures):
    """The share of right answers."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(classes, average="micro")

    def update(self, answers: Sequence[int], targets: Any) -> None:
        device = self.accuracy.device
        self.accuracy.update(torch.tensor(answers, device=device), torch.as_tensor(targets, device=device))

    def compute(self) -> dict[str, float]:
        return {"accuracy": float(self.accuracy.compute())}

    def reset(self) -> None:
        self.accuracy.reset()


def likeliest(
    outputs: Tensor, count: int, class_names: Sequence[str] | None
) -> list[list[tuple[str, float]]]:
    """For each row of logits ``(n, classes)`` up to ``count`` classes with their probabilities, the likeliest first.

    Without ``class_names`` classes are called by their numbers.
    """
    shares = outputs.float().softmax(dim=1)
    best = shares.topk(min(count, shares.shape[1]), dim=1)
    return [
        [(str(i) if class_names is None else class_names[i], share) for share, i in zip(*pair, strict=True)]
        for pair in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def recipe_transforms(
    recipe: Recipe, preprocessing: Mapping[str, Any], mirror: bool
) -> tuple[Callable[[Image.Image], Tensor], Callable[[Image.Image], Tensor]]:
    """timm's transforms for training, as the recipe says, and for measuring, as the preprocessing says.

    ``mirror`` False keeps images from being mirrored whatever the recipe says.
    """
    shared: dict[str, Any] = {
        "input_size": tuple(preprocessing["input_size"]),
        "interpolation": preprocessing["interpolation"],
        "mean": tuple(preprocessing["mean"]),
        "std": tuple(preprocessing["std"]),
    }
    flip = recipe.horizontal_flip if mirror else 0.0
    first, second, last = create_transform(
        is_training=True,
        separate=True,
        scale=recipe.crop_scale,
        ratio=recipe.crop_ratio,
        hflip=flip,
        color_jitter=recipe.color_jitter or None,
        auto_augment=recipe.auto_augment,
        re_prob=recipe.random_erasing,
        re_mode="pixel",
        **shared,
    )
    if recipe.crop_padding is not None:
        first = torchvision_transforms.Compose(
            [
                torchvision_transforms.Resize((recipe.image_size, recipe.image_size)),
                torchvision_transforms.RandomCrop(recipe.image_size, padding=recipe.crop_padding),
                torchvision_transforms.RandomHorizontalFlip(flip),
            ]
        )
    training = torchvision_transforms.Compose([first, second, last])
    measuring = create_transform(is_training=False, crop_pct=preprocessing["crop_pct"], **shared)
    return training, measuring


def chance_in(recipe: Recipe, mirror: bool) -> list[str]:
    """The recipe's values that make an image another one in each epoch; none, and it is always the same.

    ``mirror`` is that of `recipe_transforms`.
    """
    cut = recipe.crop_padding
    crops = cut is None and (recipe.crop_scale != (1.0, 1.0) or recipe.crop_ratio != (1.0, 1.0))
    found = {
        "crop_padding": cut,
        "crop_scale, crop_ratio": crops,
        "horizontal_flip": mirror and recipe.horizontal_flip,
        **{
            key: getattr(recipe, key)
            for key in ("color_jitter", "auto_augment", "random_erasing", "mixup", "cutmix")
        },
    }
    return [key for key, value in found.items() if value]
