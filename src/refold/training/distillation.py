"""Learning from a teacher: GhostNetV3's eq. 3 and 4, losses of features, and teachers with their own preprocessing."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn import functional as F

from refold.errors import InputError


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """τ² KL(softmax(teacher / τ) ‖ softmax(student / τ)), the mean over the batch of logits ``(n, classes)``.

    This is the usual form (Hinton et al. 2015), the temperature inside the softmax. Eq. 4 of GhostNetV3 prints
    it outside, where the arguments are no distributions and the whole is τ times the divergence at
    temperature 1; at τ = 1, which the paper and its recipe use, the two are the same.
    """
    loss = F.kl_div(
        F.log_softmax(student / temperature, dim=1),
        F.log_softmax(teacher / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return temperature**2 * loss


def distillation_loss(
    cross_entropy: Tensor, student: Tensor, teacher: Tensor, alpha: float, temperature: float
) -> Tensor:
    """(1 − α) cross-entropy + α divergence (GhostNetV3, eq. 3)."""
    return (1 - alpha) * cross_entropy + alpha * divergence(student, teacher, temperature)


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean squared difference of features ``(n, width)`` (FitNets, eq. 3, as a mean)."""
    return F.mse_loss(student.float(), teacher.float())


def relation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss between the distances of all pairs of images, each in units of the batch's mean distance.

    Features are ``(n, width)``, of any two widths (Relational Knowledge Distillation, Park et al. 2019, eq. 5 to 7, as
    a mean over the pairs).
    """
    student_distances, teacher_distances = (_relative_distances(f.float()) for f in (student, teacher))
    return F.huber_loss(student_distances, teacher_distances)


def _relative_distances(features: Tensor) -> Tensor:
    distances = torch.pdist(features)
    return distances / distances.mean().clamp_min(torch.finfo(distances.dtype).tiny)


class FeatureLosses(nn.Module):
    """The recipe's feature and relation losses, of what the classifiers of student and teacher read.

    Where the two widths differ, a linear ``projection`` of the student's features learns along; it is no part of the
    student. ``attach`` comes once the networks are those that train; then each call gives the loss of the last batch
    that both have seen.
    Raises `InputError` where a network has no linear classifier to look before.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, *, feature_weight: float, relation_weight: float
    ) -> None:
        super().__init__()
        self.feature_weight = feature_weight
        self.relation_weight = relation_weight
        widths = [_linear_classifier(net).in_features for net in (student, teacher)]
        same = widths[0] == widths[1] or not feature_weight
        self.projection = nn.Identity() if same else nn.Linear(widths[0], widths[1], bias=False)
        self._seen: dict[str, Tensor] = {}

    def attach(self, student: nn.Module, teacher: nn.Module) -> None:
        """Look at what passes into the classifiers from now on."""
        for name, net in (("student", student), ("teacher", teacher)):
            _linear_classifier(net).register_forward_pre_hook(partial(self._look, name))

    def _look(self, name: str, classifier: nn.Module, inputs: tuple[Tensor]) -> None:
        self._seen[name] = inputs[0]

    def forward(self) -> Tensor:
        student, teacher = self._seen.pop("student"), self._seen.pop("teacher")
        loss = student.new_zeros((), dtype=torch.float32)
        if self.feature_weight:
            loss = loss + self.feature_weight * feature_loss(self.projection(student), teacher)
        if self.relation_weight:
            loss = loss + self.relation_weight * relation_loss(student, teacher)
        return loss


def _linear_classifier(net: nn.Module) -> nn.Linear:
    get_classifier: Any = getattr(net, "get_classifier", None)
    classifier = None if get_classifier is None else get_classifier()
    if not isinstance(classifier, nn.Linear):
        raise InputError(
            f"{type(net).__name__} has no linear layer as its classifier, so its features are not known; "
            "leave feature_weight and relation_weight at 0."
        )
    return classifier


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
    def __call__(self, images: Tensor) -> Tensor:
        """Logits ``(n, classes)`` in the student's order of classes."""
        self.network.eval()
        logits: Tensor = self.network(self.prepare(images))
        return logits if self.class_order is None else logits[:, self.class_order]


def open_teacher(
    network: nn.Module, title: str, class_names: Sequence[str], student_preprocessing: dict[str, Any]
) -> Teacher:
    """A teacher for a student with these classes; its preprocessing is that of its card or timm's of its name.

    Raises `InputError` where the teacher's classes are others.
    """
    card = getattr(network, "card", None)
    preprocessing = dict(getattr(network, "pretrained_cfg", None) or {})
    if card is not None and card.preprocessing is not None:
        preprocessing |= card.preprocessing
    preprocessing.setdefault("mean", IMAGENET_DEFAULT_MEAN)
    preprocessing.setdefault("std", IMAGENET_DEFAULT_STD)
    preprocessing.setdefault("input_size", student_preprocessing["input_size"])
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
    with torch.no_grad():
        answered = network(torch.zeros(1, 3, *teacher.size)).shape[-1]
    if answered != len(class_names):
        raise InputError(
            f"The teacher '{title}' knows {answered} classes and the data has {len(class_names)}; "
            "give a teacher that was trained on the same classes."
        )
    return teacher


def _channels(values: Sequence[float]) -> Tensor:
    return torch.tensor(tuple(values), dtype=torch.float32).view(1, -1, 1, 1)
