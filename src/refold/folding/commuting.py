"""A scale and a shift of channels that the next layer takes up, across averaging and reordering in between."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx, nn

from refold.algebra import Convolution, identity, is_channelwise, series
from refold.errors import NotFoldable, first_line
from refold.folding.drafts import Draft, DraftRewire, edit
from refold.folding.edits import Candidate
from refold.folding.layers import NewLayer, layer, new_layer
from refold.folding.operators import Map, Same, inputs_of
from refold.folding.planning import Planner
from refold.folding.proof import distance, require_proved, run
from refold.folding.report import FoldedRegion

_CPU, _META = torch.device("cpu"), torch.device("meta")
_MEANS_AND_MOVES = {
    *("mean", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
    *("AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "AdaptiveAvgPool3d"),
    *("flatten", "Flatten", "reshape", "view", "squeeze", "unsqueeze", "contiguous"),
    *("transpose", "permute", "movedim", "swapaxes"),
}
"""Operators, by name, that move values or average them, so that each channel can stay for itself."""
_SHAPES = {"shape", "ndim", "dtype", "device", "size", "dim"}


@dataclass(frozen=True)
class _Passage:
    """A scale and shift, `norm`, and the layers that read it through `nodes` alone."""

    norm: fx.Node
    readers: tuple[fx.Node, ...]
    nodes: frozenset[fx.Node]
    """All of them, and everything between."""


def commuting_candidates(planner: Planner, taken: set[fx.Node]) -> list[Candidate]:
    """Every batch norm, besides those `taken` already, that layers alone read, every channel for itself.

    `linear(mean(norm(x)))` is `linear'(mean(x))`: an average of a scaled and shifted channel is the scaled and shifted
    average, wherever the channel lies afterwards.
    """
    found = []
    for node, operator in planner.operators.items():
        free = node in planner.demanded and node not in taken and node not in planner.unit.barriers
        if free and isinstance(operator, Map) and not operator.multiplies:
            passage = _passage(planner, node, taken)
            if passage is not None and is_channelwise(operator.build(_META)):
                found.append(_candidate(planner, passage))
    return found


def _passage(planner: Planner, norm: fx.Node, taken: set[fx.Node]) -> _Passage | None:
    """The ways from a scale and shift to the layers that read it; None where anything else reads it."""
    readers: list[fx.Node] = []
    nodes, waiting = {norm}, [norm]
    while waiting:
        node = waiting.pop()
        helpers = {user for user in node.users if _reads_shape(user)}
        nodes |= _closure(helpers)
        for user in set(node.users) - helpers - planner.checks - nodes:
            operator = planner.operators.get(user)
            if user in taken or user in planner.unit.barriers or not planner.same_call(node, user):
                return None
            nodes.add(user)
            if isinstance(operator, Map) and operator.multiplies:
                readers.append(user)
            elif isinstance(operator, Same) or _name(planner, user) in _MEANS_AND_MOVES:
                waiting.append(user)
            else:
                return None
    readers.sort(key=planner.order.__getitem__)
    return _Passage(norm, tuple(readers), frozenset(nodes)) if readers else None


def _reads_shape(node: fx.Node) -> bool:
    target = node.args[1] if node.target is getattr else node.target
    return node.op in ("call_function", "call_method") and target in _SHAPES


def _closure(helpers: set[fx.Node]) -> set[fx.Node]:
    """What is computed from sizes alone, such as their products."""
    found, waiting = set(helpers), list(helpers)
    while waiting:
        for user in waiting.pop().users:
            if user not in found and found.issuperset(user.all_input_nodes):
                found.add(user)
                waiting.append(user)
    return found


def _name(planner: Planner, node: fx.Node) -> str:
    if node.op == "call_module":
        return type(planner.unit.attribute(str(node.target))).__name__
    return str(getattr(node.target, "__name__", node.target))


def _candidate(planner: Planner, passage: _Passage) -> Candidate:
    slots: dict[str, int | None] = {}
    rewires: list[DraftRewire] = []
    edit(passage.norm, planner.operators[passage.norm], None, slots, rewires)
    for index, reader in enumerate(passage.readers):
        edit(reader, planner.operators[reader], index, slots, rewires)
    layers = (
        "layer that reads it" if len(passage.readers) == 1 else f"{len(passage.readers)} layers that read it"
    )
    return Candidate(
        operators=[passage.norm],
        draft=Draft(slots, tuple(rewires)),
        make=partial(_make, planner, passage),
        folded=[
            FoldedRegion(
                planner.unit.full_scope(passage.norm.meta["scope"]),
                {"batch norm": 1},
                f"taken up by the {layers}",
            )
        ],
    )


def _make(planner: Planner, passage: _Passage, prove: bool) -> tuple[list[NewLayer], list[float]]:
    layers, distances = [], []
    for reader in passage.readers:
        _require_channels_apart(planner, passage, reader)
        folded = _folded(planner, passage, reader)
        if prove:
            distances.append(_prove(planner, passage, reader, folded))

        def build(reader: fx.Node = reader) -> nn.Module:
            return layer(_folded(planner, passage, reader))

        layers.append(new_layer(build, layer(folded), planner.unit.kinds[reader]))
    return layers, distances


def _folded(planner: Planner, passage: _Passage, reader: fx.Node) -> Convolution:
    """A reading layer with the scale and shift of its input in its weights."""
    norm, linear = _built(planner, passage.norm), _built(planner, reader)
    axes = linear.spatial_axes
    weight = norm.weight.reshape(-1, 1, *(1,) * axes)
    moved = Convolution(weight, norm.bias, (1,) * axes, ((0, 0),) * axes, (1,) * axes, norm.groups)
    return series(moved, linear)


def _built(planner: Planner, node: fx.Node) -> Convolution:
    operator = planner.operators[node]
    assert isinstance(operator, Map)
    return operator.build(_CPU)


def _require_channels_apart(planner: Planner, passage: _Passage, reader: fx.Node) -> None:
    """Let a value for each channel through, and raise NotFoldable where the layer does not read just these again."""
    (source,) = inputs_of(planner.operators[reader])
    shape, axes = planner.unit.shapes[passage.norm], _built(planner, reader).spatial_axes
    marks = torch.randn(shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = marks.reshape(1, -1, *(1,) * (len(shape) - 2)).expand(shape)
    found = _through(planner, passage, source, x, {passage.norm: _nothing(planner, passage)})
    expected = marks.reshape(1, -1, *(1,) * axes) if axes else marks
    if found.shape[1 if axes else -1] != len(marks) or not torch.allclose(
        found, expected.expand_as(found), rtol=1e-12
    ):
        raise NotFoldable("its channels are mixed before the next layer reads them")


def _prove(planner: Planner, passage: _Passage, reader: fx.Node, folded: Convolution) -> float:
    """How far the layer that reads the bare value is from the original: in float64, on two random inputs."""
    generator = torch.Generator().manual_seed(1)
    new = {passage.norm: _nothing(planner, passage), reader: folded}
    worst = 0.0
    for _ in range(2):
        x = torch.randn(planner.unit.shapes[passage.norm], dtype=torch.float64, generator=generator)
        expected, found = (_through(planner, passage, reader, x, instead) for instead in ({}, new))
        worst = max(worst, distance(expected, found))
    require_proved(worst)
    return worst


def _nothing(planner: Planner, passage: _Passage) -> Convolution:
    norm = _built(planner, passage.norm)
    return identity(norm.in_channels, norm.spatial_axes, norm.weight)


def _through(
    planner: Planner, passage: _Passage, root: fx.Node, x: Tensor, instead: dict[fx.Node, Convolution]
) -> Tensor:
    operator = planner.operators[passage.norm]
    assert isinstance(operator, Map)
    x = x.clone().to(planner.unit.kinds[passage.norm][1])
    try:
        return run(passage.nodes, operator.input, root, planner.constants, x, instead).cpu()
    except NotFoldable:
        raise
    except Exception as error:
        raise NotFoldable(f"what reads it cannot be run alone ({first_line(error)})") from error
