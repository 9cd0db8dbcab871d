"""The engines: what is known of each without importing it, what each one's module provides, and which is here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from refold.errors import InputError
from refold.export.request import Request

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

Session: TypeAlias = "Callable[..., list[Tensor]]"


@dataclass(frozen=True)
class Format:
    """What is known of an engine without importing it.

    ``module`` has the functions of `Engine`; ``needs`` are the modules it imports, ``install`` what to give to
    pip for them, ``otherwise`` what to do where that is not possible. ``free_shapes`` says that its files take images
    of any size and may give any number of boxes, ``ends_its_process`` that the engine may end the process that it runs
    in: on a damaged file, or beside other libraries.
    """

    title: str
    module: str
    suffix: str
    needs: tuple[str, ...]
    install: str
    is_folder: bool = False
    otherwise: str = ""
    free_shapes: bool = False
    ends_its_process: bool = False


# The name on the left is what the user types.
FORMATS = {
    "onnxruntime": Format(
        "ONNX Runtime", "refold.export.onnxruntime", ".onnx", ("onnxruntime",), "refold", free_shapes=True
    ),
    "openvino": Format(
        "OpenVINO", "refold.export.openvino", ".xml", ("openvino",), "'refold[openvino]'", free_shapes=True
    ),
    "ncnn": Format(
        "ncnn", "refold.export.ncnn", ".param", ("ncnn", "pnnx"), "'refold[ncnn]'", ends_its_process=True
    ),
    "aotinductor": Format("AOTInductor", "refold.export.aotinductor", ".pt2", ("torch",), "refold"),
    "mnn": Format("MNN", "refold.export.mnn", ".mnn", ("MNN",), "'refold[mnn]'"),
    "litert": Format(
        "LiteRT",
        "refold.export.litert",
        ".tflite",
        ("litert_torch", "ai_edge_litert", "ai_edge_quantizer"),
        "'refold[litert]'",
    ),
    "executorch": Format(
        "ExecuTorch",
        "refold.export.executorch",
        ".pte",
        ("executorch",),
        "'refold[executorch]'",
        ends_its_process=True,
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
    Where a format does not tell parameters or multiply-accumulates, they are None, and so are the latter in a file for
    images of any size.
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

    def write(self, model: nn.Module, request: Request) -> Sequence[str]:
        """Write an eval-mode model on the CPU to the request's path, and files that belong to it beside it.

        Returns sentences that the user should know about the file. Raises `InputError` where the conversion fails.
        """

    def contents(self, path: Path) -> Contents:
        """Count what a written file holds."""

    def read_metadata(self, path: Path) -> dict[str, str]:
        """What `write` put into a file or beside it; empty for a file of another origin."""

    def open(self, path: Path, *, threads: int | None = None) -> Session:
        """Load a written file for running: the session maps tensors to the list of output tensors.

        Raises `CannotRun` where this machine cannot run such files and `InputError` where the file is at fault.
        """


def installed_engines() -> list[str]:
    """The names of the engines whose packages are installed."""
    return [name for name, form in FORMATS.items() if not _missing(form)]


def engine_of(path: Path) -> str | None:
    """The name of the engine whose files end as the path does; None where there is none."""
    return next((name for name, form in FORMATS.items() if path.name.endswith(form.suffix)), None)


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
