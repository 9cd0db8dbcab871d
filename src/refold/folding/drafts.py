"""Where new layers go: in the places of old ones, or into the wiring inside a module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx, nn

from refold.folding.distribution import Bundle
from refold.folding.operators import Linear, Map, Same, inputs_of
from refold.folding.planning import Planner, Region
from refold.folding.tracing import Key, Scope, Unit, fixed_arguments


@dataclass(frozen=True)
class DraftRewire:
    scope: Scope
    source: fx.Node
    root: fx.Node
    nodes: frozenset[fx.Node]
    layer: int | None
    """Which of the bundle's new layers stands for the nodes; None where nothing does."""

    def signature(self, unit: Unit) -> object:
        path = self.scope[-1][0] if self.scope else ""
        keys = frozenset(relative_key(node, self.scope) for node in self.nodes)
        fixed = fixed_arguments(unit.module.get_submodule(path), unit.calls[self.scope])
        return path, repr(sorted(fixed.items())), keys, relative_key(self.root, self.scope), self.layer


@dataclass(frozen=True)
class Rebuild:
    """Inside one module call, `write` changes the operators `nodes` of its graph, and these may go."""

    scope: Scope
    nodes: frozenset[fx.Node]
    write: Callable[[fx.Graph, nn.Module, Callable[[fx.Node], fx.Node]], None]
    """Takes the graph, the module and a function that finds the operators of the unit in the graph."""


@dataclass(frozen=True)
class Draft:
    slots: dict[str, int | None]
    """Paths of layers to replace, by which of the bundle's new layers; None is replaced by nothing."""
    rewires: tuple[DraftRewire, ...] = ()
    rebuilds: tuple[Rebuild, ...] = ()

    @property
    def nodes(self) -> set[fx.Node]:
        """Every operator that is wired anew."""
        groups = [wired.nodes for wired in self.rewires] + [rebuilt.nodes for rebuilt in self.rebuilds]
        return set().union(*groups)

    def signature(self, unit: Unit) -> frozenset[object]:
        rewires = (rewire.signature(unit) for rewire in self.rewires)
        return frozenset([*self.slots.items(), *rewires, *self.rebuilds])


def relative_key(node: fx.Node, scope: Scope) -> Key:
    """The key of a node as it is inside one call of an enclosing module."""
    own, label, number = node.meta["key"]
    return own[len(scope) :], label, number


def bundle_draft(planner: Planner, bundle: Bundle) -> Draft:
    slots: dict[str, int | None] = {}
    rewires: list[DraftRewire] = []
    for index, region in enumerate(bundle.regions):
        draft = _draft(planner, region, index)
        slots.update(draft.slots)
        rewires += draft.rewires
    if bundle.absorbed is not None:
        edit(bundle.absorbed, planner.operators[bundle.absorbed], None, slots, rewires)
    return Draft(slots, tuple(rewires))


def _draft(planner: Planner, region: Region, index: int) -> Draft:
    """A chain of layers is edited in their places, which keeps the class around them; anything else is rewired."""
    if _is_chain(planner, region):
        draft = _chain_draft(region, index)
        if all(rewire.scope for rewire in draft.rewires):
            return draft
    scope = common_scope([node.meta["scope"] for node in region.nodes])
    slots: dict[str, int | None] = {str(region.source.target): index} if region.rescales else {}
    layer = None if region.rescales else index
    return Draft(slots, (DraftRewire(scope, region.source, region.root, region.nodes, layer),))


def _is_chain(planner: Planner, region: Region) -> bool:
    """Whether each operator reads only the one before it, and nobody else does."""
    previous = region.source
    for node, operator in region.operators.items():
        if inputs_of(operator) != (previous,) or previous not in node.all_input_nodes:
            return False
        if previous is not region.source and set(previous.users) - planner.checks != {node}:
            return False
        previous = node
    return True


def _chain_draft(region: Region, index: int) -> Draft:
    slots: dict[str, int | None] = {str(region.source.target): index} if region.rescales else {}
    rewires: list[DraftRewire] = []
    placed = region.rescales
    for node, operator in region.operators.items():
        emits = not placed and isinstance(operator, Map) and operator.multiplies
        placed = placed or emits
        if not isinstance(operator, Same):
            edit(node, operator, index if emits else None, slots, rewires)
    return Draft(slots, tuple(rewires))


def edit(
    node: fx.Node,
    operator: Linear,
    layer: int | None,
    slots: dict[str, int | None],
    rewires: list[DraftRewire],
) -> None:
    """Let a new layer, or nothing, stand in the place of one operator of one input."""
    if node.op == "call_module":
        slots[str(node.target)] = layer
    else:
        (source,) = inputs_of(operator)
        rewires.append(DraftRewire(node.meta["scope"], source, node, frozenset([node]), layer))


def common_scope(scopes: list[Scope]) -> Scope:
    """The innermost module call that all of the scopes are in."""
    shortest = min(scopes, key=len)
    length = next((i for i in range(len(shortest)) if len({s[i] for s in scopes}) > 1), len(shortest))
    return shortest[:length]
