"""Turn regions into edits of the model: new layers in the place of old ones, and new wiring inside a module."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum

from torch import fx, nn

from refold.errors import NotFoldable
from refold.folding.drafts import Draft, DraftRewire, Rebuild
from refold.folding.layers import NewLayer
from refold.folding.planning import Planner
from refold.folding.report import FoldedRegion
from refold.folding.tracing import Scope, Unit, forward_name


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


@dataclass(frozen=True)
class Candidate:
    """A part of a unit that is folded as a whole or not at all."""

    operators: list[fx.Node]
    """Every operator that goes."""
    draft: Draft
    make: Callable[[bool], tuple[list[NewLayer], list[float]]]
    """The draft's layers and, if asked for, how far each is from what it replaces. Raises NotFoldable."""
    folded: list[FoldedRegion]


@dataclass
class Edits:
    """All edits of one unit. Paths are inside the unit."""

    slots: dict[str, nn.Module] = field(default_factory=dict)
    rewires: list[Rewire | Rebuild] = field(default_factory=list)
    applied: list[Candidate] = field(default_factory=list)
    extent: Extent = Extent.EVERYTHING
    made: list[NewLayer] = field(default_factory=list)


def edits_of(
    planner: Planner, made: Iterable[tuple[Candidate, list[NewLayer]]], shared: set[int], extent: Extent
) -> Edits:
    """The edits that put every candidate, with its layers, into effect; refusals are noted in the planner.

    A module that is called several times is changed only where every call takes part in the same way. `shared` are
    the ids of modules that other units call too. `extent` is how much of it to do.
    """
    unit = planner.unit
    groups: dict[frozenset[object], list[tuple[Candidate, list[NewLayer]]]] = defaultdict(list)
    for candidate, layers in made:
        groups[candidate.draft.signature(unit)].append((candidate, layers))
    totals = count_calls(unit)
    edits = Edits(extent=extent)
    for members in groups.values():
        first, new = members[0]
        try:
            require_alone(unit, first.draft, len(members), totals, shared)
            rewired = first.draft.rewires or first.draft.rebuilds
            if extent is Extent.NOTHING or (extent is Extent.IN_PLACE and rewired):
                raise NotFoldable("the code around it does not run with the folded module in its place")
        except NotFoldable as refusal:
            for member, _ in members:
                planner.refusals.update(dict.fromkeys(member.operators, str(refusal)))
            continue
        edits.applied += [member for member, _ in members]
        edits.made += new
        for path, layer_index in first.draft.slots.items():
            edits.slots[path] = nn.Identity().eval() if layer_index is None else new[layer_index].module
        for member, _ in members:
            edits.rewires += [
                Rewire(r.scope, r.source, r.root, r.nodes, None if r.layer is None else new[r.layer].module)
                for r in member.draft.rewires
            ]
            edits.rewires += member.draft.rebuilds
    return edits


def count_calls(unit: Unit) -> tuple[Counter[str], Counter[str]]:
    """How often each layer, and each module that was traced into, is called."""
    layers = Counter(str(node.target) for node in unit.graph.nodes if node.op == "call_module")
    return layers, Counter(scope[-1][0] if scope else "" for scope in unit.calls)


def require_alone(
    unit: Unit, draft: Draft, members: int, totals: tuple[Counter[str], Counter[str]], shared: set[int]
) -> None:
    """Refuse an edit that would be seen from a call, or from code, which is no part of these regions."""
    places = [(path, totals[0][path]) for path in draft.slots]
    inside: tuple[DraftRewire | Rebuild, ...] = (*draft.rewires, *draft.rebuilds)
    places += [(r.scope[-1][0], totals[1][r.scope[-1][0]]) for r in inside if r.scope]
    read = {str(node.target).rpartition(".")[0] for node in unit.graph.nodes if node.op == "get_attr"}
    for rewire in inside:
        forward_name(unit.module.get_submodule(rewire.scope[-1][0] if rewire.scope else ""))
    for path, calls in places:
        if calls != members:
            raise NotFoldable(f"{unit.full_path(path)} is called {calls} times, in different surroundings")
        if id(unit.module.get_submodule(path)) in shared:
            raise NotFoldable(f"{unit.full_path(path)} is shared with a part that was traced by itself")
        if path in draft.slots and path in read:
            raise NotFoldable(f"the weights of {unit.full_path(path)} are read by other code too")
