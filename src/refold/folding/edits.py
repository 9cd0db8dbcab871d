"""Turn regions into edits of the model: new layers in the place of old ones, and new wiring inside a module."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

from torch import fx, nn

from refold.errors import NotFoldable
from refold.folding.layers import layer, require_fit, rescaled
from refold.folding.operators import Map, Same, inputs_of
from refold.folding.planning import Planner, Region
from refold.folding.tracing import Key, Scope, Unit, fixed_arguments


class Extent(Enum):
    """How much of a plan to put into effect; less of it is tried where a rewritten network does not run."""

    EVERYTHING = "everything"
    IN_PLACE = "layers in their own places"
    NOTHING = "nothing"


@dataclass(frozen=True)
class Rewire:
    """Inside one module call, let `root` be `layer(source)` (None: `source` itself) instead of what `nodes` compute."""

    scope: Scope
    source: fx.Node
    root: fx.Node
    nodes: frozenset[fx.Node]
    layer: nn.Module | None


@dataclass
class Edits:
    """All edits of one unit. Paths are inside the unit."""

    slots: dict[str, nn.Module] = field(default_factory=dict)
    rewires: list[Rewire] = field(default_factory=list)
    applied: list[Region] = field(default_factory=list)
    made: list[tuple[nn.Module, Region]] = field(default_factory=list)
    """Every new layer, still in float64, and a region that it stands for."""


def edits_of(planner: Planner, regions: Iterable[Region], shared: set[int], extent: Extent) -> Edits:
    """The edits that put every region into effect; refusals are noted in the planner.

    A module that is called several times is changed only where every call takes part in the same way. `shared` are
    the ids of modules that other units call too. `extent` is how much of it to do.
    """
    unit = planner.unit
    groups: dict[frozenset[object], list[tuple[Region, _Draft]]] = defaultdict(list)
    for candidate in regions:
        plan = _draft(planner, candidate)
        groups[plan.signature(unit)].append((candidate, plan))
    totals = _totals(unit)
    edits = Edits()
    for members in groups.values():
        region, draft = members[0]
        try:
            _require_alone(unit, draft, len(members), totals, shared)
            if extent is Extent.NOTHING or (extent is Extent.IN_PLACE and draft.rewires):
                raise NotFoldable("the code around it does not run with the folded module in its place")
            made = _made_layer(unit, region)
        except NotFoldable as refusal:
            for member, _ in members:
                planner.refusals.update(dict.fromkeys(member.operators, str(refusal)))
            continue
        edits.applied += [member for member, _ in members]
        edits.made.append((made, region))
        for path, emits in draft.slots.items():
            edits.slots[path] = made if emits else nn.Identity()
        for _, other in members:
            edits.rewires += [
                Rewire(r.scope, r.source, r.root, r.nodes, made if r.emits else None) for r in other.rewires
            ]
    return edits


@dataclass(frozen=True)
class _DraftRewire:
    scope: Scope
    source: fx.Node
    root: fx.Node
    nodes: frozenset[fx.Node]
    emits: bool

    def signature(self, unit: Unit) -> object:
        path = self.scope[-1][0] if self.scope else ""
        keys = frozenset(relative_key(node, self.scope) for node in self.nodes)
        fixed = fixed_arguments(unit.module.get_submodule(path), unit.calls[self.scope])
        return path, repr(sorted(fixed.items())), keys, relative_key(self.root, self.scope), self.emits


@dataclass(frozen=True)
class _Draft:
    slots: dict[str, bool]
    """Paths of layers to replace: True by the new layer, False by nothing."""
    rewires: tuple[_DraftRewire, ...]

    def signature(self, unit: Unit) -> frozenset[object]:
        return frozenset([*self.slots.items(), *(rewire.signature(unit) for rewire in self.rewires)])


def relative_key(node: fx.Node, scope: Scope) -> Key:
    """The key of a node as it is inside one call of an enclosing module."""
    own, label, number = node.meta["key"]
    return own[len(scope) :], label, number


def _draft(planner: Planner, region: Region) -> _Draft:
    """A chain of layers is edited in their places, which keeps the class around them; anything else is rewired."""
    if _is_chain(planner, region):
        draft = _chain_draft(region)
        if all(rewire.scope for rewire in draft.rewires):
            return draft
    scope = _common_scope([node.meta["scope"] for node in region.nodes])
    slots = {str(region.source.target): True} if region.rescales else {}
    rewire = _DraftRewire(scope, region.source, region.root, region.nodes, not region.rescales)
    return _Draft(slots, (rewire,))


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


def _chain_draft(region: Region) -> _Draft:
    emitter = region.source if region.rescales else None
    slots: dict[str, bool] = {}
    rewires: list[_DraftRewire] = []
    if emitter is not None:
        slots[str(emitter.target)] = True
    for node, operator in region.operators.items():
        emits = emitter is None and isinstance(operator, Map) and operator.multiplies
        if emits:
            emitter = node
        if isinstance(operator, Same):
            continue
        if node.op == "call_module":
            slots[str(node.target)] = emits
        else:
            (source,) = inputs_of(operator)
            rewires.append(_DraftRewire(node.meta["scope"], source, node, frozenset([node]), emits))
    return _Draft(slots, tuple(rewires))


def _common_scope(scopes: list[Scope]) -> Scope:
    shortest = min(scopes, key=len)
    length = next((i for i in range(len(shortest)) if len({s[i] for s in scopes}) > 1), len(shortest))
    return shortest[:length]


def _totals(unit: Unit) -> tuple[Counter[str], Counter[str]]:
    """How often each layer, and each module that was traced into, is called."""
    layers = Counter(str(node.target) for node in unit.graph.nodes if node.op == "call_module")
    return layers, Counter(scope[-1][0] if scope else "" for scope in unit.calls)


def _require_alone(
    unit: Unit, draft: _Draft, members: int, totals: tuple[Counter[str], Counter[str]], shared: set[int]
) -> None:
    """Refuse an edit that would be seen from a call, or from code, which is no part of these regions."""
    places = [(path, totals[0][path]) for path in draft.slots]
    places += [(r.scope[-1][0], totals[1][r.scope[-1][0]]) for r in draft.rewires if r.scope]
    read = {str(node.target).rpartition(".")[0] for node in unit.graph.nodes if node.op == "get_attr"}
    for path, calls in places:
        if calls != members:
            raise NotFoldable(f"{unit.full_path(path)} is called {calls} times, in different surroundings")
        if id(unit.module.get_submodule(path)) in shared:
            raise NotFoldable(f"{unit.full_path(path)} is shared with a part that was traced by itself")
        if path in draft.slots and path in read:
            raise NotFoldable(f"the weights of {unit.full_path(path)} are read by other code too")


def _made_layer(unit: Unit, region: Region) -> nn.Module:
    dtype, device = unit.kinds[region.root]
    if region.rescales:
        made = rescaled(unit.attribute(str(region.source.target)), region.convolution)
    else:
        made = layer(region.convolution)
    require_fit(made, dtype)
    return made.to(device)
