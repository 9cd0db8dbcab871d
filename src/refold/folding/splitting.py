"""Compute values in parts: W·cat(y, z) = W₁·y + W₂·z, and what treats each channel for itself stays before that."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from refold.algebra import Convolution
from refold.folding.channels import ChannelClass, Channels, Role
from refold.folding.layers import layer
from refold.folding.rewrite import FUNCTION, METHOD, MODULE, Applied, NewLayer, Operation, Value, mapped
from refold.recording.linear import inputs_of
from refold.recording.meanings import batch_norm_arguments
from refold.recording.operators import is_batch_norm

_CPU, _META = torch.device("cpu"), torch.device("meta")
_BLOCK, _STEP = 16, 4
"""Channels that the widest vectors of processors hold; and in steps of how many ONNX Runtime reads blocks of them."""


@dataclass(frozen=True)
class ChannelPart:
    """Consecutive channels that are one tensor, of `width` channels: those after `channels` hold nothing of use."""

    channels: int
    width: int


Layout = tuple[ChannelPart, ...]


@dataclass(frozen=True, eq=False)
class Splitting:
    """Channel classes that are computed in parts, each in its own layout."""

    channels: Channels
    layouts: tuple[tuple[ChannelClass, Layout], ...]

    @property
    def touched(self) -> set[fx.Node]:
        """Every operator that changes."""
        return {node for own, _ in self.layouts for node in self.channels.touched(own)}

    def steps(self) -> dict[fx.Node, Value]:
        """How everything that changes is computed in parts; what reads a class as a whole gets it concatenated."""
        return _Parts(self).steps()


class _Parts:
    """The values of one splitting, part by part."""

    def __init__(self, splitting: Splitting) -> None:
        self._channels, self._planner = splitting.channels, splitting.channels.planner
        self._touched = splitting.touched
        self._layouts = {id(own): layout for own, layout in splitting.layouts}
        self._parts: dict[fx.Node, list[Value]] = {}
        self._part_layouts: dict[fx.Node, Layout] = {}
        self._whole: dict[fx.Node, Value] = {}
        self._steps: dict[fx.Node, Value] = {}

    def steps(self) -> dict[fx.Node, Value]:
        for node in self._planner.graph.nodes:
            if node in self._touched:
                self._operator(node)
        for node in self._parts:
            if any(user not in self._touched or self._reads_whole(user) for user in node.users):
                self._steps[node] = self._joined(node)
        return self._steps

    def _reads_whole(self, node: fx.Node) -> bool:
        role = self._channels.roles[node]
        return self._layout(node) is None and role not in (Role.MIXES, Role.MEASURES)

    def _operator(self, node: fx.Node) -> None:
        role, layout = self._channels.roles[node], self._layout(node)
        if role is Role.MIXES:
            made = self._mixed(node, layout)
            if layout is None:
                self._steps[node] = made[0]
            else:
                self._keep(node, made, layout)
        elif role is Role.MEASURES:
            first = self._parts[node.all_input_nodes[0]][0]
            self._steps[node] = Operation(METHOD, node.target, (first, *node.args[1:]))
        elif layout is None:
            return  # it reads the values put together again
        elif role is Role.CONCATENATES:
            self._keep(node, [self._one(v, p) for v, p in zip(_listed(node), layout, strict=True)], layout)
        elif role is Role.FILTERS:
            self._keep(node, self._filtered(node, layout), layout)
        else:
            self._keep(node, [self._copy(node, i) for i in range(len(layout))], layout)

    def _layout(self, node: fx.Node) -> Layout | None:
        own = self._channels.of(node)
        return None if own is None else self._layouts.get(id(own))

    def _keep(self, node: fx.Node, parts: list[Value], layout: Layout) -> None:
        self._parts[node], self._part_layouts[node] = parts, layout

    def _joined(self, value: fx.Node) -> Value:
        if value not in self._whole:
            self._whole[value] = Operation(FUNCTION, torch.cat, (list(self._parts[value]), 1))
        return self._whole[value]

    def _one(self, value: fx.Node, part: ChannelPart) -> Value:
        """An input of a concatenation as one of its parts."""
        if value not in self._parts:
            return value
        if len(self._parts[value]) == 1 and self._part_layouts[value] == (part,):
            return self._parts[value][0]
        return self._joined(value)

    def _copy(self, node: fx.Node, index: int) -> Value:
        """The same operator on one part of each input; never in place, since a part is somebody else's value."""
        args, kwargs = mapped(
            (node.args, dict(node.kwargs)), lambda v: self._parts[v][index] if v in self._parts else v
        )
        if node.op == MODULE:
            module = self._planner.use(node).layer
            if not getattr(module, "inplace", False):
                return Operation(MODULE, str(node.target), args, kwargs)
            module = copy.copy(module)
            module.inplace = False  # type: ignore[assignment]  # nn.Module types its attributes as modules
            made = NewLayer(lambda: module, self._planner.recording.kinds[node], copy_of=str(node.target))
            return Applied(made, args[0], f"{node.target}_apart")
        target = node.target
        if node.op == METHOD and str(target).endswith("_") and not str(target).startswith("_"):
            target = str(target).rstrip("_")
        return Operation(
            node.op, target, args, {k: False if k == "inplace" else v for k, v in kwargs.items()}
        )

    def _filtered(self, node: fx.Node, layout: Layout) -> list[Value]:
        """A depthwise or grouped convolution, or a batch norm, part by part."""
        (value,) = inputs_of(self._planner.operators[node])
        norm = is_batch_norm(self._planner.use(node))
        found: list[Value] = []
        for index, (rows, part) in enumerate(zip(_ranges(layout), layout, strict=True)):
            build = partial(self._norm, node, rows) if norm else partial(self._rows, node, rows, part)
            found.append(self._applied(node, f"{_name(node)}_{index}", build, self._parts[value][index]))
        return found

    def _norm(self, node: fx.Node, rows: slice) -> nn.Module:
        use = self._planner.use(node)
        if use.module is not None:
            module = use.module
            epsilon, given = module.eps, (module.running_mean, module.running_var, module.weight, module.bias)
        else:
            given, epsilon, _ = batch_norm_arguments(use)
            mean, variance, weight, bias = (use.constant(value) for value in given)
            given = (mean, variance, weight, bias)
        mean, variance, weight, bias = (None if v is None else v.detach().double().cpu()[rows] for v in given)
        assert mean is not None
        assert variance is not None
        kind = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        axes = len(self._planner.shapes[node])
        made = kind[axes - 2](len(mean), epsilon, affine=weight is not None or bias is not None)
        made.running_mean, made.running_var = mean.clone(), variance.clone()
        if made.affine:
            made.weight.data = torch.ones_like(mean) if weight is None else weight.clone()
            made.bias.data = torch.zeros_like(mean) if bias is None else bias.clone()
        return made.eval()

    def _rows(self, node: fx.Node, rows: slice, part: ChannelPart) -> nn.Module:
        whole = self._channels.convolution(node, _CPU)
        weight = _padded(whole.weight[rows], 0, part.width)
        bias = None if whole.bias is None else _padded(whole.bias[rows], 0, part.width)
        return layer(replace(whole, weight=weight, bias=bias, groups=part.width // weight.shape[1]))

    def _mixed(self, node: fx.Node, layout: Layout | None) -> list[Value]:
        """A dense convolution or linear layer, from parts, to parts, or both."""
        (value,) = inputs_of(self._planner.operators[node])
        whole = self._channels.convolution(node, _META)
        outputs = layout or (ChannelPart(whole.out_channels, whole.out_channels),)
        inputs = self._part_layouts.get(value, (ChannelPart(whole.in_channels, whole.in_channels),))
        sources = self._parts.get(value, [value])
        made: list[Value] = []
        for i, (rows, out) in enumerate(zip(_ranges(outputs), outputs, strict=True)):
            total: Value | None = None
            for j, (columns, part) in enumerate(zip(_ranges(inputs), inputs, strict=True)):
                build = partial(self._block, node, rows, columns, out, part, not j)
                name = f"{_name(node)}_{i}_{j}" if len(outputs) > 1 else f"{_name(node)}_{j}"
                term = self._applied(node, name, build, sources[j])
                total = term if total is None else Operation(FUNCTION, operator.add, (total, term))
            assert total is not None
            made.append(total)
        return made

    def _block(
        self, node: fx.Node, rows: slice, columns: slice, out: ChannelPart, part: ChannelPart, first: bool
    ) -> nn.Module:
        return layer(_block(self._channels.convolution(node, _CPU), rows, columns, out, part, is_first=first))

    def _applied(self, node: fx.Node, name: str, build: Any, source: Value) -> Applied:
        return Applied(NewLayer(build, self._planner.recording.kinds[node]), source, name)


def _block(
    whole: Convolution, rows: slice, columns: slice, out: ChannelPart, part: ChannelPart, *, is_first: bool
) -> Convolution:
    """The share of a dense convolution that takes one part of its input to one part of its output."""
    weight = _padded(_padded(whole.weight[rows, columns], 0, out.width), 1, part.width)
    bias = None
    if whole.bias is not None and is_first:
        bias = _padded(whole.bias[rows], 0, out.width)
    return replace(whole, weight=weight, bias=bias)


def _padded(tensor: Tensor, axis: int, width: int) -> Tensor:
    if tensor.shape[axis] == width:
        return tensor
    shape = list(tensor.shape)
    shape[axis] = width - shape[axis]
    return torch.cat([tensor, tensor.new_zeros(shape)], axis)


def _ranges(layout: Sequence[ChannelPart]) -> Iterator[slice]:
    ends = [0, *accumulate(part.channels for part in layout)]
    return (slice(start, stop) for start, stop in pairwise(ends))


def _listed(old: fx.Node) -> list[fx.Node]:
    """The inputs of a concatenation, as often as they occur."""
    given: Any = old.args[0] if old.args else old.kwargs["tensors"]
    return list(given)


def _name(old: fx.Node) -> str:
    return str(old.target) if old.op == "call_module" else old.name


def parts_of(sizes: Sequence[int], *, filled: bool = False) -> Layout:
    """Parts of so many channels; `filled` up to what engines read as blocks: 16 of them, then multiples of four."""
    return tuple(
        ChannelPart(size, max(_BLOCK, -(-size // _STEP) * _STEP) if filled else size) for size in sizes
    )
