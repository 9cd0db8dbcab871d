"""The first pass: linear regions become one layer each, and norms divide among the layers before them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container
from dataclasses import dataclass, replace
from functools import partial
from operator import add, mul, sub
from typing import Any

import torch
from torch import Tensor, fx, nn

from refold.algebra import Convolution, is_channelwise, scale_outputs
from refold.errors import NotFoldable
from refold.folding.layers import layer, rescaled, transposed
from refold.folding.planning import Planner
from refold.folding.region import Region
from refold.folding.report import FoldedRegion
from refold.folding.rewrite import FUNCTION, Applied, NewLayer, Operation, Rewrite, Value
from refold.recording.linear import Concatenation, Map, Moved, Same, Sum, inputs_of
from refold.recording.operators import word_of
from refold.recording.recording import path_of

_CPU, _META = torch.device("cpu"), torch.device("meta")


@dataclass(frozen=True)
class Bundle:
    """Regions that fold together or not at all, and the scale and shift (a batch norm) that they take up, if any."""

    regions: tuple[Region, ...]
    absorbed: fx.Node | None = None


@dataclass(frozen=True)
class _Share:
    """What one part of a concatenation or sum has to take up: `scale * part + shift`, `[channels]` each."""

    part: fx.Node
    scale: Tensor
    shift: Tensor | None
    axes: int
    """The spatial axes of the layout in which the part has its channels."""


def linear_regions(planner: Planner, *, depthwise_counts: bool = True) -> list[Rewrite]:
    """Every linear part of a model that is worth a fold; `depthwise_counts` as for `Planner.plan`."""
    found = bundle(planner, planner.plan(depthwise_counts=depthwise_counts))
    absorbed = [each for each in found if each.absorbed is not None]
    kept = {n for b in absorbed for n in _behind(planner, {r.root for r in b.regions}, b.absorbed)}  # type: ignore[arg-type]  # absorbed is set
    if planner.ungrouped - kept:
        found = bundle(
            planner, planner.plan(depthwise_counts=depthwise_counts, regroup=planner.ungrouped - kept)
        )
    rewrites = [_rewrite(planner, each) for each in found]
    planner.taken = {node for rewrite in rewrites for node in rewrite.operators}
    return rewrites


def _rewrite(planner: Planner, bundled: Bundle) -> Rewrite:
    steps: dict[fx.Node, Value] = {}
    nodes: set[fx.Node] = set()
    operators: list[fx.Node] = []
    for region in bundled.regions:
        steps |= _steps(planner, region)
        nodes |= region.nodes | ({region.source} if region.rescales else set())
        operators += region.operators
    roots = tuple(region.root for region in bundled.regions)
    if bundled.absorbed is not None:
        steps[bundled.absorbed] = inputs_of(planner.operators[bundled.absorbed])[0]
        nodes |= {bundled.absorbed, *_behind(planner, set(roots), bundled.absorbed)}
        operators.append(bundled.absorbed)
        roots = (bundled.absorbed,)
    first = bundled.regions[0]
    key: object = (first.root, first.source, "group") if first.rest else (first.root, first.source)
    return Rewrite(
        steps=steps,
        nodes=frozenset(nodes),
        outputs=roots,
        operators=operators,
        folded=[_describe(planner, region) for region in bundled.regions],
        convolutions=tuple(region.structure for region in bundled.regions if not region.rescales)[:1],
        key=key if bundled.absorbed is None else ("bundle", bundled.absorbed),
    )


def _behind(planner: Planner, starts: set[fx.Node], end: fx.Node) -> set[fx.Node]:
    """The linear operators between some values and `end`."""
    found, waiting = set[fx.Node](), [end]
    while waiting:
        for value in inputs_of(planner.operators[waiting.pop()]):
            if value not in starts and value not in found and value in planner.operators:
                found.add(value)
                waiting.append(value)
    return found


def _steps(planner: Planner, region: Region) -> dict[fx.Node, Value]:
    """A chain of layers is edited in their places, which keeps the class around them; anything else is rewired."""
    source, root = region.source, region.root
    made = _layer(planner, region)
    base = source.all_input_nodes[0] if region.rescales else source
    chain = _is_chain(planner, region)
    functions = [
        n for n in region.operators if n.op != "call_module" and not isinstance(region.operators[n], Same)
    ]
    closed = planner.recording.closed
    if chain and not any(len(n.meta["scope"]) == 1 and n.meta["scope"] not in closed for n in functions):
        return _local_steps(region, made, base)
    if region.rescales:
        return {source: Applied(made, base), root: source}
    total: Value = Applied(made, source)
    for term, factor in region.rest:
        if factor in (1.0, -1.0):
            total = Operation(FUNCTION, add if factor > 0 else sub, (total, term))
        else:
            total = Operation(FUNCTION, add, (total, Operation(FUNCTION, mul, (term, factor))))
    return {root: total}


def _local_steps(region: Region, made: NewLayer, base: fx.Node) -> dict[fx.Node, Value]:
    steps: dict[fx.Node, Value] = {region.source: Applied(made, base)} if region.rescales else {}
    placed = region.rescales
    for node, meaning in region.operators.items():
        emits = not placed and isinstance(meaning, Map) and meaning.multiplies
        placed = placed or emits
        (value,) = inputs_of(meaning)
        if not isinstance(meaning, Same):
            steps[node] = Applied(made, value) if emits else value
    return steps


def _is_chain(planner: Planner, region: Region) -> bool:
    """Whether each operator reads only the one before it, and nobody else does."""
    previous, placed = region.source, region.rescales
    for node, meaning in region.operators.items():
        if inputs_of(meaning) != (previous,) or previous not in node.all_input_nodes:
            return False
        if previous is not region.source and (set(previous.users) != {node} or previous in planner.demanded):
            return False
        placed = placed or (isinstance(meaning, Map) and meaning.multiplies)
        previous = node
    return placed and not region.rest


def _layer(planner: Planner, region: Region) -> NewLayer:
    def build() -> nn.Module:
        convolution = region.convolution()
        return _scaled(planner, region.source, convolution) if region.rescales else layer(convolution)

    return NewLayer(build, _kind(planner, region))


def _kind(planner: Planner, region: Region) -> tuple[torch.dtype, torch.device]:
    """The dtype of the weights that a region takes up, which autocast may hide, and its device."""
    dtype, device = planner.recording.kinds[region.root]
    for node in (*region.operators, region.source) if region.rescales else region.operators:
        own = planner.use(node).module if node.op == "call_module" else None
        weights = [own.weight] if own is not None and isinstance(getattr(own, "weight", None), Tensor) else []
        read = [
            planner.recording.attribute(str(v.target)) for v in node.all_input_nodes if v.op == "get_attr"
        ]
        found = [
            value for value in (*weights, *read) if isinstance(value, Tensor) and value.is_floating_point()
        ]
        if found:
            return found[0].dtype, device
    return dtype, device


def _scaled(planner: Planner, node: fx.Node, channelwise: Convolution) -> nn.Module:
    """A float64 copy of a convolution of another kind, its outputs scaled and shifted."""
    use = planner.use(node)
    if use.module is not None:
        return rescaled(use.module, channelwise)
    names: tuple[tuple[str, Any], ...] = (
        ("stride", 1),
        ("padding", 0),
        ("output_padding", 0),
        ("groups", 1),
        ("dilation", 1),
    )
    settings = tuple(use.argument(3 + i, name, default) for i, (name, default) in enumerate(names))
    weight, bias = use.constant(use.argument(1, "weight")), use.constant(use.argument(2, "bias"))
    if weight is None:
        raise NotFoldable("its weight is not known")
    return rescaled(transposed(weight, bias, settings), channelwise)


def _describe(planner: Planner, region: Region) -> FoldedRegion:
    kinds = Counter(word_of(planner.use(node), planner.operators.get(node)) for node in region.operators)
    convolution = region.structure
    size = "×".join(map(str, convolution.kernel_size))
    kind = f"{size} convolution" if size else "linear"
    if region.rescales:
        module = planner.use(region.source).module
        kind = "transposed convolution" if module is None else type(module).__name__
    groups = f", {convolution.groups} groups" if convolution.groups > 1 and not region.rescales else ""
    channels = f"{convolution.in_channels} to {convolution.out_channels} channels"
    return FoldedRegion(path_of(region.root), dict(kinds), f"{kind}, {channels}{groups}")


def bundle(planner: Planner, regions: list[Region]) -> list[Bundle]:
    """The regions, those bundled that together can take up a batch norm which no single region could.

    `norm(cat(a(x), b(y)))` is `cat(a'(x), b'(y))`, each of the two scaled by its own channels of the norm, and
    `norm(a(x) + b(y))` is `a'(x) + b'(y)`: no multiply-accumulate is added and the norm is gone.
    """
    free = {region.root: region for region in regions if not region.rest}
    folded = {node for region in regions for node in region.operators}
    bundles = []
    for node in planner.graph.nodes:
        if node not in planner.demanded or node in folded or ("bundle", node) in planner.excluded:
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
    bundles += [Bundle((region,)) for region in (*free.values(), *(r for r in regions if r.rest))]
    return sorted(bundles, key=lambda b: planner.order[b.regions[0].root])


def _shares_behind(planner: Planner, node: fx.Node, free: dict[fx.Node, Region]) -> list[_Share] | None:
    """How the scale and shift of `node` divide among convolutions before it; None where they do not."""
    operator = planner.operators.get(node)
    if not isinstance(operator, Map) or operator.multiplies or not is_channelwise(operator.structure):
        return None
    convolution = operator.build(_CPU)
    axes = convolution.spatial_axes
    try:
        shares = _divide(
            planner, _Share(operator.input, convolution.weight.flatten(), convolution.bias, axes), node, free
        )
    except NotFoldable:
        return None
    fits = all(_spatial_axes(planner, share.part, free) == share.axes for share in shares)
    return shares if fits and len({s.part for s in shares}) == len(shares) else None


def _spatial_axes(planner: Planner, node: fx.Node, free: dict[fx.Node, Region]) -> int | None:
    """The layout of a convolution that can take up a share; None where `node` is no such convolution."""
    if node in free:
        return free[node].structure.spatial_axes
    operator = planner.operators.get(node)
    if isinstance(operator, Map) and operator.multiplies:
        return operator.structure.spatial_axes
    return None


def _divide(planner: Planner, share: _Share, reader: fx.Node, free: Container[fx.Node]) -> list[_Share]:
    node = share.part
    if set(node.users) != {reader} or not planner.same_call(node, reader):
        raise NotFoldable("somebody else reads it")
    if node in free:
        return [share]
    operator = planner.operators.get(node)
    if isinstance(operator, Same):
        return _divide(planner, replace(share, part=operator.input), node, free)
    if isinstance(operator, Moved):
        last = share.axes == 0 if operator.last is None else operator.last
        axes = len(planner.shapes[node]) - 2 if last else 0
        return _divide(planner, replace(share, part=operator.input, axes=axes), node, free)
    if isinstance(operator, Concatenation) and operator.spatial_axes == share.axes:
        return _divide_concatenation(planner, share, operator, free)
    if isinstance(operator, Sum):
        shares = []
        rest = share.shift
        for value, factor in zip(operator.inputs, operator.factors, strict=True):
            shift = None if rest is None or factor == 0 else rest / factor
            rest = rest if shift is None else None
            shares += _divide(planner, _Share(value, share.scale, shift, share.axes), node, free)
        if rest is not None:
            raise NotFoldable("all of it is multiplied by zero")
        return shares
    return [share]


def _divide_concatenation(
    planner: Planner, share: _Share, operator: Concatenation, free: Container[fx.Node]
) -> list[_Share]:
    shares, start = [], 0
    for value in operator.inputs:
        shape = planner.shapes[value]
        channels = slice(start, start + (shape[1] if share.axes else shape[-1]))
        shift = None if share.shift is None else share.shift[channels]
        shares += _divide(planner, _Share(value, share.scale[channels], shift, share.axes), share.part, free)
        start = channels.stop
    return shares


def _single(planner: Planner, node: fx.Node) -> Region:
    """A region of one convolution that runs as it is."""
    meaning = planner.operators[node]
    assert isinstance(meaning, Map)
    structure, compute = meaning.structure, partial(meaning.build, _CPU)
    return Region(meaning.input, node, {node: meaning}, frozenset([node]), structure, compute)


def _with_share(region: Region, share: _Share) -> Region:
    """The region with the scale and the shift on top; its structure gets a bias where it has none."""
    scale, shift = share.scale, share.shift
    structure = scale_outputs(region.structure, scale.to(_META), None if shift is None else shift.to(_META))
    return replace(
        region, structure=structure, convolution=lambda: scale_outputs(region.convolution(), scale, shift)
    )
