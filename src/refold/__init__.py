"""Convolutional networks that train with many branches and run with one."""

import sys
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from refold.errors import (
    CheckpointError,
    InputError,
    NotEquivalent,
    NotFoldable,
    RefoldError,
    UnknownModel,
    naming_packages,
)

# Imported at once, so that the name means the function: importing the package `refold.export` later would put
# the package in its place.
from refold.export import export

if TYPE_CHECKING:
    from refold.bench import benchmark
    from refold.bench.objective import Latency
    from refold.bench.papers import list_papers, paper
    from refold.boxes import detections
    from refold.checkpoints import load, save
    from refold.entrance import fold, verify
    from refold.folding import FoldReport, Proof
    from refold.hub import push
    from refold.models import create_model, list_models, load_checkpoint
    from refold.quantization import QuantizationConfig, QuantizationReport, quantize
    from refold.training.calibration import read_images
    from refold.unfolding import UnfoldReport, original_state_dict, unfold

__all__ = [
    "CheckpointError",
    "FoldReport",
    "InputError",
    "Latency",
    "NotEquivalent",
    "NotFoldable",
    "Proof",
    "QuantizationConfig",
    "QuantizationReport",
    "RefoldError",
    "UnfoldReport",
    "UnknownModel",
    "benchmark",
    "create_model",
    "detections",
    "export",
    "fold",
    "list_models",
    "list_papers",
    "load",
    "load_checkpoint",
    "original_state_dict",
    "paper",
    "push",
    "quantize",
    "read_images",
    "save",
    "unfold",
    "verify",
]

# Loaded when first used: torch and timm take seconds to import, and `refold --help` needs neither.
_HOME = {
    "benchmark": "refold.bench.runner",
    "detections": "refold.boxes",
    **dict.fromkeys(("list_papers", "paper"), "refold.bench.papers"),
    **dict.fromkeys(("load", "save"), "refold.checkpoints"),
    "Latency": "refold.bench.objective",
    "push": "refold.hub",
    **dict.fromkeys(("fold", "verify"), "refold.entrance"),
    **dict.fromkeys(("FoldReport", "Proof"), "refold.folding"),
    **dict.fromkeys(("QuantizationConfig", "QuantizationReport", "quantize"), "refold.quantization"),
    "read_images": "refold.training.calibration",
    **dict.fromkeys(("create_model", "list_models", "load_checkpoint"), "refold.models"),
    **dict.fromkeys(("UnfoldReport", "original_state_dict", "unfold"), "refold.unfolding"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("refold")
    if name not in _HOME:
        raise AttributeError(f"module 'refold' has no attribute '{name}'")
    with naming_packages(f"refold.{name}"):
        value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


# Whoever has timm at hand finds refold's networks in it by name; who has not waits for neither.
if "timm" in sys.modules:
    import_module("refold.models")
