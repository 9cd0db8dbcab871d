"""What a training asks about images and the answers of its network: a `Task`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchmetrics import Metric

from refold.errors import InputError
from refold.training.batches import Batch, Example, Transform, collate
from refold.training.recipe import Recipe


class Measures(nn.Module, ABC):
    """What the held-out images of an epoch tell, over all processes unless it is `of_this_process`."""

    def of_this_process(self) -> Measures:
        """Itself, counting what this process alone was given; the others are not waited for."""
        for part in self.modules():
            if isinstance(part, Metric):
                part.distributed_available_fn = _not_distributed
        return self

    @abstractmethod
    def update(self, answers: Sequence[Any], targets: Sequence[Any]) -> None:
        """Count a batch: what a network answered about each image, and what would be right."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """The values so far by name, among them the task's ``score``."""

    @abstractmethod
    def reset(self) -> None:
        """Begin again."""


def _not_distributed() -> bool:
    return False


class Task(ABC):
    """How images and targets become batches, a loss, answers and measures.

    ``name`` is that of `refold.models.composed.task_of`, ``score`` names the measure from 0 to 1 by which the best
    epoch is chosen, ``score_title`` in words; ``export_options`` are what `refold.export` is told of the network.
    ``answers_have_places`` says that an answer is about every place of an image, not about the whole of it.
    """

    name: ClassVar[str]
    answers_have_places: ClassVar[bool] = False
    score: ClassVar[str]
    score_title: ClassVar[str]
    export_options: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, class_names: Sequence[str]) -> None:
        self.class_names = class_names

    @abstractmethod
    def transforms(
        self, recipe: Recipe, preprocessing: Mapping[str, Any], mirror: bool
    ) -> tuple[Transform, Transform]:
        """How an image and its target are prepared for training, and for measuring.

        ``mirror`` False keeps images from being mirrored whatever the recipe says.
        """

    @abstractmethod
    def chance(self, recipe: Recipe, mirror: bool) -> list[str]:
        """The recipe's values that make an image another one in each epoch; none, and it is always the same."""

    def collate(self, examples: Sequence[Example]) -> Batch:
        """One batch of the examples that could be read."""
        return collate(examples)

    def mix(self, images: Tensor, targets: Any) -> tuple[Tensor, Any]:
        """What a step of the training sees of a batch of two images or more; it may be fewer, and other images."""
        return images, targets

    @abstractmethod
    def loss(self, net: nn.Module, outputs: Any, targets: Any) -> Tensor:
        """The loss of what ``net`` gave for what `mix` gave, a mean over the images."""

    def held_out_loss(self, net: nn.Module, outputs: Any, targets: Any) -> Tensor:
        """The same for images as they are measured, without smoothing."""
        return self.loss(net, outputs, targets)

    @abstractmethod
    def divergence(self, net: nn.Module, outputs: Any, teacher: Any, temperature: float = 1.0) -> Tensor:
        """How far outputs are from those of a teacher, a mean over the images."""

    def check_answers_can_be_kept(self) -> None:
        """Raise `InputError` where a teacher's answers are too large to be kept on disk."""
        if self.answers_have_places:
            raise InputError(
                "The teacher's answers about every place of an image are not kept; leave teacher_cache out."
            )

    def check_teacher(
        self, teacher: nn.Module, is_reordered: bool, title: str, student: nn.Module, size: Sequence[int]
    ) -> None:
        """Raise `InputError` where a teacher does not answer an image of a size (height, width) as the student does.

        ``is_reordered`` says that its classes are the same in another order.
        """
        image = torch.zeros(1, 3, *size)
        modes, shapes = [net.training for net in (student, teacher)], []
        with torch.no_grad():
            for net in (student, teacher):
                shapes.append([tuple(value.shape) for value in tree_leaves(net.eval()(image))])
        student.train(modes[0])
        if shapes[0] != shapes[1] or (is_reordered and len(shapes[0]) > 1):
            raise InputError(
                f"The teacher '{title}' answers an image with {_shapes(shapes[1])} and the student with "
                f"{_shapes(shapes[0])}{', its classes in another order' if is_reordered else ''}; give a teacher with "
                "the same head that was trained on the same classes."
            )

    @abstractmethod
    def measures(self) -> Measures:
        """New measures of the held-out images."""

    @abstractmethod
    def answers(self, net: nn.Module, outputs: Any, batch: Batch) -> list[Any]:
        """What outputs say about each image of a batch."""

    @abstractmethod
    def answers_of_file(self, outputs: Sequence[Tensor], batch: Batch) -> list[Any]:
        """The same of what an exported file gave."""

    @abstractmethod
    def same(self, answer: Any, other: Any) -> bool:
        """Whether two answers about an image are the same but for rounding."""

    @abstractmethod
    def check_network(self, net: nn.Module, name: str) -> None:
        """Raise `InputError` where a network is for another task."""


def _shapes(shapes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join(" x ".join(map(str, shape[1:])) for shape in shapes[:3]) + (
        " ..." if len(shapes) > 3 else ""
    )
