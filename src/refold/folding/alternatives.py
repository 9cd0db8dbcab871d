"""Exact rewrites that pay on some engines only: each is offered to an objective, and those that it chooses are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from refold.errors import NotFoldable
from refold.folding.channels import ChannelClass, Channels, Role, connected
from refold.folding.extracting import Extract, extract
from refold.folding.planning import Planner
from refold.folding.report import FoldedRegion
from refold.folding.reshaping import reshaped_products
from refold.folding.rewrite import Rewrite, make
from refold.folding.shortcuts import folded_shortcuts
from refold.folding.splitting import Layout, Splitting, parts_of
from refold.recording.recording import common_path

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
    tolerance: float | None
    """To which what it is shown is proved before; None for not at all."""
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


def passes(choose: Chosen) -> dict[str, Callable[[Planner], list[Rewrite]]]:
    """What to rewrite, one after the other, by kind."""
    return {
        SHORTCUT: lambda planner: list(_chosen(SHORTCUT, folded_shortcuts(planner), choose, planner)),
        SINK: lambda planner: _sinking(choose, planner),
        RESHAPE: lambda planner: list(_chosen(RESHAPE, reshaped_products(planner), choose, planner)),
    }


def _chosen(kind: str, found: list[Rewrite], choose: Chosen, planner: Planner) -> Iterator[Rewrite]:
    """Those rewrites of one kind that are chosen, each measured by itself."""
    for rewrite in found:
        try:
            part = extract(planner, set(rewrite.operators) | rewrite.nodes, rewrite)
            make(rewrite, planner.constants, None)
        except NotFoldable as refusal:
            planner.refusals.update(dict.fromkeys(rewrite.operators, str(refusal)))
            continue
        region = rewrite.folded[0]
        if choose([_alternative(kind, rewrite.operators[-1], region.path, region.layer, part)]) is not None:
            yield rewrite


def _sinking(choose: Chosen, planner: Planner) -> list[Rewrite]:
    """Concatenations that are chosen to sink into the dense convolutions that read them."""
    channels = Channels(planner)
    chosen: list[Splitting] = []
    for own in list(channels.classes.values()):
        offers = {}
        for name, splitting in _splittings(channels, own).items():
            try:
                rewrite = _rewrite(channels, [splitting])
                make(rewrite, planner.constants, choose.tolerance)
                part = extract(planner, splitting.touched, rewrite)
            except NotFoldable as refusal:
                planner.refusals.update(dict.fromkeys(_joins(channels, own), str(refusal)))
                continue
            offer = _alternative(SINK, _joins(channels, own)[0], rewrite.folded[0].path, name, part)
            offers[offer.name] = (offer, splitting)
        choice = choose([offer for offer, _ in offers.values()]) if offers else None
        if choice is not None:
            chosen.append(offers[choice.name][1])
    return [_rewrite(channels, group) for group in _together(chosen)]


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


def _rewrite(channels: Channels, group: list[Splitting]) -> Rewrite:
    """One rewrite for splittings that change the same operators; where two lay out one class, the wider one holds."""
    layouts: dict[int, tuple[ChannelClass, Layout]] = {}
    for splitting in group:
        for own, layout in splitting.layouts:
            known = layouts.get(id(own), (own, layout))[1]
            widest = max(known, layout, key=lambda parts: (len(parts), sum(p.width for p in parts)))
            layouts[id(own)] = (own, widest)
    whole = Splitting(channels, tuple(layouts.values()))
    nodes = frozenset(node for node in whole.touched if node.op not in ("placeholder", "output"))
    steps = whole.steps()
    joins = [node for own, _ in whole.layouts for node in _joins(channels, own)]
    mixers = {node for own, _ in whole.layouts if _joins(channels, own) for node in channels.mixers(own)}
    layer = f"sunk into {len(mixers)} convolutions" if len(mixers) > 1 else "sunk into a convolution"
    path = common_path(nodes)
    return Rewrite(
        steps=steps,
        nodes=nodes,
        outputs=tuple(node for node in steps if "number" not in node.meta),
        operators=joins,
        folded=[FoldedRegion(path, {"concatenation": len(joins)}, layer)],
        convolutions=tuple(
            c for n in sorted(mixers)[:1] if (c := channels.convolution(n, torch.device("meta")))
        ),
        joint=True,
        key=("sink", *joins),
    )


def _alternative(kind: str, node: fx.Node, path: str, change: str, part: Extract) -> Alternative:
    name = f"{kind} {node.name}: {change}"
    return Alternative(name, kind, path, change, part.before, part.after, part.shape, part.dtype)
