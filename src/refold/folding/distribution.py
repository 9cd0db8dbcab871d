"""Scales and shifts behind a concatenation or a sum of different inputs: each part takes up its own share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, fx

from refold.algebra import is_channelwise, scale_outputs
from refold.errors import NotFoldable
from refold.folding.operators import Concatenation, Map, Same, Sum
from refold.folding.planning import Planner, Region

_CPU, _META = torch.device("cpu"), torch.device("meta")


@dataclass(frozen=True)
class Bundle:
    """Regions that fold together or not at all, and the scale and shift (a batch norm) that they take up, if any."""

    regions: tuple[Region, ...]
    absorbed: fx.Node | None = None

    @property
    def operators(self) -> list[fx.Node]:
        """Every operator that goes."""
        own = [node for region in self.regions for node in region.operators]
        return own if self.absorbed is None else [*own, self.absorbed]


@dataclass(frozen=True)
class _Share:
    """What one part of a concatenation or sum has to take up: `scale * part + shift`, `[channels]` each."""

    part: fx.Node
    scale: Tensor
    shift: Tensor | None


def bundle(planner: Planner, regions: list[Region]) -> list[Bundle]:
    """The regions, those bundled that together can take up a batch norm which no single region could.

    `norm(cat(a(x), b(y)))` is `cat(a'(x), b'(y))`, each of the two scaled by its own channels of the norm, and
    `norm(a(x) + b(y))` is `a'(x) + b'(y)`: no multiply-accumulate is added and the norm is gone.
    """
    free = {region.root: region for region in regions}
    folded = {node for region in regions for node in region.operators}
    bundles = []
    for node in planner.unit.graph.nodes:
        if node not in planner.demanded or node in folded:
            continue
        shares = _shares_behind(planner, node, free)
        if shares is None or not all(share.part in free or share.part not in folded for share in shares):
            continue
        parts = [
            free.pop(share.part) if share.part in free else _single(planner, share.part) for share in shares
        ]
        bundles.append(
            Bundle(tuple(_with_share(r, s) for r, s in zip(parts, shares, strict=True)), absorbed=node)
        )
    bundles += [Bundle((region,)) for region in free.values()]
    return sorted(bundles, key=lambda b: planner.order[b.regions[0].root])


def _shares_behind(planner: Planner, node: fx.Node, free: dict[fx.Node, Region]) -> list[_Share] | None:
    """How the scale and shift of `node` divide among convolutions before it; None where they do not."""
    operator = planner.operators.get(node)
    if not isinstance(operator, Map) or operator.multiplies or not is_channelwise(operator.build(_META)):
        return None
    convolution = operator.build(_CPU)
    axes = convolution.spatial_axes
    try:
        shares = _divide(
            planner, _Share(operator.input, convolution.weight.flatten(), convolution.bias), node, axes
        )
    except NotFoldable:
        return None
    layouts = {_spatial_axes(planner, share.part, free) for share in shares}
    return shares if layouts == {axes} and len({s.part for s in shares}) == len(shares) else None


def _spatial_axes(planner: Planner, node: fx.Node, free: dict[fx.Node, Region]) -> int | None:
    """The layout of a convolution that can take up a share; None where `node` is no such convolution."""
    if node in free:
        return free[node].structure.spatial_axes
    operator = planner.operators.get(node)
    if isinstance(operator, Map) and operator.multiplies:
        return operator.build(_META).spatial_axes
    return None


def _divide(planner: Planner, share: _Share, reader: fx.Node, axes: int) -> list[_Share]:
    node = share.part
    if set(node.users) - planner.checks != {reader} or not planner.same_call(node, reader):
        raise NotFoldable("somebody else reads it")
    operator = planner.operators.get(node)
    if isinstance(operator, Same):
        return _divide(planner, replace(share, part=operator.input), node, axes)
    if isinstance(operator, Concatenation) and operator.spatial_axes == axes:
        return _divide_concatenation(planner, share, operator, axes)
    if isinstance(operator, Sum):
        shares = []
        rest = share.shift
        for value, factor in zip(operator.inputs, operator.factors, strict=True):
            shift = None if rest is None or factor == 0 else rest / factor
            rest = rest if shift is None else None
            shares += _divide(planner, _Share(value, share.scale, shift), node, axes)
        if rest is not None:
            raise NotFoldable("all of it is multiplied by zero")
        return shares
    return [share]


def _divide_concatenation(
    planner: Planner, share: _Share, operator: Concatenation, axes: int
) -> list[_Share]:
    shares, start = [], 0
    for value in operator.inputs:
        shape = planner.unit.shapes[value]
        channels = slice(start, start + (shape[1] if axes else shape[-1]))
        shift = None if share.shift is None else share.shift[channels]
        shares += _divide(planner, _Share(value, share.scale[channels], shift), share.part, axes)
        start = channels.stop
    return shares


def _single(planner: Planner, node: fx.Node) -> Region:
    """A region of one convolution that runs as it is."""
    operator = planner.operators[node]
    assert isinstance(operator, Map)
    structure, compute = operator.build(_META), partial(operator.build, _CPU)
    return Region(operator.input, node, {node: operator}, frozenset([node]), structure, compute)


def _with_share(region: Region, share: _Share) -> Region:
    """The region with the scale and the shift on top; its structure gets a bias where it has none."""
    scale, shift = share.scale, share.shift
    structure = scale_outputs(region.structure, scale.to(_META), None if shift is None else shift.to(_META))
    return replace(
        region,
        structure=structure,
        convolution=lambda: scale_outputs(region.convolution(), scale, shift),
        tail=(scale, shift),
    )
