"""Turn regions into edits of the model: new layers in the place of old ones, and new wiring inside a module."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from functools import partial

from torch import Tensor, fx, nn

from refold.algebra import Convolution
from refold.errors import NotFoldable
from refold.folding.distribution import Bundle
from refold.folding.layers import layer, require_fit, rescaled
from refold.folding.operators import Linear, Map, Same, inputs_of
from refold.folding.planning import Planner, Region
from refold.folding.tracing import Key, Scope, Unit, fixed_arguments, forward_name


@dataclass(frozen=True)
class NewLayer:
    """A layer in the place of a region, rounded to the dtype of the model, and how to build it in float64."""

    module: nn.Module
    build: Callable[[], nn.Module]

    def exact(self) -> dict[int, Callable[[], Tensor]]:
        """What each rounded parameter is in float64: built when it is read, and only biases are kept."""
        biases: dict[str, Tensor] = {}

        def compute(name: str) -> Tensor:
            if name in biases:
                return biases[name]
            parameters = dict(self.build().named_parameters())
            biases.update((key, value) for key, value in parameters.items() if value.dim() == 1)
            return parameters[name]

        return {id(value): partial(compute, name) for name, value in self.module.named_parameters()}


class Extent(Enum):
    """How much of a plan to put into effect; less of it is tried where a rewritten network does not run."""

    EVERYTHING = "everything"
    KEEPING_CLASSES = "everything, but no block is replaced by its only layers"
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
    applied: list[Bundle] = field(default_factory=list)
    extent: Extent = Extent.EVERYTHING
    made: list[NewLayer] = field(default_factory=list)


def edits_of(
    planner: Planner, bundles: Iterable[tuple[Bundle, list[NewLayer]]], shared: set[int], extent: Extent
) -> Edits:
    """The edits that put every bundle of regions, with its layers, into effect; refusals are noted in the planner.

    A module that is called several times is changed only where every call takes part in the same way. `shared` are
    the ids of modules that other units call too. `extent` is how much of it to do.
    """
    unit = planner.unit
    groups: dict[frozenset[object], list[tuple[Bundle, list[NewLayer], _Draft]]] = defaultdict(list)
    for candidate, layers in bundles:
        plan = _bundle_draft(planner, candidate)
        groups[plan.signature(unit)].append((candidate, layers, plan))
    totals = _totals(unit)
    edits = Edits(extent=extent)
    for members in groups.values():
        _, made, draft = members[0]
        try:
            _require_alone(unit, draft, len(members), totals, shared)
            if extent is Extent.NOTHING or (extent is Extent.IN_PLACE and draft.rewires):
                raise NotFoldable("the code around it does not run with the folded module in its place")
        except NotFoldable as refusal:
            for member, *_ in members:
                planner.refusals.update(dict.fromkeys(member.operators, str(refusal)))
            continue
        edits.applied += [member for member, *_ in members]
        edits.made += made
        for path, layer_index in draft.slots.items():
            edits.slots[path] = nn.Identity() if layer_index is None else made[layer_index].module
        for *_, other in members:
            edits.rewires += [
                Rewire(r.scope, r.source, r.root, r.nodes, None if r.layer is None else made[r.layer].module)
                for r in other.rewires
            ]
    return edits


@dataclass(frozen=True)
class _DraftRewire:
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
class _Draft:
    slots: dict[str, int | None]
    """Paths of layers to replace, by which of the bundle's new layers; None is replaced by nothing."""
    rewires: tuple[_DraftRewire, ...]

    def signature(self, unit: Unit) -> frozenset[object]:
        return frozenset([*self.slots.items(), *(rewire.signature(unit) for rewire in self.rewires)])


def relative_key(node: fx.Node, scope: Scope) -> Key:
    """The key of a node as it is inside one call of an enclosing module."""
    own, label, number = node.meta["key"]
    return own[len(scope) :], label, number


def _bundle_draft(planner: Planner, bundle: Bundle) -> _Draft:
    slots: dict[str, int | None] = {}
    rewires: list[_DraftRewire] = []
    for index, region in enumerate(bundle.regions):
        draft = _draft(planner, region, index)
        slots.update(draft.slots)
        rewires += draft.rewires
    if bundle.absorbed is not None:
        _edit(bundle.absorbed, planner.operators[bundle.absorbed], None, slots, rewires)
    return _Draft(slots, tuple(rewires))


def _draft(planner: Planner, region: Region, index: int) -> _Draft:
    """A chain of layers is edited in their places, which keeps the class around them; anything else is rewired."""
    if _is_chain(planner, region):
        draft = _chain_draft(region, index)
        if all(rewire.scope for rewire in draft.rewires):
            return draft
    scope = common_scope([node.meta["scope"] for node in region.nodes])
    slots: dict[str, int | None] = {str(region.source.target): index} if region.rescales else {}
    layer = None if region.rescales else index
    return _Draft(slots, (_DraftRewire(scope, region.source, region.root, region.nodes, layer),))


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


def _chain_draft(region: Region, index: int) -> _Draft:
    slots: dict[str, int | None] = {str(region.source.target): index} if region.rescales else {}
    rewires: list[_DraftRewire] = []
    placed = region.rescales
    for node, operator in region.operators.items():
        emits = not placed and isinstance(operator, Map) and operator.multiplies
        placed = placed or emits
        if not isinstance(operator, Same):
            _edit(node, operator, index if emits else None, slots, rewires)
    return _Draft(slots, tuple(rewires))


def _edit(
    node: fx.Node,
    operator: Linear,
    layer: int | None,
    slots: dict[str, int | None],
    rewires: list[_DraftRewire],
) -> None:
    """Let a new layer, or nothing, stand in the place of one operator of one input."""
    if node.op == "call_module":
        slots[str(node.target)] = layer
    else:
        (source,) = inputs_of(operator)
        rewires.append(_DraftRewire(node.meta["scope"], source, node, frozenset([node]), layer))


def common_scope(scopes: list[Scope]) -> Scope:
    """The innermost module call that all of the scopes are in."""
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
    for rewire in draft.rewires:
        forward_name(unit.module.get_submodule(rewire.scope[-1][0] if rewire.scope else ""))
    for path, calls in places:
        if calls != members:
            raise NotFoldable(f"{unit.full_path(path)} is called {calls} times, in different surroundings")
        if id(unit.module.get_submodule(path)) in shared:
            raise NotFoldable(f"{unit.full_path(path)} is shared with a part that was traced by itself")
        if path in draft.slots and path in read:
            raise NotFoldable(f"the weights of {unit.full_path(path)} are read by other code too")


def new_layer(unit: Unit, region: Region, convolution: Convolution) -> NewLayer:
    """The layer that computes `convolution` in the place of a region. Raises NotFoldable where there is none."""
    dtype, device = unit.kinds[region.root]
    original = unit.attribute(str(region.source.target)) if region.rescales else None

    def build(convolution: Convolution) -> nn.Module:
        return layer(convolution) if original is None else rescaled(original, convolution)

    made = build(convolution)
    require_fit(made, dtype)
    return NewLayer(made.to(device, dtype), lambda: build(region.convolution()).to(device))
