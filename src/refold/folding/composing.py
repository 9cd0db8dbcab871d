"""Write values of a graph as convolutions of earlier values: their structure alone, or with the numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, fx

from refold.algebra import (
    Convolution,
    concatenate,
    constant_padding,
    identity,
    scale_outputs,
    series,
    side_by_side,
    slice_outputs,
    sum_branches,
    widen_inputs,
    with_spatial_axes,
)
from refold.errors import NotFoldable
from refold.recording.linear import (
    ConstantBorder,
    Flattened,
    Linear,
    Map,
    Moved,
    Restored,
    Same,
    Slice,
    Sum,
    inputs_of,
)


@dataclass(frozen=True)
class ComposedValue:
    """A value as a convolution of the channels of its source from `first` on; None is the identity of all of them."""

    convolution: Convolution | None
    first: int = 0
    flattened: bool = False
    """Whether the axes before the channels, which are last, are one."""
    moved: Literal["last", "first", "swapped"] | None = None
    """Whether the channels were moved from where the source has them: to the end, or behind the batch."""


class Composer:
    """Composes the linear operators of one graph, given in the order they run, with the shapes of all values."""

    def __init__(self, operators: dict[fx.Node, Linear], shapes: Mapping[fx.Node, tuple[int, ...]]) -> None:
        self._operators = operators
        self._shapes = shapes
        self._order = {node: index for index, node in enumerate(operators)}
        self._structures: dict[tuple[fx.Node, fx.Node], ComposedValue | NotFoldable] = {}

    def add(self, node: fx.Node, meaning: Linear) -> None:
        """Take in one more operator, which stands behind all others."""
        self._operators[node] = meaning
        self._order[node] = len(self._order)

    def between(self, source: fx.Node, root: fx.Node) -> list[fx.Node]:
        """The operators through which `root` depends on `source`, in the order they run."""
        found, waiting = {root}, [root]
        while waiting:
            for node in inputs_of(self._operators[waiting.pop()]):
                if node is not source and node not in found:
                    found.add(node)
                    waiting.append(node)
        return sorted(found, key=self._order.__getitem__)

    def structure(self, node: fx.Node, source: fx.Node) -> ComposedValue:
        """`node` as a convolution of `source`, without its numbers. Raises NotFoldable where there is no exact one."""
        key = (node, source)
        if key not in self._structures:
            try:
                self._structures[key] = self._structure(node, source)
            except NotFoldable as refusal:
                self._structures[key] = refusal
        found = self._structures[key]
        if isinstance(found, NotFoldable):
            raise found
        return found

    def _structure(self, node: fx.Node, source: fx.Node) -> ComposedValue:
        if node is source:
            return ComposedValue(None)
        operator = self._operators.get(node)
        if operator is None:
            raise NotFoldable("it is restored to the axes of a value that is computed in another way")
        inner = [self.structure(value, source) for value in inputs_of(operator)]
        return self._compose(operator, source, inner, torch.device("meta"))

    def convolution(self, root: fx.Node, source: fx.Node) -> Convolution:
        """`root` as a convolution of `source`, in float64; a branch is freed as soon as it has been read."""
        order = self.between(source, root)
        readers = Counter(value for node in order for value in inputs_of(self._operators[node]))
        branches = {source: ComposedValue(None)}
        for node in order:
            operator = self._operators[node]
            inner = [branches[value] for value in inputs_of(operator)]
            branches[node] = self._compose(operator, source, inner, torch.device("cpu"))
            readers.subtract(inputs_of(operator))
            for value in inputs_of(operator):
                if not readers[value]:
                    branches.pop(value, None)
        convolution = branches[root].convolution
        assert convolution is not None
        return convolution

    def _compose(
        self, operator: Linear, source: fx.Node, inner: list[ComposedValue], device: torch.device
    ) -> ComposedValue:
        """What an operator makes of its inputs, all of them given as convolutions of `source`."""
        if isinstance(operator, Same):
            return inner[0]
        if isinstance(operator, Moved):
            return self._moved(inner[0], operator, source)
        if isinstance(operator, Map):
            convolution = operator.structure if device.type == "meta" else operator.build(device)
            if inner[0].moved is not None:
                convolution = with_spatial_axes(
                    convolution, self._axes(inner[0], source, convolution.spatial_axes)
                )
            if inner[0].convolution is not None:
                convolution = series(inner[0].convolution, convolution)
            return replace(inner[0], convolution=convolution)
        like = torch.empty(0, dtype=torch.float64, device=device)
        if isinstance(operator, (Flattened, Restored)):
            return self._reshaped(inner[0], operator, source, like)
        if len({(branch.flattened, branch.moved) for branch in inner}) > 1:
            raise NotFoldable("only some of its inputs are flattened or have their channels moved")
        if isinstance(operator, ConstantBorder):
            if inner[0].moved or inner[0].flattened:
                raise NotFoldable("its border is put around moved channels")
            whole = self._explicit(inner[0], source, len(operator.padding), like)
            return replace(inner[0], convolution=constant_padding(whole, operator.padding, operator.value))
        if isinstance(operator, Sum):
            return self._sum(inner, operator, source, like)
        axes = self._axes(inner[0], source, operator.spatial_axes)
        known = [self._explicit(branch, source, axes, like) for branch in inner]
        if isinstance(operator, Slice):
            convolution, first = slice_outputs(known[0], operator.start, operator.stop)
            return replace(inner[0], convolution=convolution, first=inner[0].first + first)
        convolution, first = _concatenated(known, [branch.first for branch in inner])
        return replace(inner[0], convolution=convolution, first=first)

    def _reshaped(
        self, inner: ComposedValue, operator: Flattened | Restored, source: fx.Node, like: Tensor
    ) -> ComposedValue:
        """Only the axes before the channels change; they come back as the source has them, or not at all."""
        convolution = self._explicit(inner, source, 0, like)
        if inner.flattened is isinstance(operator, Flattened):
            raise NotFoldable("its axes are reshaped in another way")
        if isinstance(operator, Restored):
            model = self.structure(operator.like, source)
            if model.flattened or (model.convolution is not None and model.convolution.spatial_axes):
                raise NotFoldable("its axes are restored to those of another value")
        return replace(inner, convolution=convolution, flattened=isinstance(operator, Flattened))

    def _moved(self, inner: ComposedValue, operator: Moved, source: fx.Node) -> ComposedValue:
        if operator.last is None:
            way: Literal["last", "first", "swapped"] = "swapped"
        else:
            way = "last" if operator.last else "first"
        if inner.flattened or inner.moved == way != "swapped":
            raise NotFoldable("its axes are moved in another way")
        if inner.moved is not None:
            return replace(inner, moved=None)
        if inner.convolution is not None:
            known: Literal["last", "first"] = "last" if inner.convolution.spatial_axes else "first"
            if way not in (known, "swapped"):
                raise NotFoldable("the channels of its inputs lie along different axes")
            way = known
        return replace(inner, moved=way)

    def _axes(self, branch: ComposedValue, source: fx.Node, own: int) -> int:
        """The spatial axes, in the layout of the source, of a convolution that has `own` in the layout of `branch`."""
        if branch.moved is None:
            return own
        last = own == 0 if branch.moved == "swapped" else branch.moved == "last"
        axes = len(self._shapes[source]) - 2 if last else 0
        if (own > 0) is (axes > 0):
            raise NotFoldable("the channels of its inputs lie along different axes")
        return axes

    def _explicit(self, branch: ComposedValue, source: fx.Node, axes: int, like: Tensor) -> Convolution:
        """The branch with its identity written out, in a layout with so many spatial axes."""
        if branch.convolution is None:
            shape = self._shapes[source]
            return identity(shape[1] if axes else shape[-1], axes, like)
        if branch.convolution.spatial_axes != axes:
            raise NotFoldable("the channels of its inputs lie along different axes")
        return branch.convolution

    def _sum(self, inner: list[ComposedValue], operator: Sum, source: fx.Node, like: Tensor) -> ComposedValue:
        layouts = {b.convolution.spatial_axes for b in inner if b.convolution is not None}
        axes = layouts.pop() if layouts else self._axes_of_identity(inner[0], source)
        if not 0 <= axes <= 3:
            raise NotFoldable("its input has more axes than a convolution")
        known = [self._explicit(branch, source, axes, like) for branch in inner]
        scaled = [
            c if f == 1.0 else scale_outputs(c, c.weight.new_full((c.out_channels,), f), None)
            for c, f in zip(known, operator.factors, strict=True)
        ]
        aligned, first = _common_inputs(scaled, [branch.first for branch in inner])
        merged = sum_branches(aligned) if len(aligned) > 1 else aligned[0]
        return replace(inner[0], convolution=merged, first=first)

    def _axes_of_identity(self, branch: ComposedValue, source: fx.Node) -> int:
        return 0 if branch.moved == "first" else len(self._shapes[source]) - 2


def _common_inputs(convolutions: list[Convolution], firsts: list[int]) -> tuple[list[Convolution], int]:
    """The same functions, all reading the smallest range of channels that holds those of each, and its start."""
    start = min(firsts)
    stop = max(f + c.in_channels for f, c in zip(firsts, convolutions, strict=True))
    return [
        widen_inputs(c, f - start, stop - start) for f, c in zip(firsts, convolutions, strict=True)
    ], start


def _concatenated(convolutions: list[Convolution], firsts: list[int]) -> tuple[Convolution, int]:
    ends = [f + c.in_channels for f, c in zip(firsts, convolutions, strict=True)]
    if firsts[1:] == ends[:-1]:
        return side_by_side(convolutions), firsts[0]
    aligned, first = _common_inputs(convolutions, firsts)
    return concatenate(aligned), first
