"""Take shortcuts into the convolutions that they lead around: a block becomes a plain chain (RepNeXt, eq. 5 to 8)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx

from refold.algebra import Convolution, fold_shortcut
from refold.errors import NotFoldable
from refold.folding.channels import ELEMENTWISE
from refold.folding.drafts import Draft, DraftRewire, common_scope
from refold.folding.edits import Candidate
from refold.folding.layers import NewLayer, layer, new_layer
from refold.folding.operators import Map, Same, Sum
from refold.folding.planning import Planner
from refold.folding.proof import prove_chain
from refold.folding.report import FoldedRegion
from refold.folding.tracing import has_hooks

_IDEMPOTENT = {"relu", "relu6", "hardtanh"}
"""Those that change nothing where they are applied again."""

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


def shortcut_candidates(planner: Planner) -> list[Candidate]:
    """Every shortcut that can pass through the convolutions and activations which it leads around."""
    return [
        candidate
        for node, operator in planner.operators.items()
        if isinstance(operator, Sum) and operator.factors == (1.0, 1.0)
        if (candidate := _candidate(planner, node, operator)) is not None
    ]


def _candidate(planner: Planner, root: fx.Node, operator: Sum) -> Candidate | None:
    for last, other in (operator.inputs, operator.inputs[::-1]):
        for chain in _chains(planner, root, last):
            for side in _sides(planner, other):
                if side.source is chain.source and _same_activations(planner, chain, side):
                    return _made_candidate(planner, chain, side)
    return None


def _chains(planner: Planner, root: fx.Node, last: fx.Node) -> Iterator[Chain]:
    """The chains of two convolutions or more that end in `last`, the shortest first."""
    chain = Chain(last, root, last, ())
    while True:
        node = chain.source
        if set(node.users) - planner.checks - chain.nodes - {root}:
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
        if len(chain.convolutions) > 1 and chain.source in planner.unit.shapes:
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
    return node.op == "call_module" and not has_hooks(planner.unit.attribute(str(node.target)))


def _same_activations(planner: Planner, chain: Chain, side: _Side) -> bool:
    if chain.activations == side.activations:
        return True
    # The source may be an activation's output already, which the same activation leaves as it is.
    own = _activation(planner, chain.source)
    repeats = own is not None and own[0] in _IDEMPOTENT
    return repeats and {own} == set(chain.activations) | set(side.activations)


def _activation(planner: Planner, node: fx.Node) -> Activation | None:
    """Which elementwise activation the node is, with its settings; None where it is none."""
    if len(node.all_input_nodes) != 1 or node in planner.unit.barriers:
        return None
    if node.op == "call_module":
        module = planner.unit.attribute(str(node.target))
        name, settings = type(module).__name__, vars(module)
        ours = type(module).__module__ == "torch.nn.modules.activation" and not has_hooks(module)
    elif node.op in ("call_function", "call_method"):
        name = str(getattr(node.target, "__name__", node.target))
        settings = dict(enumerate(node.args[1:])) | dict(node.kwargs)
        ours = True
    else:
        return None
    name = name.lower().replace("_", "")
    if not ours or name not in ELEMENTWISE:
        return None
    plain = {str(k): v for k, v in settings.items() if k not in ("training", "inplace") and str(k)[0] != "_"}
    return name, repr(sorted(plain.items()))


def _made_candidate(planner: Planner, chain: Chain, side: _Side) -> Candidate | None:
    """The candidate, or None where the algebra refuses: the planner notes why."""
    try:
        structure = _folded(planner, chain, side, torch.device("meta"))
    except NotFoldable as refusal:
        planner.refusals[chain.root] = str(refusal)
        return None
    # What else reads the shortcut keeps it.
    gone = frozenset(node for node in side.nodes if set(node.users) <= side.nodes | {chain.root})
    nodes = gone | {chain.root}
    scope = common_scope([node.meta["scope"] for node in nodes])
    slots: dict[str, int | None] = {str(node.target): i for i, node in enumerate(chain.convolutions)}
    count = len(chain.convolutions)
    channels = ", ".join(str(each.out_channels) for each in structure)
    path = planner.unit.full_scope(scope)
    operators = {"convolution": count, "addition": 1, "activation": len(chain.activations)}
    return Candidate(
        operators=[*chain.nodes, chain.root],
        draft=Draft(slots, (DraftRewire(scope, chain.last, chain.root, nodes, None),)),
        make=partial(_make, planner, chain, side),
        folded=[FoldedRegion(path, operators, f"{count} convolutions of {channels} channels, no shortcut")],
    )


def _folded(planner: Planner, chain: Chain, side: _Side, device: torch.device) -> tuple[Convolution, ...]:
    def built(node: fx.Node) -> Convolution:
        operator: Any = planner.operators[node]
        convolution: Convolution = operator.build(device)
        return convolution

    shortcut = None if side.convolution is None else built(side.convolution)
    return fold_shortcut([built(node) for node in chain.convolutions], shortcut)


def _make(planner: Planner, chain: Chain, side: _Side, prove: bool) -> tuple[list[NewLayer], list[float]]:
    folded = _folded(planner, chain, side, torch.device("cpu"))
    distances = []
    if prove:
        new = dict(zip(chain.convolutions, folded, strict=True))
        nodes, source = chain.nodes | side.nodes | {chain.root}, chain.source
        if chain.activations != side.activations:  # exact on what the activation before the chain writes
            nodes, (source,) = nodes | {source}, source.all_input_nodes
        distances.append(prove_chain(nodes, source, chain.root, chain.last, new, planner.constants))
    kind = planner.unit.kinds[chain.root]
    layers = []
    for index, convolution in enumerate(folded):

        def build(index: int = index) -> Any:
            return layer(_folded(planner, chain, side, torch.device("cpu"))[index])

        layers.append(new_layer(build, layer(convolution), kind))
    return layers, distances
