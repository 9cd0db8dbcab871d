"""The networks of the papers: one file a family, channel tables as data, one registry."""

from refold.models.cghost_conversion import convolutions_to_ghost
from refold.models.classifier import ImageClassifier
from refold.models.conversion import (
    concatenation_to_addition,
    linear_to_pointwise,
    pointwise_to_linear,
)
from refold.models.gghost_conversion import stages_to_gghost
from refold.models.loading import LoadedCheckpoint, load_checkpoint
from refold.models.registry import create_model, default_cfgs, list_models

__all__ = [
    "ImageClassifier",
    "LoadedCheckpoint",
    "concatenation_to_addition",
    "convolutions_to_ghost",
    "create_model",
    "default_cfgs",
    "linear_to_pointwise",
    "list_models",
    "load_checkpoint",
    "pointwise_to_linear",
    "stages_to_gghost",
]
