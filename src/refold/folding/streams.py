"""Streams, values that sums and the like tie together, and the pass that rotates those without activation.

What writes a stream and what reads it changes, the function does not.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass

import torch
from torch import fx, nn

from refold.algebra import Convolution, mix_outputs, rotation, unmix_inputs
from refold.folding.layers import layer
from refold.folding.planning import Planner
from refold.folding.report import FoldedRegion
from refold.folding.rewrite import Applied, NewLayer, Rewrite, Value
from refold.recording.linear import Map, Same, Sum, inputs_of

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Stream:
    """Values that sums tie together: the layers that write them, the sums, and the layers that read them."""

    writers: tuple[fx.Node, ...]
    between: tuple[fx.Node, ...]
    readers: tuple[fx.Node, ...]
    channels: int


def rotated_streams(planner: Planner) -> list[Rewrite]:
    """A rotation on each stream that dense layers alone write and read, with nothing but sums in between."""
    found: list[Rewrite] = []
    used: set[fx.Node] = set()
    for seed, stream in enumerate(streams(planner)):
        own = {*stream.writers, *stream.readers}
        if not own & used and (stream.writers[0], "rotation") not in planner.excluded:
            found.append(_rewrite(planner, stream, seed))
            used |= own
    return found


Asked = Callable[[Planner, fx.Node], bool]


def streams(planner: Planner, is_layer: Asked | None = None, passes: Asked | None = None) -> list[Stream]:
    """The streams of a network, in the order they begin: written and read by layers, with what `passes` in between.

    Without either, layers are dense and nothing but sums passes.
    """
    is_layer, passes = is_layer or _is_dense, passes or _is_sum
    found, seen = [], set[fx.Node]()
    for node in planner.graph.nodes:
        if is_layer(planner, node) and node not in seen:
            values = _tied(planner, node, is_layer, passes)
            if values is not None:
                seen |= values
                stream = _stream(planner, values, is_layer)
                if stream is not None:
                    found.append(stream)
    return found


def sources_of(planner: Planner, node: fx.Node) -> tuple[fx.Node, ...]:
    """The values that an operator computes its own from, without its weights."""
    operator = planner.operators.get(node)
    if operator is not None:
        return inputs_of(operator)
    return tuple(value for value in node.all_input_nodes if value in planner.recording.varying)


def _tied(planner: Planner, start: fx.Node, is_layer: Asked, passes: Asked) -> set[fx.Node] | None:
    """All values that are tied to one; None where something else than layers and what passes writes them."""
    values, waiting = {start}, [start]
    while waiting:
        node = waiting.pop()
        near = [user for user in node.users if passes(planner, user)]
        if passes(planner, node):
            near += sources_of(planner, node)
        elif not is_layer(planner, node):
            return None
        for each in near:
            if each not in values:
                values.add(each)
                waiting.append(each)
    return values


def _stream(planner: Planner, values: Set[fx.Node], is_layer: Asked) -> Stream | None:
    order, recording = planner.order, planner.recording
    readers = {user for node in values for user in node.users} - values
    writers = [node for node in values if is_layer(planner, node)]
    if not all(len(planner.shapes.get(node, ())) > 1 for node in values):
        return None
    shapes = {planner.shapes[node][1] for node in values}
    barred = recording.barriers & (values | readers)
    changed = any(members & values and not members <= values for _, members in recording.mutations)
    if not readers or len(shapes) > 1 or barred or changed or not all(is_layer(planner, r) for r in readers):
        return None
    if any(inputs_of(planner.operators[reader])[0] not in values for reader in readers):
        return None
    between = [node for node in values if node not in writers]
    first, middle, last = (tuple(sorted(each, key=order.__getitem__)) for each in (writers, between, readers))
    return Stream(first, middle, last, shapes.pop())


def _is_sum(planner: Planner, node: fx.Node) -> bool:
    """Whether an operator hands on a sum of values as they are."""
    operator = planner.operators.get(node)
    return isinstance(operator, (Sum, Same)) and len(planner.shapes.get(node, ())) == 4


def _is_dense(planner: Planner, node: fx.Node) -> bool:
    operator = planner.operators.get(node)
    if not isinstance(operator, Map) or not operator.multiplies:
        return False
    return operator.structure.groups == 1 and operator.structure.spatial_axes == 2


def _rewrite(planner: Planner, stream: Stream, seed: int) -> Rewrite:
    steps: dict[fx.Node, Value] = {}
    turn = rotation(stream.channels, torch.empty(0, dtype=torch.float64), seed)

    def applied(node: fx.Node, *, writes: bool) -> Applied:
        def build() -> nn.Module:
            own = built(planner, node)
            return layer(mix_outputs(own, turn) if writes else unmix_inputs(own, turn))

        return Applied(NewLayer(build, planner.recording.kinds[node]), inputs_of(planner.operators[node])[0])

    steps |= {node: applied(node, writes=True) for node in stream.writers}
    steps |= {node: applied(node, writes=False) for node in stream.readers}
    return stream_rewrite(planner, stream, steps, f"{stream.channels} channels rotated", "rotation")


def stream_rewrite(
    planner: Planner, stream: Stream, steps: dict[fx.Node, Value], words: str, kind: str
) -> Rewrite:
    """The rewrite of a stream by new layers in the places of those that write and read it."""
    return Rewrite(
        steps=steps,
        nodes=frozenset(steps),
        outputs=stream.readers,
        operators=[],
        folded=[FoldedRegion(stream.writers[0].meta["scope"][-1].path, {"convolution": len(steps)}, words)],
        convolutions=tuple(_structure(planner, node) for node in steps),
        interior=frozenset(stream.between),
        key=(stream.writers[0], kind),
    )


def _structure(planner: Planner, node: fx.Node) -> Convolution:
    operator = planner.operators[node]
    assert isinstance(operator, Map)
    return operator.structure


def built(planner: Planner, node: fx.Node) -> Convolution:
    """The convolution that a layer is, in float64."""
    operator = planner.operators[node]
    assert isinstance(operator, Map)
    return operator.build(_CPU)
