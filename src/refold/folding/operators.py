"""What an operator of a graph can be to the folder: a linear map of one input, a sum, a concatenation, a slice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from refold.algebra import Convolution
from refold.errors import NotFoldable
from refold.folding.constants import Constants
from refold.folding.tracing import Unit

Build = Callable[[torch.device], Convolution]


@dataclass(frozen=True)
class Same:
    """Passes its input on: identity, dropout in evaluation mode."""

    input: fx.Node


@dataclass(frozen=True)
class Map:
    """One convolution of its input. `build` makes it, float64, on the CPU or, for its shape alone, on meta."""

    input: fx.Node
    build: Build
    multiplies: bool
    """Whether it runs as a convolution or matrix product, and not as a cheap element-wise operator."""


@dataclass(frozen=True)
class Sum:
    """The sum of its inputs, each times a number."""

    inputs: tuple[fx.Node, ...]
    factors: tuple[float, ...]


@dataclass(frozen=True)
class Concatenation:
    """Its inputs, one after the other along the channels."""

    inputs: tuple[fx.Node, ...]
    spatial_axes: int


@dataclass(frozen=True)
class Slice:
    """The channels `start` to `stop` of its input."""

    input: fx.Node
    start: int
    stop: int
    spatial_axes: int


@dataclass(frozen=True)
class Flattened:
    """Its input with all axes before the channels, which are last, made one."""

    input: fx.Node


@dataclass(frozen=True)
class Restored:
    """Its flattened input with the axes that `like` has."""

    input: fx.Node
    like: fx.Node


Linear = Same | Map | Sum | Concatenation | Slice | Flattened | Restored


def inputs_of(operator: Linear) -> tuple[fx.Node, ...]:
    """The values that the operator is linear in."""
    return operator.inputs if isinstance(operator, (Sum, Concatenation)) else (operator.input,)


@dataclass(frozen=True)
class Call:
    """One operator of a unit, with everything that is needed to recognise it."""

    node: fx.Node
    constants: Constants

    @property
    def unit(self) -> Unit:
        """The unit that the operator belongs to."""
        return self.constants.unit

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument of the call by its position or name; constant tensors as nodes."""
        if position < len(self.node.args):
            return self.node.args[position]
        return self.node.kwargs.get(name, default)

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        if node not in self.unit.shapes:
            raise NotFoldable("its input is not one tensor")
        return self.unit.shapes[node]

    def constant(self, value: Any) -> Tensor | None:
        """The value of a constant argument, float64 on the CPU. Raises NotFoldable where it depends on the input."""
        if not isinstance(value, fx.Node):
            return None if value is None else torch.as_tensor(value, dtype=torch.float64)
        return self.constants.value(value)
