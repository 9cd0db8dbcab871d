"""What a training asks about the answers of its network: a `Task`. There is one, naming the class of an image."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from timm.data import Mixup
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from refold.training.batches import Batch, Example, collate_classes
from refold.training.images import LabelledImages
from refold.training.measures import MeanLoss
from refold.training.recipe import Recipe


class Measures(nn.Module, ABC):
    """What the held-out images of an epoch tell, over all processes."""

    @abstractmethod
    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Count a batch."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """The values so far by name, among them "loss" and the task's ``score``."""

    @abstractmethod
    def reset(self) -> None:
        """Begin again."""


class Task(ABC):
    """How targets become a loss, measures and answers.

    ``score`` names the measure from 0 to 1 by which the best epoch is chosen.
    """

    score: str

    @abstractmethod
    def collate(self, examples: Sequence[Example]) -> Batch:
        """One batch of the examples that could be read."""

    @abstractmethod
    def mix(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """What a step of the training sees of a batch of two images or more; it may be fewer, and other images."""

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of what `mix` gave, a mean over the images."""

    @abstractmethod
    def measures(self) -> Measures:
        """New measures of the held-out images."""

    @abstractmethod
    def answers(self, outputs: Tensor) -> Tensor:
        """What outputs say about each image, such that two forms of a network can be compared."""

    @abstractmethod
    def score_of(self, answers: Tensor, targets: Tensor) -> float:
        """The ``score`` of answers."""

    @abstractmethod
    def likeliest(self, outputs: Tensor, count: int) -> list[list[tuple[str, float]]]:
        """For each image up to ``count`` answers in words with their probabilities, the likeliest first."""


class ClassificationTask(Task):
    """Outputs are logits ``(n, classes)``, targets and answers the numbers of classes ``(n,)``.

    Without ``class_names`` classes are called by their numbers. ``mixup``, ``cutmix`` and ``label_smoothing`` are those
    of a recipe.
    """

    score = "accuracy"

    def __init__(
        self,
        class_names: Sequence[str] | None,
        *,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        label_smoothing: float = 0.0,
    ) -> None:
        self.class_names = class_names
        self.label_smoothing = label_smoothing
        self._mixup = (
            Mixup(mixup, cutmix, label_smoothing=label_smoothing, num_classes=len(class_names or ()))
            if mixup or cutmix
            else None
        )

    def collate(self, examples: Sequence[Example]) -> Batch:
        return collate_classes(examples)

    def mix(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """With mixup or cutmix the targets are probabilities ``(n, classes)``, smoothed already."""
        if self._mixup is None:
            return images, targets
        pairs = len(images) // 2 * 2
        mixed: tuple[Tensor, Tensor] = self._mixup(images[:pairs], targets[:pairs])
        return mixed

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        smoothing = 0.0 if targets.is_floating_point() else self.label_smoothing
        return F.cross_entropy(outputs, targets, label_smoothing=smoothing)

    def measures(self) -> Measures:
        return ClassificationMeasures(len(self.class_names or ()))

    def answers(self, outputs: Tensor) -> Tensor:
        return outputs.argmax(dim=1)

    def score_of(self, answers: Tensor, targets: Tensor) -> float:
        return (answers == targets).double().mean().item()

    def likeliest(self, outputs: Tensor, count: int) -> list[list[tuple[str, float]]]:
        shares = outputs.float().softmax(dim=1)
        best = shares.topk(min(count, shares.shape[1]), dim=1)
        return [
            [(self._name(index), share) for share, index in zip(values, indices, strict=True)]
            for values, indices in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]

    def _name(self, index: int) -> str:
        return str(index) if self.class_names is None else self.class_names[index]


class ClassificationMeasures(Measures):
    """Cross-entropy without smoothing, and the share of right answers."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.loss = MeanLoss()
        self.accuracy = MulticlassAccuracy(classes, average="micro")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.accuracy.update(outputs, targets)
        self.loss.update(F.cross_entropy(outputs, targets), len(targets))

    def compute(self) -> dict[str, float]:
        return {"loss": float(self.loss.compute()), "accuracy": float(self.accuracy.compute())}

    def reset(self) -> None:
        self.loss.reset()
        self.accuracy.reset()


def task_of(images: LabelledImages, recipe: Recipe) -> Task:
    """The task that the images are for."""
    return ClassificationTask(
        images.class_names,
        mixup=recipe.mixup,
        cutmix=recipe.cutmix,
        label_smoothing=recipe.label_smoothing,
    )
