"""What an engine is asked to write, besides the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, get_args

if TYPE_CHECKING:
    from torch import Tensor

# Strings, for naming them must not import torch, which takes seconds.
Inputs: TypeAlias = "tuple[Tensor, ...]"

# One value a channel each, in the units of the image: mean and standard deviation.
Normalization = tuple[Sequence[float], Sequence[float]]

Precision = Literal["float32", "float16"]
FLOAT32: Final = "float32"
FLOAT16: Final = "float16"
FreeAxis = Literal["batch", "height", "width"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True)
class Request:
    """A file to write: for these inputs, batch first, at ``path``, with ``metadata`` in it or beside it.

    With ``dynamic_batch`` it takes any batch size, or as many as its format can, with ``dynamic_size`` images of any
    height and width. ``outputs`` are their names where they are not numbered. ``precision`` is what it holds and,
    where the engine can, computes in; its inputs and outputs keep their dtypes.
    """

    inputs: Inputs
    path: Path
    dynamic_batch: bool = False
    dynamic_size: bool = False
    outputs: Sequence[str] = ()
    precision: Precision = FLOAT32
    metadata: Mapping[str, str] = field(default_factory=dict)

    def free_axes(self, tensor: Tensor) -> dict[int, FreeAxis]:
        """The axes of an input that may have any length, with their names."""
        free: dict[int, FreeAxis] = {0: "batch"} if self.dynamic_batch and tensor.dim() else {}
        if self.dynamic_size and tensor.dim() == 4:
            free |= {2: "height", 3: "width"}
        return free
