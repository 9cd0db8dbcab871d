"""How a network is run: in which engine and precision, and for PyTorch on which device and in which form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import product
from typing import Final, Literal, TypeAlias, TypeVar, get_args

import torch

from refold.bench.worker import PYTORCH
from refold.errors import InputError
from refold.export import FORMATS, Precision, installed_engines
from refold.export.request import FLOAT32, PRECISIONS

Stored: TypeAlias = Precision | Literal["int8"]
Measured: TypeAlias = Stored | Literal["tf32"]
Device = Literal["cpu", "cuda"]
Execution = Literal["eager", "compiled", "graphs"]
MemoryFormat = Literal["channels_first", "channels_last"]

INT8: Final = "int8"
TF32: Final = "tf32"
CPU: Final = "cpu"
CUDA: Final = "cuda"
EAGER: Final = "eager"
GRAPHS: Final = "graphs"
CHANNELS_FIRST: Final = "channels_first"
Name = TypeVar("Name", bound=str)
_MEASURED: tuple[Measured, ...] = (*PRECISIONS, INT8, TF32)
_DEVICES: tuple[Device, ...] = get_args(Device)
_EXECUTIONS: tuple[Execution, ...] = get_args(Execution)
_MEMORY_FORMATS: tuple[MemoryFormat, ...] = get_args(MemoryFormat)


@dataclass(frozen=True)
class Way:
    """An engine, the precision in which it computes, and for PyTorch device, execution and memory format."""

    engine: str
    precision: Measured = FLOAT32
    device: Device = CPU
    execution: Execution = EAGER
    memory_format: MemoryFormat = CHANNELS_FIRST

    def __str__(self) -> str:
        precision = "" if self.precision == FLOAT32 else self.precision
        return ", ".join(part for part in (self.engine, precision, self.variant) if part)

    @property
    def variant(self) -> str:
        """Device, execution and memory format, those that are not the usual; empty where all are."""
        usual = {each.name: each.default for each in fields(self)}
        chosen = {name: getattr(self, name) for name in ("device", "execution", "memory_format")}
        return ", ".join(value for name, value in chosen.items() if value != usual[name])

    @property
    def of_pytorch(self) -> dict[str, str]:
        """What a worker is told of a way of PyTorch's; nothing for another engine, whose file says all."""
        return (
            {key: value for key, value in vars(self).items() if key != "engine"}
            if self.engine == PYTORCH
            else {}
        )

    @property
    def stored(self) -> Stored:
        """The precision of the file: TF32 is how float32 numbers are multiplied."""
        return FLOAT32 if self.precision == TF32 else self.precision


def ways(
    engine: str | Sequence[str],
    precisions: Sequence[str] = (FLOAT32,),
    device: str = CPU,
    executions: Sequence[str] = (EAGER,),
    memory_formats: Sequence[str] = (CHANNELS_FIRST,),
) -> tuple[Way, ...]:
    """Every combination, engine by engine.

    Raises `InputError` for an unknown name, for what the device cannot do, for a device that is not here, and where
    another engine than PyTorch is to run in one of PyTorch's ways.
    """
    engines = engine_names(engine)
    # None is as wrong as an unknown one.
    wanted = [_chosen("precision", name, _MEASURED) for name in precisions or [""]]
    place = _chosen("device", device, _DEVICES)
    forms = [_chosen("execution", name, _EXECUTIONS) for name in executions or [""]]
    formats = [_chosen("memory format", name, _MEMORY_FORMATS) for name in memory_formats or [""]]
    others = [name for name in engines if name != PYTORCH]
    if others and (place, forms, formats) != (CPU, [EAGER], [CHANNELS_FIRST]):
        raise InputError(
            f"Device, execution and memory format are PyTorch's, and {others[0]} has none of them; choose the engine "
            "pytorch alone."
        )
    if place == CPU and GRAPHS in forms:
        raise InputError("There are no CUDA graphs on the cpu; choose the device cuda, or eager or compiled.")
    if place == CPU and TF32 in wanted:
        raise InputError("TF32 is arithmetic of NVIDIA cards; choose the device cuda, or float32.")
    if place == CUDA and not torch.cuda.is_available():
        raise InputError(
            "PyTorch finds no CUDA device here; choose the device cpu, or run this where there is an NVIDIA card."
        )
    found = (
        Way(name, precision, place, form, layout)
        for name, precision, layout, form in product(engines, wanted, formats, forms)
    )
    return tuple(dict.fromkeys(found))


def _chosen(kind: str, name: str, known: Sequence[Name]) -> Name:
    for each in known:
        if each == name:
            return each
    raise InputError(f"There is no {kind} '{name}'; choose among: {', '.join(known)}.")


def engine_names(engine: str | Sequence[str]) -> list[str]:
    """The engines to measure: those named, or for "all" PyTorch and every engine that is installed.

    Raises `InputError` for an unknown name.
    """
    known = [PYTORCH, *FORMATS]
    named = [engine] if isinstance(engine, str) else list(engine)
    if named == ["all"]:
        return [PYTORCH, *installed_engines()]
    unknown = next((name for name in named if name not in known), None)
    if unknown is not None or not named:
        raise InputError(f"There is no engine '{unknown or ''}'; choose among: {', '.join(known)}, or all.")
    return list(dict.fromkeys(named))
