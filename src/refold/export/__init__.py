"""Exporting networks to inference engines: one file an engine, every export checked by running it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from refold.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from refold.files import PathLike

    Arguments = tuple[Tensor, ...]
    Session = Callable[..., list[Tensor]]

# An engine is a module here with the functions of `Engine`; the name on the left is what the user types.
ENGINES = {"onnxruntime": "refold.export.onnxruntime"}


@dataclass(frozen=True)
class Contents:
    """What a file holds: parameters, multiply-accumulates of one example, and operators by kind.

    Constants of shapes and axes are no parameters; operators that only relabel a tensor are not counted.
    """

    parameters: int
    macs: int
    operators: dict[str, int]

    @property
    def operator_count(self) -> int:
        """All operators."""
        return sum(self.operators.values())


class Engine(Protocol):
    """What one engine's module provides."""

    def write(self, model: nn.Module, arguments: Arguments, path: Path, *, dynamic_batch: bool) -> None:
        """Write an eval-mode model on the CPU to ``path``; raises `InputError` where that fails."""

    def contents(self, path: Path) -> Contents:
        """Count what a written file holds."""

    def open(self, path: Path, *, threads: int | None = None) -> Session:
        """Load a written file for running: the session maps tensors to the list of output tensors."""


@dataclass(frozen=True)
class ExportReport:
    """What was written and how far its outputs are from PyTorch's.

    ``max_difference`` is the largest |Δ| over all outputs, inputs and ``batch_sizes`` tried; ``output_scale``
    the largest |output|, to compare it with.
    """

    path: str
    engine: str
    form: str
    bytes: int
    contents: Contents
    batch_sizes: list[int]
    max_difference: float
    output_scale: float

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON-able values."""
        return dataclasses.asdict(self)


def get_engine(name: str) -> Engine:
    """The module of an engine; raises `InputError` where there is none of that name."""
    if name not in ENGINES:
        raise InputError(f"There is no engine '{name}'; choose one of: {', '.join(sorted(ENGINES))}.")
    module: Any = import_module(ENGINES[name])
    engine: Engine = module
    return engine


def export(
    model: nn.Module,
    path: PathLike,
    example_input: Tensor | tuple[Tensor, ...],
    *,
    engine: str = "onnxruntime",
    dynamic_batch: bool = True,
    fold: bool = True,
    tolerance: float | None = None,
) -> ExportReport:
    """Write the eval-mode function of a model for an inference engine, and check the file by running it.

    ``example_input`` is a tensor, or the tuple of positional arguments, batch first. A model in training form
    is folded (and proved) first unless ``fold`` is False; the argument is untouched. The file is run in the
    engine on random and on the example's own inputs, with ``dynamic_batch`` at several batch sizes, and may
    differ from PyTorch by ``tolerance`` times the largest output (1e-4 for float32, 1e-2 for half precision).

    Raises `NotEquivalent` where the engine's outputs differ by more, `InputError` where the model cannot be
    converted or ``path`` not written; no file is left then.
    """
    from refold.export.checked import export_checked

    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    return export_checked(
        model,
        path,
        arguments,
        engine=engine,
        dynamic_batch=dynamic_batch,
        folding=fold,
        tolerance=tolerance,
    )
