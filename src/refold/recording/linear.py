"""What an operator of a graph can be to the folder: a linear map of one input, a sum, a concatenation, a slice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from refold.algebra import Convolution, Padding
from refold.errors import NotFoldable
from refold.recording.constants import Constants
from refold.recording.recording import Recording, name_of

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

    @cached_property
    def structure(self) -> Convolution:
        """The convolution without its numbers, on the meta device."""
        return self.build(torch.device("meta"))


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


@dataclass(frozen=True)
class Moved:
    """Its input with the channels moved from behind the batch to the end (`last`), or back; None where there are
    three axes, two of which change places."""

    input: fx.Node
    last: bool | None


@dataclass(frozen=True)
class ConstantBorder:
    """Its input with a border, which holds one value (`[channels]`) everywhere."""

    input: fx.Node
    padding: Padding
    value: Tensor


Linear = Same | Map | Sum | Concatenation | Slice | Flattened | Restored | Moved | ConstantBorder


def inputs_of(meaning: Linear) -> tuple[fx.Node, ...]:
    """The values that the operator is linear in."""
    return meaning.inputs if isinstance(meaning, (Sum, Concatenation)) else (meaning.input,)


@dataclass(frozen=True)
class Use:
    """One use of an operator, with everything that is needed to say what it means."""

    node: fx.Node
    constants: Constants

    @property
    def recording(self) -> Recording:
        """The recording that the operator belongs to."""
        return self.constants.recording

    @property
    def module(self) -> Any:
        """The layer that runs, None for a function or method."""
        return self.recording.attribute(str(self.node.target)) if self.node.op == "call_module" else None

    @property
    def layer(self) -> nn.Module:
        """The layer that runs, where it is one."""
        assert self.module is not None
        return self.module  # type: ignore[no-any-return]  # whatever the path names

    @property
    def name(self) -> str:
        """The name under which the registry knows the function or method that runs, empty for a layer."""
        return "" if self.node.op == "call_module" else name_of(self.node.target)

    @property
    def is_functional(self) -> bool:
        """Whether it is a function of `torch.nn.functional`, which orders arguments in its own way."""
        return str(getattr(self.node.target, "__module__", "")) == "torch.nn.functional"

    @property
    def source(self) -> fx.Node:
        """The first tensor that it reads."""
        if not self.node.all_input_nodes:
            raise NotFoldable("it reads nothing")
        return self.node.all_input_nodes[0]

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument of the call by its position or name; tensors as nodes, numbers that hold for any size as such."""
        given = self.node.args
        value = given[position] if position < len(given) else self.node.kwargs.get(name, default)
        return fx.node.map_aggregate(value, self._number)

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """The shape of a value."""
        if node not in self.recording.shapes:
            raise NotFoldable("its input is not one tensor")
        return self.recording.shapes[node]

    def varies(self, value: Any) -> bool:
        """Whether a value depends on the input."""
        return isinstance(value, fx.Node) and value in self.recording.varying

    def constant(self, value: Any) -> Tensor | None:
        """The value of a constant argument, float64 on the CPU. Raises NotFoldable where it depends on the input."""
        if not isinstance(value, fx.Node):
            return None if value is None else torch.as_tensor(value, dtype=torch.float64)
        return self.constants.value(value)

    def _number(self, value: Any) -> Any:
        return self.recording.steady.get(value, value) if isinstance(value, fx.Node) else value
