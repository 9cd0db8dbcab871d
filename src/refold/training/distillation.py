"""The losses of learning from a teacher: GhostNetV3's eq. 3 and 4, and losses of features."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refold.errors import InputError
from refold.models.backbone import Backbone


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


def distillation_loss(loss: Tensor, divergence: Tensor, alpha: float) -> Tensor:
    """(1 − α) loss + α divergence (GhostNetV3, eq. 3)."""
    return (1 - alpha) * loss + alpha * divergence


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

    Of detectors and segmenters they are the last maps of the backbones. Where the two widths differ, a linear
    ``projection`` of the student's features learns along; it is no part of the student. ``attach`` comes once the
    networks are those that train; then each call gives the loss of the last batch that both have seen. Raises
    `InputError` where a network has no linear classifier to look before.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, *, feature_weight: float, relation_weight: float
    ) -> None:
        super().__init__()
        self.feature_weight = feature_weight
        self.relation_weight = relation_weight
        widths = [_feature_width(net) for net in (student, teacher)]
        same = widths[0] == widths[1] or not feature_weight
        self.projection = nn.Identity() if same else nn.Linear(widths[0], widths[1], bias=False)
        self._seen: dict[str, Tensor] = {}

    def attach(self, student: nn.Module, teacher: nn.Module) -> None:
        """Look at what passes into the classifiers, or out of the backbones, from now on."""
        for name, net in (("student", student), ("teacher", teacher)):
            backbone = getattr(net, "backbone", None)
            if isinstance(backbone, Backbone):
                backbone.register_forward_hook(partial(self._look_at_maps, name))
            else:
                _linear_classifier(net).register_forward_pre_hook(partial(self._look, name))

    def _look(self, name: str, classifier: nn.Module, inputs: tuple[Tensor]) -> None:
        self._seen[name] = inputs[0]

    def _look_at_maps(self, name: str, backbone: nn.Module, inputs: Any, maps: list[Tensor]) -> None:
        # A row of channels for each place; those of all images together are the features of the batch.
        self._seen[name] = maps[-1].flatten(2).transpose(1, 2)

    def forward(self) -> Tensor:
        student, teacher = self._seen.pop("student"), self._seen.pop("teacher")
        loss = student.new_zeros((), dtype=torch.float32)
        if self.feature_weight:
            loss = loss + self.feature_weight * feature_loss(self.projection(student), teacher)
        if self.relation_weight:
            # Of maps, the mean of an image.
            means = (value.mean(1) if value.dim() == 3 else value for value in (student, teacher))
            loss = loss + self.relation_weight * relation_loss(*means)
        return loss


def _feature_width(net: nn.Module) -> int:
    backbone = getattr(net, "backbone", None)
    return backbone.channels[-1] if isinstance(backbone, Backbone) else _linear_classifier(net).in_features


def _linear_classifier(net: nn.Module) -> nn.Linear:
    get_classifier: Any = getattr(net, "get_classifier", None)
    classifier = None if get_classifier is None else get_classifier()
    if not isinstance(classifier, nn.Linear):
        raise InputError(
            f"{type(net).__name__} has no linear layer as its classifier, so its features are not known; "
            "leave feature_weight and relation_weight at 0."
        )
    return classifier
