"""A pass: shortcuts go into the convolutions that they lead around, which leaves a chain (RepNeXt, eq. 5 to 8)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from refold.algebra import Convolution, fold_shortcut
from refold.errors import NotFoldable
from refold.folding.layers import layer
from refold.folding.planning import Planner
from refold.folding.report import FoldedRegion
from refold.folding.rewrite import Applied, NewLayer, Rewrite, Value
from refold.recording.linear import Map, Same, Sum, inputs_of
from refold.recording.operators import operator_of
from refold.recording.recording import common_path, has_hooks

Activation = tuple[str, str]
"""The name of an activation and its settings."""


@dataclass(frozen=True)
class Chain:
    """Convolutions with activations between them, and a shortcut around all of it through the same activations."""

    source: fx.Node
    root: fx.Node
    """The addition."""
    last: fx.Node
    """The operand of the addition that the chain computes."""
    convolutions: tuple[fx.Node, ...]
    activations: tuple[Activation, ...] = ()
    nodes: frozenset[fx.Node] = frozenset()
    """Everything between `source` and `root` that is part of the chain."""


@dataclass(frozen=True)
class _Side:
    """A shortcut back to `source`: through activations and, last of all, at most one convolution."""

    source: fx.Node
    activations: tuple[Activation, ...] = ()
    convolution: fx.Node | None = None
    nodes: frozenset[fx.Node] = frozenset()


def folded_shortcuts(planner: Planner) -> list[Rewrite]:
    """Every shortcut that can pass through the convolutions and activations which it leads around."""
    return [
        rewrite
        for node, operator in planner.operators.items()
        if isinstance(operator, Sum)
        and operator.factors == (1.0, 1.0)
        and (node, "shortcut") not in planner.excluded
        if (rewrite := _found(planner, node, operator)) is not None
    ]


def _found(planner: Planner, root: fx.Node, operator: Sum) -> Rewrite | None:
    for last, other in (operator.inputs, operator.inputs[::-1]):
        for chain in _chains(planner, root, last):
            for side in _sides(planner, other):
                if side.source is chain.source and _same_activations(planner, chain, side):
                    return _rewrite(planner, chain, side)
    return None


def _chains(planner: Planner, root: fx.Node, last: fx.Node) -> Iterator[Chain]:
    """The chains of two convolutions or more that end in `last`, the shortest first."""
    chain = Chain(last, root, last, ())
    while True:
        node = chain.source
        if set(node.users) - chain.nodes - {root}:
            return  # somebody else reads it: it has to stay as it is
        operator, activation = planner.operators.get(node), _activation(planner, node)
        chain = replace(chain, nodes=chain.nodes | {node})
        if isinstance(operator, Map) and operator.multiplies and _is_layer(planner, node):
            chain = replace(chain, source=operator.input, convolutions=(node, *chain.convolutions))
        elif isinstance(operator, Same):
            chain = replace(chain, source=operator.input)
        elif activation is not None and chain.convolutions:
            (source,) = node.all_input_nodes
            chain = replace(chain, source=source, activations=(activation, *chain.activations))
        else:
            return
        if len(chain.convolutions) > 1 and chain.source in planner.shapes:
            yield chain


def _sides(planner: Planner, node: fx.Node) -> Iterator[_Side]:
    """The ways back from an operand of the addition, the shortest first."""
    side = _Side(node)
    yield side
    while True:
        node = side.source
        operator, activation = planner.operators.get(node), _activation(planner, node)
        side = replace(side, nodes=side.nodes | {node})
        first = side.convolution is None and not side.activations
        if first and isinstance(operator, Map) and operator.multiplies:
            side = replace(side, source=operator.input, convolution=node)
        elif isinstance(operator, Same):
            side = replace(side, source=operator.input)
        elif activation is not None:
            (source,) = node.all_input_nodes
            side = replace(side, source=source, activations=(activation, *side.activations))
        else:
            return
        yield side


def _is_layer(planner: Planner, node: fx.Node) -> bool:
    return node.op != "call_module" or not has_hooks(planner.use(node).layer)


def _same_activations(planner: Planner, chain: Chain, side: _Side) -> bool:
    if chain.activations == side.activations:
        return True
    # The source may be an activation's output already, which the same activation leaves as it is.
    own = _activation(planner, chain.source)
    operator = operator_of(planner.use(chain.source)) if own is not None else None
    repeats = operator is not None and operator.idempotent
    return repeats and {own} == set(chain.activations) | set(side.activations)


def _activation(planner: Planner, node: fx.Node) -> Activation | None:
    """Which elementwise activation the node is, with its settings; None where it is none."""
    if len(node.all_input_nodes) != 1 or node in planner.recording.barriers:
        return None
    operator = operator_of(planner.use(node))
    if operator is None or not operator.elementwise:
        return None
    if node.op == "call_module":
        module = planner.use(node).layer
        if type(module).__module__ != "torch.nn.modules.activation":
            return None
        name, settings = type(module).__name__, dict[Any, Any](vars(module))
    else:
        name = str(getattr(node.target, "__name__", node.target))
        settings = dict(enumerate(node.args[1:])) | dict(node.kwargs)
    name = name.lower().replace("_", "")
    plain = {str(k): v for k, v in settings.items() if k not in ("training", "inplace") and str(k)[0] != "_"}
    return name, repr(sorted(plain.items()))


def _rewrite(planner: Planner, chain: Chain, side: _Side) -> Rewrite | None:
    """The rewrite, or None where the algebra refuses: the planner notes why."""
    try:
        structure = _folded(planner, chain, side, torch.device("meta"))
    except NotFoldable as refusal:
        planner.refusals[chain.root] = str(refusal)
        return None
    # What else reads the shortcut keeps it.
    gone = frozenset(node for node in side.nodes if set(node.users) <= side.nodes | {chain.root})
    steps: dict[fx.Node, Value] = {chain.root: chain.last}
    for index, node in enumerate(chain.convolutions):

        def build(index: int = index) -> Any:
            return layer(_folded(planner, chain, side, torch.device("cpu"))[index])

        made = NewLayer(build, planner.recording.kinds[chain.root])
        steps[node] = Applied(made, inputs_of(planner.operators[node])[0])
    nodes = chain.nodes | gone | {chain.root}
    interior = nodes | side.nodes
    if chain.activations != side.activations:  # exact on what the activation before the chain writes
        interior |= {chain.source}
    count = len(chain.convolutions)
    channels = ", ".join(str(each.out_channels) for each in structure)
    operators = {"convolution": count, "addition": 1, "activation": len(chain.activations)}
    path = common_path(gone | {chain.root})
    return Rewrite(
        steps=steps,
        nodes=frozenset(gone | {chain.root}),
        outputs=(chain.root,),
        operators=[*chain.nodes, chain.root],
        folded=[FoldedRegion(path, operators, f"{count} convolutions of {channels} channels, no shortcut")],
        convolutions=structure,
        interior=frozenset(interior),
        key=(chain.root, "shortcut"),
    )


def _folded(planner: Planner, chain: Chain, side: _Side, device: torch.device) -> tuple[Convolution, ...]:
    def built(node: fx.Node) -> Convolution:
        operator: Any = planner.operators[node]
        convolution: Convolution = operator.build(device)
        return convolution

    shortcut = None if side.convolution is None else built(side.convolution)
    return fold_shortcut([built(node) for node in chain.convolutions], shortcut)
