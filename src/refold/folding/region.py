"""A region that becomes one convolution, and what a choice costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce

from torch import fx

from refold.algebra import Convolution
from refold.recording.linear import Linear

Price = tuple[int, int, int]
"""Multiply-accumulates, weights, operators: what a choice costs, in the order that decides."""
NOTHING: Price = (0, 0, 0)


@dataclass(frozen=True)
class Region:
    """The operators between `source` and `root` that together are one convolution of `source`."""

    source: fx.Node
    root: fx.Node
    operators: dict[fx.Node, Linear]
    """In the order they run, `root` the last."""
    nodes: frozenset[fx.Node]
    """The operators and the helpers between them, such as the call of `chunk` behind its items."""
    structure: Convolution
    """The convolution without its numbers, on the meta device."""
    convolution: Callable[[], Convolution]
    """Computes it in float64 on the CPU; anew each time, for all of them together would outweigh the model."""
    rescales: bool = False
    """Whether `source` is a convolution layer of another kind, whose outputs `convolution` only scales and shifts."""
    rest: tuple[tuple[fx.Node, float], ...] = ()
    """Values, with factors, that are added to the convolution behind it: `root` is the sum."""


def plus(one: Price, other: Price) -> Price:
    return one[0] + other[0], one[1] + other[1], one[2] + other[2]


def total(prices: Iterable[Price]) -> Price:
    return reduce(plus, prices, NOTHING)
