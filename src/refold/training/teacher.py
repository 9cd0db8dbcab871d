"""A trained network that answers for images prepared for another one: loading it, and asking it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn import functional as F

from refold.errors import CheckpointError, InputError
from refold.files import PathLike
from refold.targets import Say, open_network
from refold.training.tasks import Task


def teacher_network(name: str, checkpoint: PathLike | None = None, say: Say = lambda _: None) -> nn.Module:
    """A teacher in eval mode, as `refold.targets.open_network` has it, in either form.

    A named network without a checkpoint takes the weights that are published for it.
    Raises `InputError`, `CheckpointError` or `UnknownModel` where that is not possible.
    """
    try:
        return open_network(name, checkpoint, pretrained=None, say=say)
    except (InputError, CheckpointError) as error:
        said = str(error).replace("--checkpoint", "--teacher-checkpoint")
        raise type(error)(f"The teacher cannot be used. {said}") from error


class Teacher:
    """A trained network that answers for images prepared for the student, by its own preprocessing.

    ``network`` maps images to logits; ``preprocessing`` (timm's terms: ``input_size``, ``mean``, ``std``) is the
    teacher's, ``student_preprocessing`` what the images were prepared with. ``class_order`` lists, for each
    class of the student, its place among the teacher's. It is no module, so that the student's parameters and
    checkpoints never include it.
    """

    def __init__(
        self,
        network: nn.Module,
        preprocessing: dict[str, Any],
        student_preprocessing: dict[str, Any],
        class_order: Sequence[int] | None = None,
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.size = tuple(preprocessing["input_size"][-2:])
        # x_student · std_s + mean_s are pixels, and (pixels − mean_t) / std_t what the teacher wants.
        mean, std = _channels(preprocessing["mean"]), _channels(preprocessing["std"])
        student_mean = _channels(student_preprocessing["mean"])
        student_std = _channels(student_preprocessing["std"])
        self.scale = student_std / std
        self.shift = (student_mean - mean) / std
        self.class_order = None if class_order is None else torch.tensor(class_order)

    def to(self, device: torch.device) -> Teacher:
        """Move to the device of the images."""
        self.network.to(device)
        self.scale, self.shift = self.scale.to(device), self.shift.to(device)
        if self.class_order is not None:
            self.class_order = self.class_order.to(device)
        return self

    def prepare(self, images: Tensor) -> Tensor:
        """The student's images ``(n, 3, height, width)`` as the teacher wants them, at its input size."""
        images = images * self.scale + self.shift
        if tuple(images.shape[-2:]) != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", align_corners=False, antialias=True)
        return images

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Any:
        """What the network answers: logits ``(n, classes, ...)`` in the student's order of classes, or maps."""
        self.network.eval()
        outputs = self.network(self.prepare(images))
        return outputs if self.class_order is None else outputs[:, self.class_order]


def open_teacher(
    network: nn.Module,
    title: str,
    task: Task,
    student_preprocessing: dict[str, Any],
    student: nn.Module,
) -> Teacher:
    """A teacher for a ``student`` of a task; its preprocessing is that of its card or timm's of its name.

    Raises `InputError` where the teacher's classes are others, or it is for another task.
    """
    class_names = task.class_names
    card = getattr(network, "card", None)
    preprocessing = dict(getattr(network, "pretrained_cfg", None) or {})
    if card is not None and card.preprocessing is not None:
        preprocessing |= card.preprocessing
    preprocessing.setdefault("mean", IMAGENET_DEFAULT_MEAN)
    preprocessing.setdefault("std", IMAGENET_DEFAULT_STD)
    if task.answers_have_places or "input_size" not in preprocessing:
        preprocessing["input_size"] = student_preprocessing["input_size"]
    names = None if card is None else card.class_names
    if names is not None and sorted(names) != sorted(class_names):
        stranger = sorted(set(names) ^ set(class_names))[0]
        raise InputError(
            f"The teacher '{title}' knows other classes than the data: '{stranger}' is only in one of them; "
            "give a teacher that was trained on the same classes."
        )
    teacher = Teacher(
        network,
        preprocessing,
        student_preprocessing,
        None if names is None or list(names) == list(class_names) else [names.index(n) for n in class_names],
    )
    task.check_teacher(teacher.network, teacher.class_order is not None, title, student, teacher.size)
    return teacher


def _channels(values: Sequence[float]) -> Tensor:
    return torch.tensor(tuple(values), dtype=torch.float32).view(1, -1, 1, 1)
