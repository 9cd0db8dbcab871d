"""Exact rewrites that pay on some engines only: each is offered to a judge, and those that it chooses are folded in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from refold.errors import NotFoldable
from refold.folding.attempt import Finder
from refold.folding.channels import ChannelClass, Channels, Role, connected
from refold.folding.drafts import Draft, Rebuild, common_scope
from refold.folding.edits import Candidate, count_calls, require_alone
from refold.folding.extracting import Extract, Write, extract
from refold.folding.layers import NewLayer
from refold.folding.planning import Planner
from refold.folding.report import FoldedRegion
from refold.folding.reshaping import reshaping_candidates
from refold.folding.shortcuts import shortcut_candidates
from refold.folding.splitting import Layout, Splitting, parts_of
from refold.folding.tracing import Scope

SINK, SHORTCUT, RESHAPE = "sink", "shortcut", "reshape"


@dataclass(frozen=True)
class Alternative:
    """One way to compute a part of a network, which `before` is a copy of; both take one tensor `x`."""

    name: str
    """The same each time that a network of this architecture is folded."""
    kind: str
    path: str
    """The module that the part is in."""
    change: str
    before: Callable[[], nn.Module]
    after: Callable[[], nn.Module]
    shape: tuple[int, ...]
    """Of `x`, as the example gives it."""
    dtype: torch.dtype


Judge = Callable[[Sequence[Alternative]], Alternative | None]
"""Chooses one of several ways to compute the same part, or None to leave it as it is."""


@dataclass
class Chosen:
    """A judge whose choices are remembered by name."""

    judge: Judge
    prove: bool = True
    """Whether what it is shown is proved before."""
    names: list[str] = field(default_factory=list)
    """What it chose."""
    asked: dict[str, Alternative | None] = field(default_factory=dict)

    def __call__(self, alternatives: Sequence[Alternative]) -> Alternative | None:
        place = " ".join(alternative.name for alternative in alternatives)
        if place not in self.asked:
            self.asked[place] = choice = self.judge(alternatives)
            self.names += [choice.name] if choice is not None else []
        return self.asked[place]


def by_name(names: Sequence[str]) -> Judge:
    """The judge that chooses the alternatives of these names."""
    return lambda alternatives: next((a for a in alternatives if a.name in names), None)


def finders(choose: Chosen) -> dict[str, Finder]:
    """What to fold, one fold after the other, by kind."""
    return {
        SHORTCUT: partial(_chosen_candidates, SHORTCUT, shortcut_candidates, choose),
        SINK: partial(_sinking_candidates, choose),
        RESHAPE: partial(_chosen_candidates, RESHAPE, reshaping_candidates, choose),
    }


def _chosen_candidates(
    kind: str, find: Callable[[Planner], list[Candidate]], choose: Chosen, planner: Planner
) -> list[Candidate]:
    """Those candidates of one kind that are chosen, each measured by itself; they fold layer by layer."""
    found = []
    for candidate in find(planner):
        try:
            layers, _ = candidate.make(False)
            part = _offered(planner, candidate, set(candidate.operators) | candidate.draft.nodes)
        except NotFoldable as refusal:
            planner.refusals.update(dict.fromkeys(candidate.operators, str(refusal)))
            continue
        write = partial(_edit, planner, candidate, layers)
        region = candidate.folded[0]
        offer = _alternative(kind, planner, candidate.operators[-1], region.path, region.layer, part, write)
        if choose([offer]) is not None:
            found.append(candidate)
    return found


def _offered(planner: Planner, candidate: Candidate, nodes: set[fx.Node]) -> Extract:
    """The part of the network to measure. Raises NotFoldable where the candidate could not be put into effect."""
    require_alone(planner.unit, candidate.draft, 1, count_calls(planner.unit), set())
    return extract(planner, nodes)


def _edit(
    planner: Planner,
    candidate: Candidate,
    layers: list[NewLayer],
    graph: fx.Graph,
    module: nn.Module,
    here: Callable[[fx.Node], fx.Node],
) -> None:
    """Put a candidate into the graph of an extracted part."""
    for path, index in candidate.draft.slots.items():
        module.set_submodule(path, nn.Identity() if index is None else layers[index].module)
    for rewire in candidate.draft.rewires:
        here(rewire.root).replace_all_uses_with(here(rewire.source))


def _sinking_candidates(choose: Chosen, planner: Planner) -> list[Candidate]:
    """Concatenations that are chosen to sink into the dense convolutions that read them."""
    channels = Channels(planner)
    chosen: list[Splitting] = []
    for own in list(channels.classes.values()):
        offers = {}
        for name, splitting in _splittings(channels, own).items():
            try:
                part = _offered(planner, _candidate(channels, [splitting]), splitting.touched)
                if choose.prove:
                    part.prove(splitting.write)
            except NotFoldable as refusal:
                planner.refusals.update(dict.fromkeys(_joins(channels, own), str(refusal)))
                continue
            path = planner.unit.full_scope(common_scope([n.meta["scope"] for n in splitting.touched]))
            first = _joins(channels, own)[0]
            offer = _alternative(SINK, planner, first, path, name, part, splitting.write)
            offers[offer.name] = (offer, splitting)
        choice = choose([offer for offer, _ in offers.values()]) if offers else None
        if choice is not None:
            chosen.append(offers[choice.name][1])
    return [_candidate(channels, group) for group in _together(chosen)]


def _splittings(channels: Channels, own: ChannelClass) -> dict[str, Splitting]:
    """The ways to compute a class in parts, by what they do."""
    sizes = channels.parts(own)
    if sizes is None or not channels.mixers(own):
        return {}
    text = (
        " and ".join(map(str, sizes))
        if len(sizes) < 4
        else f"{len(sizes)} times {min(sizes)} to {max(sizes)}"
    )
    found = {f"{text} channels apart": Splitting(channels, ((own, parts_of(sizes)),))}
    joins = set(_joins(channels, own))
    inputs = {id(c): c for join in joins for v in channels.joined(join) if (c := channels.of(v)) is not None}
    padded = channels.may_be_padded(own, set()) and own not in inputs.values()
    layout = parts_of(sizes, filled=True)
    if layout == parts_of(sizes) or not padded:
        return found
    if all(channels.may_be_padded(c, joins) for c in inputs.values()):
        layouts = [(own, layout), *((c, parts_of([c.channels], filled=True)) for c in inputs.values())]
        widths = " and ".join(str(part.width) for part in layout) if len(layout) < 4 else "multiples of 4"
        found[f"{text} channels apart, filled up to {widths}"] = Splitting(channels, tuple(layouts))
    return found


def _joins(channels: Channels, own: ChannelClass) -> list[fx.Node]:
    return [node for node in own.members if channels.roles[node] is Role.CONCATENATES]


def _together(splittings: list[Splitting]) -> list[list[Splitting]]:
    return [[splittings[i] for i in group] for group in connected([s.touched for s in splittings])]


def _candidate(channels: Channels, group: list[Splitting]) -> Candidate:
    """One edit for splittings that change the same operators; where two lay out one class, the wider one holds."""
    layouts: dict[int, tuple[ChannelClass, Layout]] = {}
    for splitting in group:
        for own, layout in splitting.layouts:
            known = layouts.get(id(own), (own, layout))[1]
            widest = max(known, layout, key=lambda parts: (len(parts), sum(p.width for p in parts)))
            layouts[id(own)] = (own, widest)
    whole = Splitting(channels, tuple(layouts.values()))
    planner = channels.planner
    nodes = frozenset(node for node in whole.touched if node.op not in ("placeholder", "output"))
    scope = _taking_tensors(planner, common_scope([node.meta["scope"] for node in nodes]))
    joins = [node for own, _ in whole.layouts for node in _joins(channels, own)]
    mixers = {node for own, _ in whole.layouts if _joins(channels, own) for node in channels.mixers(own)}
    layer = f"sunk into {len(mixers)} convolutions" if len(mixers) > 1 else "sunk into a convolution"

    def make(prove: bool) -> tuple[list[NewLayer], list[float]]:
        return [], [extract(planner, whole.touched).prove(whole.write)] if prove else []

    return Candidate(
        operators=joins,
        draft=Draft({}, rebuilds=(Rebuild(scope, nodes, whole.write),)),
        make=make,
        folded=[FoldedRegion(planner.unit.full_scope(scope), {"concatenation": len(joins)}, layer)],
    )


def _taking_tensors(planner: Planner, scope: Scope) -> Scope:
    """The innermost call around that is given no list of tensors, which tracing would see as one value."""
    while scope:
        positional, named = planner.unit.calls[scope]
        if all(leaf is value for value in (*positional, *named.values()) for leaf in tree_leaves(value)):
            return scope
        scope = scope[:-1]
    return scope


def _alternative(
    kind: str, planner: Planner, node: fx.Node, path: str, change: str, part: Extract, write: Write
) -> Alternative:
    name = f"{kind} {planner.unit.full_path(node.name)}: {change}"
    after = partial(part.network, write)
    return Alternative(name, kind, path, change, part.network, after, part.shape, part.dtype)
