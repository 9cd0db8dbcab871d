"""A pass: 1x1 convolutions of 1x1 maps as linear layers, and linear layers as such convolutions: the same product."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from refold.algebra import Convolution, pointwise
from refold.folding.layers import layer
from refold.folding.planning import Planner
from refold.folding.report import FoldedRegion
from refold.folding.rewrite import Applied, NewLayer, Rewrite
from refold.recording.linear import Map, Same
from refold.recording.operators import operator_of
from refold.recording.recording import PlacedFunction, name_of, path_of

_CPU = torch.device("cpu")
_LEAST_WEIGHTS = 2**18
"""Below, what any operator costs by itself hides the difference: squeeze-excite layers took 0.95 to 1.06 of theirs."""


def reshaped_products(planner: Planner) -> list[Rewrite]:
    """Every layer that multiplies one vector of channels for each image, written in the other way."""
    found = []
    for node, operator in planner.operators.items():
        is_layer = node.op == "call_module" or isinstance(node.target, PlacedFunction)
        if not is_layer or not isinstance(operator, Map) or not operator.multiplies:
            continue
        structure = operator.structure
        linear = structure.spatial_axes == 0
        if structure.weight.numel() < _LEAST_WEIGHTS or (node, "reshape") in planner.excluded:
            continue
        fits = len(planner.shapes[operator.input]) == 2 if linear else _is_pointwise(structure)
        if fits and (linear or _has_one_pixel(planner, operator.input)):
            found.append(_rewrite(planner, node, operator, linear))
    return found


def _rewrite(planner: Planner, node: fx.Node, operator: Map, linear: bool) -> Rewrite:
    path = str(node.target) if node.op == "call_module" else path_of(node)
    title = "a 1×1 convolution of a 1×1 map" if linear else "a linear layer"
    made = NewLayer(partial(_built, operator), planner.recording.kinds[node])
    return Rewrite(
        steps={node: Applied(made, operator.input)},
        nodes=frozenset([node]),
        outputs=(node,),
        operators=[node],
        folded=[FoldedRegion(path, {"linear" if linear else "convolution": 1}, title)],
        on_one_pixel=not linear,
        key=(node, "reshape"),
    )


def _built(operator: Map) -> nn.Module:
    return _reshaped(operator.build(_CPU))


def _reshaped(convolution: Convolution) -> nn.Module:
    """The layer of the other kind, between two views."""
    matrix, bias = convolution.weight.flatten(1), convolution.bias
    ones = (1,) * (convolution.spatial_axes or 2)
    flat = nn.Flatten(1)
    to_map, from_vector = (nn.Unflatten(1, (channels, *ones)) for channels in matrix.shape)
    if convolution.spatial_axes:
        parts: tuple[nn.Module, ...] = (flat, layer(pointwise(matrix, bias, 0)), to_map)
    else:
        parts = (from_vector, layer(pointwise(matrix, bias, 2)), flat)
    return nn.Sequential(OrderedDict(zip(("before", "product", "after"), parts, strict=True))).eval()


def _is_pointwise(convolution: Convolution) -> bool:
    taps = convolution.weight[0, 0].numel()
    return convolution.groups == 1 and taps == 1 and not any(map(any, convolution.padding))


def _has_one_pixel(planner: Planner, node: fx.Node) -> bool:
    """Whether the map has one pixel whatever the size of the image: it comes from an average over all of them."""
    while True:
        shape = planner.shapes.get(node, ())
        if len(shape) < 3 or any(side != 1 for side in shape[2:]):
            return False
        entry = operator_of(planner.use(node))
        if entry is not None and entry.word == "pooling" and entry.channels == "moved":
            return _averages_all(planner, node, len(shape) - 2)
        operator = planner.operators.get(node)
        pointwise_map = isinstance(operator, Map) and _is_pointwise(operator.structure)
        passes = pointwise_map or isinstance(operator, Same) or (entry is not None and entry.elementwise)
        if not passes or len(node.all_input_nodes) != 1:
            return False
        (node,) = node.all_input_nodes


def _averages_all(planner: Planner, node: fx.Node, axes: int) -> bool:
    """Whether an average leaves one pixel of any map."""
    use = planner.use(node)
    if name_of(node.target) == "mean":
        along = use.argument(1, "dim", ())
        found = {a % (axes + 2) for a in (along if isinstance(along, (tuple, list)) else (along,))}
        return found >= set(range(2, axes + 2))
    size: Any = use.argument(1, "output_size")
    if use.module is not None:
        size = getattr(use.module, "output_size", None)
    return size in (1, (1,) * axes, [1] * axes)
