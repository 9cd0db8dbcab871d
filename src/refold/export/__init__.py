"""Exporting networks to inference engines: one file an engine, every export checked by running it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

from refold.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from refold.export.comparing import Trial
    from refold.files import PathLike

    Arguments = tuple[Tensor, ...]
    Session = Callable[..., list[Tensor]]

# One value a channel each, in the units of the image: mean and standard deviation.
Normalization = tuple[Sequence[float], Sequence[float]]


@dataclass(frozen=True)
class Format:
    """What is known of an engine without importing it.

    ``module`` has the functions of `Engine`; ``needs`` are the modules it imports, ``install`` what to give to
    pip for them, ``otherwise`` what to do where that is not possible.
    """

    title: str
    module: str
    suffix: str
    needs: tuple[str, ...]
    install: str
    is_folder: bool = False
    otherwise: str = ""


# The name on the left is what the user types.
FORMATS = {
    "onnxruntime": Format("ONNX Runtime", "refold.export.onnxruntime", ".onnx", ("onnxruntime",), "refold"),
    "openvino": Format("OpenVINO", "refold.export.openvino", ".xml", ("openvino",), "'refold[openvino]'"),
    "ncnn": Format("ncnn", "refold.export.ncnn", ".param", ("ncnn", "pnnx"), "'refold[ncnn]'"),
    "aotinductor": Format("AOTInductor", "refold.export.aotinductor", ".pt2", ("torch",), "refold"),
    "mnn": Format("MNN", "refold.export.mnn", ".mnn", ("MNN",), "'refold[mnn]'"),
    "litert": Format(
        "LiteRT",
        "refold.export.litert",
        ".tflite",
        ("litert_torch", "ai_edge_litert", "ai_edge_quantizer"),
        "'refold[litert]' && pip install --no-deps litert-torch",
    ),
    "executorch": Format(
        "ExecuTorch", "refold.export.executorch", ".pte", ("executorch",), "'refold[executorch]'"
    ),
    "coreml": Format(
        "Core ML",
        "refold.export.coreml",
        ".mlpackage",
        ("coremltools",),
        "'refold[coreml]'",
        is_folder=True,
    ),
    "tensorrt": Format(
        "TensorRT",
        "refold.export.tensorrt",
        ".engine",
        ("tensorrt",),
        "'refold[tensorrt]'",
        otherwise="it needs an NVIDIA card; without one, export for onnxruntime and build with trtexec there",
    ),
}


@dataclass(frozen=True)
class Contents:
    """What a file holds: operators by kind, parameters, and multiply-accumulates of one example.

    Constants of shapes and axes are no parameters; operators that only relabel a tensor are not counted.
    Where a format does not tell parameters or multiply-accumulates, they are None.
    """

    parameters: int | None
    macs: int | None
    operators: dict[str, int]

    @property
    def operator_count(self) -> int:
        """All operators."""
        return sum(self.operators.values())


class CannotRun(InputError):
    """A file was converted, but its engine cannot run it on this machine; the message says why."""


class Engine(Protocol):
    """What one engine's module provides."""

    def write(
        self,
        model: nn.Module,
        arguments: Arguments,
        path: Path,
        *,
        dynamic_batch: bool,
        half: bool,
        metadata: Mapping[str, str],
    ) -> Sequence[str]:
        """Write an eval-mode model on the CPU to ``path``, and files that belong to it beside it.

        ``half`` asks for float16 inside; inputs and outputs keep their dtypes. Returns sentences that the user
        should know about the file. Raises `InputError` where the conversion fails.
        """

    def contents(self, path: Path) -> Contents:
        """Count what a written file holds."""

    def read_metadata(self, path: Path) -> dict[str, str]:
        """What `write` put into a file or beside it; empty for a file of another origin."""

    def open(self, path: Path, *, threads: int | None = None) -> Session:
        """Load a written file for running: the session maps tensors to the list of output tensors.

        Raises `CannotRun` where this machine cannot run such files and `InputError` where the file is at fault.
        """


@dataclass(frozen=True)
class ExportReport:
    """What was written and how far its outputs are from PyTorch's.

    ``trials`` has one line for each call that was compared, none where the engine cannot run here; ``spread``
    is the largest minus the smallest value of PyTorch's outputs, ``tolerance`` the part of it that was allowed
    as a difference. ``notes`` are sentences to know about the file.
    """

    path: str
    engine: str
    form: str
    half: bool
    bytes: int
    contents: Contents
    trials: list[Trial]
    spread: float
    tolerance: float
    notes: list[str]

    @property
    def checked(self) -> bool:
        """Whether the file was run and compared."""
        return bool(self.trials)

    @property
    def batch_sizes(self) -> list[int]:
        """The batch sizes that were compared."""
        return sorted({trial.batch_size for trial in self.trials})

    @property
    def max_difference(self) -> float:
        """The largest |Δ| of all trials; NaN where nothing was compared."""
        return _largest([trial.max_difference for trial in self.trials])

    @property
    def relative_difference(self) -> float:
        """The largest |Δ| of all trials in parts of its output's spread; NaN where nothing was compared."""
        return _largest([trial.relative_difference for trial in self.trials])

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON-able values; the differences are None where nothing was compared."""
        names = ("max_difference", "relative_difference")
        differences = {name: getattr(self, name) if self.checked else None for name in names}
        return (
            dataclasses.asdict(self)
            | {"checked": self.checked, "batch_sizes": self.batch_sizes}
            | differences
        )


def _largest(values: list[float]) -> float:
    return float("nan") if not values or any(value != value for value in values) else max(values)


def installed_engines() -> list[str]:
    """The names of the engines whose packages are installed."""
    return [name for name, form in FORMATS.items() if not _missing(form)]


def get_engine(name: str) -> Engine:
    """The module of an engine; raises `InputError` where there is none of that name or it is not installed."""
    if name not in FORMATS:
        raise InputError(f"There is no engine '{name}'; choose one of: {', '.join(sorted(FORMATS))}.")
    form = FORMATS[name]
    missing = _missing(form)
    if missing:
        raise InputError(
            f"{form.title} cannot be used: {' and '.join(missing)} is not installed; "
            f"install it with: pip install {form.install}{f' ({form.otherwise})' if form.otherwise else ''}"
        )
    module: Any = import_module(form.module)
    engine: Engine = module
    return engine


def _missing(form: Format) -> list[str]:
    return [package for package in form.needs if find_spec(package) is None]


def export(
    model: nn.Module,
    path: PathLike,
    example_input: Tensor | tuple[Tensor, ...],
    *,
    engine: str = "onnxruntime",
    dynamic_batch: bool = True,
    half: bool = False,
    normalize: bool | Normalization = False,
    softmax: bool = False,
    class_names: Sequence[str] | None = None,
    fold: bool = True,
    tolerance: float | None = None,
) -> ExportReport:
    """Write the eval-mode function of a model for an inference engine, and check the file by running it.

    ``example_input`` is a tensor, or the tuple of positional arguments, batch first. A model in training form
    is folded (and proved) first unless ``fold`` is False; the argument is untouched. ``half`` asks for float16
    weights, and float16 arithmetic where the engine has it; inputs and outputs stay as they are.
    ``normalize`` bakes in (x - mean) / std, True meaning the mean and std that the model's checkpoint or
    ``pretrained_cfg`` names, and ``softmax`` a softmax over axis 1. The file carries class names
    (those of the checkpoint unless given) and preprocessing where its format has room for them.

    The file is run in the engine on the example's own and on random inputs, with ``dynamic_batch`` at several
    batch sizes, and may differ from PyTorch by ``tolerance`` times the spread of the output (1e-3 for float32,
    5e-2 for half precision). Where the engine cannot run on this machine, the report says so in its notes.

    Raises `NotEquivalent`, with the report as ``proof``, where the engine's outputs differ by more, and
    `InputError` where the engine is not installed, the model cannot be converted or ``path`` not written; no
    file is left then.
    """
    from refold.export.checked import export_checked

    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    return export_checked(
        model,
        path,
        arguments,
        engine=engine,
        dynamic_batch=dynamic_batch,
        half=half,
        normalize=normalize,
        softmax=softmax,
        class_names=class_names,
        folding=fold,
        tolerance=tolerance,
    )
