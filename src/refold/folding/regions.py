"""Regions of a unit as candidates for folding: each with its layer, its proof and its place."""

from __future__ import annotations

from collections import Counter
from functools import partial

from torch import nn

from refold.algebra import Convolution
from refold.folding.commuting import commuting_candidates
from refold.folding.distribution import Bundle, bundle
from refold.folding.drafts import bundle_draft
from refold.folding.edits import Candidate
from refold.folding.layers import NewLayer, layer, new_layer, rescaled
from refold.folding.planning import Planner, Region
from refold.folding.proof import prove_region
from refold.folding.reasons import operator_kind
from refold.folding.report import FoldedRegion


def region_candidates(planner: Planner, *, depthwise_counts: bool = True) -> list[Candidate]:
    """Every linear part of a unit that is worth a fold; `depthwise_counts` as for `Planner.plan`."""
    found = [
        Candidate(
            operators=each.operators,
            draft=bundle_draft(planner, each),
            make=partial(_make, planner, each),
            folded=[_describe(planner, region) for region in each.regions],
        )
        for each in bundle(planner, planner.plan(depthwise_counts=depthwise_counts))
    ]
    return found + commuting_candidates(planner, {node for each in found for node in each.operators})


def _make(planner: Planner, candidate: Bundle, prove: bool) -> tuple[list[NewLayer], list[float]]:
    layers, distances = [], []
    for region in candidate.regions:
        convolution = region.convolution()
        if prove:
            distances.append(prove_region(region, convolution, planner.constants))
        layers.append(_layer(planner, region, convolution))
    return layers, distances


def _layer(planner: Planner, region: Region, convolution: Convolution) -> NewLayer:
    unit = planner.unit
    original = unit.attribute(str(region.source.target)) if region.rescales else None

    def build(convolution: Convolution) -> nn.Module:
        return layer(convolution) if original is None else rescaled(original, convolution)

    return new_layer(lambda: build(region.convolution()), build(convolution), unit.kinds[region.root])


def _describe(planner: Planner, region: Region) -> FoldedRegion:
    kinds = Counter(operator_kind(node, planner) for node in region.operators)
    convolution = region.structure
    size = "×".join(map(str, convolution.kernel_size))
    kind = f"{size} convolution" if size else "linear"
    if region.rescales:
        kind = type(planner.unit.attribute(str(region.source.target))).__name__
    groups = f", {convolution.groups} groups" if convolution.groups > 1 and not region.rescales else ""
    channels = f"{convolution.in_channels} to {convolution.out_channels} channels"
    path = planner.unit.full_scope(region.root.meta["scope"])
    return FoldedRegion(path, dict(kinds), f"{kind}, {channels}{groups}")
