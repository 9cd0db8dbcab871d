"""Exporting networks to inference engines: one file an engine, every export checked by running it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refold.errors import naming_packages
from refold.export.engines import FORMATS, CannotRun, Contents, Engine, Format, get_engine, installed_engines
from refold.export.report import ExportReport
from refold.export.request import FLOAT16, FLOAT32, Normalization, Precision, Request

if TYPE_CHECKING:
    from torch import nn

    from refold.files import PathLike

__all__ = [
    "FORMATS",
    "CannotRun",
    "Contents",
    "Engine",
    "ExportReport",
    "Format",
    "Normalization",
    "Precision",
    "Request",
    "export",
    "get_engine",
    "installed_engines",
]


def export(
    model: nn.Module,
    path: PathLike,
    example_input: Any,
    *,
    engine: str = "onnxruntime",
    dynamic_batch: bool = True,
    half: bool = False,
    normalize: bool | Normalization = False,
    softmax: bool = False,
    class_names: Sequence[str] | None = None,
    detections: bool = False,
    dynamic_size: bool = False,
    fold: bool = True,
    tolerance: float | None = None,
) -> ExportReport:
    """Write the eval-mode function of a model for an inference engine, and check the file by running it.

    ``example_input`` is what `refold.fold` takes, batch first; what of it is no tensor is fixed in the file.
    A model in training form is folded (and proved) first unless ``fold`` is False; the argument is untouched.
    ``half`` asks for float16 weights, and float16 arithmetic where the engine has it; inputs and outputs stay as they
    are.
    ``normalize`` bakes in (x - mean) / std, True meaning the mean and std that the model's checkpoint or
    ``pretrained_cfg`` names, and ``softmax`` a softmax over axis 1. With ``detections`` a detector's file gives
    ``boxes``, ``scores``, ``labels``, of Mask R-CNN ``masks``, and ``image_index`` in place of its maps, as
    `refold.detections` does; give such a module as model for other thresholds. ``dynamic_size`` leaves height and
    width of the images free.
    The file carries class names (those of the checkpoint unless given) and preprocessing where its format has room
    for them.

    The file is run in the engine on the example's own and on random inputs, with ``dynamic_batch`` at several
    batch sizes, and may differ from PyTorch by ``tolerance`` times the spread of the output (1e-3 for float32,
    5e-2 for half precision). Where the engine cannot run on this machine, the report says so in its notes.

    Raises `NotEquivalent`, with the report as ``proof``, where the engine's outputs differ by more, and
    `InputError` where the engine is not installed, the model cannot be converted or ``path`` not written; no
    file is left then.

    Examples:
        >>> import torch, refold
        >>> net = refold.create_model("repghostnet_050", num_classes=2)
        >>> report = refold.export(net, "net.onnx", torch.randn(1, 3, 64, 64), softmax=True)
        >>> report.form, report.relative_difference < 1e-3
        ('plain', True)
    """
    with naming_packages("refold.export"):
        from refold.boxes import Detections
        from refold.boxes import detections as with_boxes
        from refold.export.checked import export_checked
        from refold.export.preparing import called_with_tensors

    if detections and not isinstance(model, Detections):
        model = with_boxes(model)
    outputs = model.outputs if isinstance(model, Detections) else ()
    model, inputs = called_with_tensors(model, example_input)
    precision: Precision = FLOAT16 if half else FLOAT32
    return export_checked(
        model,
        Request(inputs, Path(path), dynamic_batch, dynamic_size, outputs, precision),
        engine=engine,
        normalize=normalize,
        softmax=softmax,
        class_names=class_names,
        folding=fold,
        tolerance=tolerance,
    )
