"""Learning from a teacher: one object for its answers, asked or kept, and for the losses of learning from them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from refold.errors import InputError
from refold.quantization.rounded import RoundedNetwork
from refold.training.answers import Questions, TeacherCache
from refold.training.distillation import FeatureLosses, distillation_loss
from refold.training.images import LabelledImages
from refold.training.recipe import Recipe
from refold.training.settings import Settings
from refold.training.tasks import Task
from refold.training.teacher import Teacher, open_teacher, teacher_network


class Teaching:
    """What a run has from its ``teacher``, by the weights of its recipe.

    ``feature_losses`` are those between the student and the teacher, where the recipe asks for them; they may have
    weights of their own that learn along. With a ``cache`` the teacher is asked about each training image once, when
    training begins.
    """

    def __init__(
        self,
        teacher: Teacher,
        student: nn.Module,
        recipe: Recipe,
        task: Task,
        cache: TeacherCache | None = None,
    ) -> None:
        self.teacher = teacher
        self.task = task
        self.cache = cache
        self.feature_losses: FeatureLosses | None = None
        if recipe.feature_weight or recipe.relation_weight:
            self.feature_losses = FeatureLosses(
                student,
                teacher.network,
                feature_weight=recipe.feature_weight,
                relation_weight=recipe.relation_weight,
            )
        self._alpha, self._temperature = recipe.alpha, recipe.temperature
        self._kept: Tensor | None = None
        self._held_out: dict[int, Any] = {}

    def begin(self, student: nn.Module, questions: Questions) -> None:
        """Before the first step, once ``student`` is the network that trains."""
        if self.cache is not None:
            self._kept = self.cache.answers(self.teacher, questions)
        self.attach(student, questions.device)

    def attach(self, student: nn.Module, device: torch.device) -> None:
        """Look at what passes through both networks from now on; the teacher goes to the device of the images."""
        self.teacher.to(device)
        if self.feature_losses is not None:
            self.feature_losses.attach(student, self.teacher.network)

    def loss(self, loss: Tensor, net: nn.Module, outputs: Any, images: Tensor, indices: Tensor) -> Tensor:
        """A step's ``loss`` together with those of learning from the teacher (GhostNetV3, eq. 3).

        ``outputs`` are those of the student ``net`` for ``images``, ``indices`` their places among the training images.
        """
        answers = self.teacher(images) if self._kept is None else self._kept[indices.cpu()].to(images.device)
        apart = self.task.divergence(net, outputs, answers, self._temperature)
        loss = distillation_loss(loss, apart, self._alpha)
        return loss if self.feature_losses is None else loss + self.feature_losses()

    def divergence(self, net: nn.Module, outputs: Any, images: Tensor, batch: int) -> Tensor:
        """How far outputs for a batch of held-out images are from the teacher's; it is asked about each batch once."""
        if batch not in self._held_out:  # these images are the same in every epoch
            self._held_out[batch] = tree_map(lambda value: value.float().cpu(), self.teacher(images))
        known = tree_map(lambda value: value.to(images.device), self._held_out[batch])
        return self.task.divergence(net, outputs, known)


def open_teaching(
    settings: Settings,
    student: nn.Module,
    images: LabelledImages,
    preprocessing: dict[str, Any],
    task: Task,
    console: Console,
) -> Teaching | None:
    """What the settings say of a teacher, None where they name none; ``preprocessing`` is the student's.

    A network that learns with rounding has its own float form, unless they name another.

    Raises `InputError`, `CheckpointError` or `UnknownModel` where the teacher cannot be loaded, knows other classes, or
    its answers cannot be kept.
    """
    recipe = settings.recipe.recipe
    if settings.teacher is None and isinstance(student, RoundedNetwork):
        return Teaching(Teacher(student.plain, preprocessing, preprocessing), student, recipe, task)
    if settings.teacher is None:
        if settings.teacher_cache is not None:
            raise InputError(
                "There is no teacher whose answers could be kept; name one, or give no teacher_cache."
            )
        return None
    say = partial(console.print, markup=False)
    network = teacher_network(settings.teacher, settings.teacher_checkpoint, say)
    teacher = open_teacher(network, settings.teacher, task, preprocessing, student)
    cache = None
    if settings.teacher_cache is not None:
        task.check_answers_can_be_kept()
        cache = TeacherCache(
            Path(settings.teacher_cache), recipe, task.chance(recipe, images.mirror), console
        )
    return Teaching(teacher, student, recipe, task, cache)
