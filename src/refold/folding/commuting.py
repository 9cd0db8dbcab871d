"""A pass: a scale and a shift of channels that the next layer takes up, across averaging and reordering in between."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from refold.algebra import Convolution, is_channelwise, series
from refold.errors import NotFoldable, first_line
from refold.folding.layers import layer
from refold.folding.planning import Planner
from refold.folding.report import FoldedRegion
from refold.folding.rewrite import Applied, Evaluation, NewLayer, Rewrite, Value
from refold.recording.linear import Map, Same, inputs_of
from refold.recording.operators import operator_of
from refold.recording.recording import path_of

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class _Passage:
    """A scale and shift, `norm`, and the layers that read it through `nodes` alone."""

    norm: fx.Node
    readers: tuple[fx.Node, ...]
    nodes: frozenset[fx.Node]
    """All of them, and everything between."""


def commuting_norms(planner: Planner, taken: Set[fx.Node]) -> list[Rewrite]:
    """Every batch norm, besides those `taken` already, that layers alone read, every channel for itself.

    `linear(mean(norm(x)))` is `linear'(mean(x))`: an average of a scaled and shifted channel is the scaled and shifted
    average, wherever the channel lies afterwards.
    """
    found = []
    for node, meaning in planner.operators.items():
        free = node in planner.demanded and node not in taken and node not in planner.recording.barriers
        if (
            free
            and isinstance(meaning, Map)
            and not meaning.multiplies
            and (node, "passage") not in planner.excluded
        ):
            passage = _passage(planner, node, taken)
            if passage is not None and is_channelwise(meaning.structure):
                found.append(_rewrite(planner, passage))
    return found


def _passage(planner: Planner, norm: fx.Node, taken: Set[fx.Node]) -> _Passage | None:
    """The ways from a scale and shift to the layers that read it; None where anything else reads it."""
    readers: list[fx.Node] = []
    nodes, waiting = {norm}, [norm]
    while waiting:
        node = waiting.pop()
        helpers = {user for user in node.users if "number" in user.meta}
        nodes |= _closure(helpers)
        for user in set(node.users) - helpers - nodes:
            operator = planner.operators.get(user)
            if user in taken or user in planner.recording.barriers or not planner.same_call(node, user):
                return None
            nodes.add(user)
            if isinstance(operator, Map) and operator.multiplies:
                readers.append(user)
            elif isinstance(operator, Same) or _moves(planner, user):
                waiting.append(user)
            else:
                return None
    source = inputs_of(planner.operators[norm])[0]
    if any(members & (nodes | {source}) for _, members in planner.recording.mutations):
        return None
    readers.sort(key=planner.order.__getitem__)
    return _Passage(norm, tuple(readers), frozenset(nodes)) if readers else None


def _closure(helpers: set[fx.Node]) -> set[fx.Node]:
    """What is computed from sizes alone, such as their products."""
    found, waiting = set(helpers), list(helpers)
    while waiting:
        for user in waiting.pop().users:
            if user not in found and found.issuperset(user.all_input_nodes):
                found.add(user)
                waiting.append(user)
    return found


def _moves(planner: Planner, node: fx.Node) -> bool:
    operator = operator_of(planner.use(node))
    return operator is not None and operator.channels == "moved"


def _rewrite(planner: Planner, passage: _Passage) -> Rewrite:
    steps: dict[fx.Node, Value] = {passage.norm: inputs_of(planner.operators[passage.norm])[0]}
    for reader in passage.readers:

        def build(reader: fx.Node = reader) -> nn.Module:
            return layer(_folded(planner, passage, reader))

        made = NewLayer(build, planner.recording.kinds[reader])
        steps[reader] = Applied(made, inputs_of(planner.operators[reader])[0])
    count = len(passage.readers)
    layers = "layer that reads it" if count == 1 else f"{count} layers that read it"
    path = path_of(passage.norm)
    return Rewrite(
        steps=steps,
        nodes=passage.nodes,
        outputs=passage.readers,
        operators=[passage.norm],
        folded=[FoldedRegion(path, {"batch norm": 1}, f"absorbed into the {layers}")],
        check=partial(_require_channels_apart, planner, passage),
        key=(passage.norm, "passage"),
    )


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


def _require_channels_apart(planner: Planner, passage: _Passage) -> None:
    """Let a value for each channel through, and raise NotFoldable where a layer does not read just these again."""
    for reader in passage.readers:
        (source,) = inputs_of(planner.operators[reader])
        shape, axes = planner.shapes[passage.norm], _built(planner, reader).spatial_axes
        marks = torch.randn(shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        x: Any = marks.reshape(1, -1, *(1,) * (len(shape) - 2)).expand(shape).clone()
        given = {passage.norm: x.to(planner.recording.kinds[passage.norm][1])}
        outside = {v for n in passage.nodes for v in n.all_input_nodes} - passage.nodes
        given |= {node: node.meta["number"] for node in outside if "number" in node.meta}
        try:
            found = Evaluation(planner.constants, given).value(source).cpu()
        except NotFoldable:
            raise
        except Exception as error:
            raise NotFoldable(f"what reads it cannot be run alone ({first_line(error)})") from error
        expected = marks.reshape(1, -1, *(1,) * axes) if axes else marks
        apart = found.shape[1 if axes else -1] == len(marks)
        if not apart or not torch.allclose(found, expected.expand_as(found), rtol=1e-12):
            raise NotFoldable("its channels are mixed before the next layer reads them")
