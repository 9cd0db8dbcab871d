"""Compute values in parts: W·cat(y, z) = W₁·y + W₂·z, and what treats each channel for itself stays before that."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from refold.algebra import Convolution
from refold.folding.channels import ChannelClass, Channels, Role
from refold.folding.layers import layer
from refold.folding.operators import inputs_of
from refold.folding.recognition import batch_norm_settings, is_batch_norm

_CPU = torch.device("cpu")
_IN_PLACE = {operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul}
_IN_PLACE |= {operator.itruediv: operator.truediv}


_BLOCK, _STEP = 16, 4
"""Channels that the widest vectors of processors hold; and in steps of how many ONNX Runtime reads blocks of them."""


@dataclass(frozen=True)
class Part:
    """Consecutive channels that are one tensor, of `width` channels: those after `channels` hold nothing of use."""

    channels: int
    width: int


Layout = tuple[Part, ...]


@dataclass(frozen=True, eq=False)
class Splitting:
    """Channel classes that are computed in parts, each in its own layout."""

    channels: Channels
    layouts: tuple[tuple[ChannelClass, Layout], ...]

    @property
    def touched(self) -> set[fx.Node]:
        """Every operator that changes."""
        return {node for own, _ in self.layouts for node in self.channels.touched(own)}

    def write(self, graph: fx.Graph, module: nn.Module, here: Callable[[fx.Node], fx.Node]) -> None:
        """Rewrite a graph of `module`, in which `here` finds the operators of the unit; what nobody reads stays."""
        _Writer(self, graph, module, here).write()


class _Writer:
    """Writes one splitting into one graph."""

    def __init__(
        self, splitting: Splitting, graph: fx.Graph, module: nn.Module, here: Callable[[fx.Node], fx.Node]
    ) -> None:
        self._channels, self._planner = splitting.channels, splitting.channels.planner
        self._touched = splitting.touched
        self._layouts = {id(own): layout for own, layout in splitting.layouts}
        self._graph, self._module, self._here = graph, module, here
        self._parts: dict[fx.Node, list[fx.Node]] = {}
        self._part_layouts: dict[fx.Node, Layout] = {}
        self._whole: dict[fx.Node, fx.Node] = {}

    def write(self) -> None:
        for node in self._planner.unit.graph.nodes:
            if node in self._touched and node not in self._planner.checks:
                with self._graph.inserting_before(self._here(node)):
                    self._operator(node, self._here(node))

    def _operator(self, node: fx.Node, old: fx.Node) -> None:
        role, layout = self._channels.roles[node], self._layout(node)
        if role is Role.MIXES:
            made = self._mixed(node, old, layout)
            if layout is None:
                old.replace_all_uses_with(made[0])
            else:
                self._keep(old, made, layout)
        elif role is Role.MEASURES:
            old.replace_input_with(old.all_input_nodes[0], self._parts[old.all_input_nodes[0]][0])
        elif layout is None:
            self._join_inputs(old)
        elif role is Role.CONCATENATES:
            self._keep(
                old, [self._one(v, part) for v, part in zip(_listed(old), layout, strict=True)], layout
            )
        elif role is Role.FILTERS:
            self._keep(old, self._filtered(node, old, layout), layout)
        else:
            self._keep(old, [self._copy(old, i) for i in range(len(layout))], layout)

    def _layout(self, node: fx.Node) -> Layout | None:
        own = self._channels.of(node)
        return None if own is None else self._layouts.get(id(own))

    def _keep(self, old: fx.Node, parts: list[fx.Node], layout: Layout) -> None:
        self._parts[old], self._part_layouts[old] = parts, layout

    def _join_inputs(self, old: fx.Node) -> None:
        """Let an operator that knows nothing of parts read them put together again."""
        for value in old.all_input_nodes:
            if value in self._parts:
                old.replace_input_with(value, self._joined(value))

    def _joined(self, value: fx.Node) -> fx.Node:
        if value not in self._whole:
            parts = self._parts[value]
            # Behind the last part, for the first who reads it need not be the first in the graph.
            last = max(parts, key=list(self._graph.nodes).index)
            with self._graph.inserting_after(last):
                self._whole[value] = self._graph.call_function(torch.cat, (list(parts), 1))
        return self._whole[value]

    def _one(self, value: fx.Node, part: Part) -> fx.Node:
        """An input of a concatenation as one of its parts."""
        if value not in self._parts:
            return value
        if len(self._parts[value]) == 1 and self._part_layouts[value] == (part,):
            return self._parts[value][0]
        return self._joined(value)

    def _copy(self, old: fx.Node, index: int) -> fx.Node:
        """The same operator on one part of each input; never in place, since a part is somebody else's value."""
        new = self._graph.node_copy(old, lambda v: self._parts[v][index] if v in self._parts else v)
        if old.op == "call_module":
            module = self._module.get_submodule(str(old.target))
            if getattr(module, "inplace", False):
                module = copy.copy(module)
                module.inplace = False  # type: ignore[assignment]  # nn.Module types its attributes as modules
                new.target = self._add(f"{old.target}_apart", module)
        else:
            new.target = _IN_PLACE.get(new.target, new.target)  # type: ignore[arg-type]  # targets are hashable
            new.kwargs = {k: False if k == "inplace" else v for k, v in new.kwargs.items()}
        return new

    def _filtered(self, node: fx.Node, old: fx.Node, layout: Layout) -> list[fx.Node]:
        """A depthwise or grouped convolution, or a batch norm, part by part."""
        value = self._input(node, old)
        norm = is_batch_norm(node, self._planner.constants)
        found = []
        for index, (rows, part) in enumerate(zip(_ranges(layout), layout, strict=True)):
            made = self._norm(node, rows) if norm else self._rows(node, rows, part)
            found.append(self._call(node, f"{_name(old)}_{index}", made, self._parts[value][index]))
        return found

    def _input(self, node: fx.Node, old: fx.Node) -> fx.Node:
        """What a convolution or batch norm reads, besides its constants."""
        (source,) = inputs_of(self._planner.operators[node])
        return old.all_input_nodes[node.all_input_nodes.index(source)]

    def _norm(self, node: fx.Node, rows: slice) -> nn.Module:
        mean, variance, weight, bias, epsilon = batch_norm_settings(node, self._planner.constants)
        kind = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        shape = self._planner.unit.shapes[node]
        made = kind[len(shape) - 2](len(mean[rows]), epsilon, affine=weight is not None or bias is not None)
        made.running_mean, made.running_var = mean[rows].clone(), variance[rows].clone()
        if made.affine:
            made.weight.data = torch.ones_like(mean[rows]) if weight is None else weight[rows].clone()
            made.bias.data = torch.zeros_like(mean[rows]) if bias is None else bias[rows].clone()
        return made.eval()

    def _rows(self, node: fx.Node, rows: slice, part: Part) -> nn.Module:
        whole = self._channels.convolution(node, _CPU)
        weight = _padded(whole.weight[rows], 0, part.width)
        bias = None if whole.bias is None else _padded(whole.bias[rows], 0, part.width)
        return layer(replace(whole, weight=weight, bias=bias, groups=part.width // weight.shape[1]))

    def _mixed(self, node: fx.Node, old: fx.Node, layout: Layout | None) -> list[fx.Node]:
        """A dense convolution or linear layer, from parts, to parts, or both."""
        value = self._input(node, old)
        whole = self._channels.convolution(node, _CPU)
        outputs = layout or (Part(whole.out_channels, whole.out_channels),)
        inputs = self._part_layouts.get(value, (Part(whole.in_channels, whole.in_channels),))
        sources = self._parts.get(value, [value])
        made = []
        for i, (rows, out) in enumerate(zip(_ranges(outputs), outputs, strict=True)):
            total: fx.Node | None = None
            for j, (columns, part) in enumerate(zip(_ranges(inputs), inputs, strict=True)):
                block = layer(_block(whole, rows, columns, out, part, is_first=not j))
                name = f"{_name(old)}_{i}_{j}" if len(outputs) > 1 else f"{_name(old)}_{j}"
                term = self._call(node, name, block, sources[j])
                total = term if total is None else self._graph.call_function(operator.add, (total, term))
            assert total is not None
            made.append(total)
        return made

    def _call(self, node: fx.Node, name: str, made: nn.Module, value: fx.Node) -> fx.Node:
        dtype, device = self._planner.unit.kinds[node]
        return self._graph.call_module(self._add(name, made.to(device, dtype)), (value,))

    def _add(self, name: str, module: nn.Module) -> str:
        """Register a layer beside the one whose share it is."""
        stem, number = name, 2
        parent = self._module.get_submodule(stem.rpartition(".")[0])
        while hasattr(parent, name.rpartition(".")[2]):
            name, number = f"{stem}_again_{number}", number + 1
        parent.add_module(name.rpartition(".")[2], module)
        return name


def _block(
    whole: Convolution, rows: slice, columns: slice, out: Part, part: Part, *, is_first: bool
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


def _ranges(layout: Sequence[Part]) -> Iterator[slice]:
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
    return tuple(Part(size, max(_BLOCK, -(-size // _STEP) * _STEP) if filled else size) for size in sizes)
