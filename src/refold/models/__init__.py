"""The networks of the papers: one file a family, channel tables as data, one registry."""

from refold.models.classifier import ImageClassifier
from refold.models.loading import LoadedCheckpoint, load_checkpoint
from refold.models.registry import create_model, default_cfgs, list_models

__all__ = [
    "ImageClassifier",
    "LoadedCheckpoint",
    "create_model",
    "default_cfgs",
    "list_models",
    "load_checkpoint",
]
