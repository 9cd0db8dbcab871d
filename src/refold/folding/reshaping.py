"""1x1 convolutions of 1x1 maps as linear layers, and linear layers as such convolutions: the same product."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from refold.algebra import Convolution, pointwise
from refold.folding.channels import ELEMENTWISE, operator_name
from refold.folding.drafts import Draft
from refold.folding.edits import Candidate
from refold.folding.layers import NewLayer, layer, new_layer
from refold.folding.operators import Call, Map, Same
from refold.folding.planning import Planner
from refold.folding.proof import prove_layer
from refold.folding.report import FoldedRegion

_CPU, _META = torch.device("cpu"), torch.device("meta")
_LEAST_WEIGHTS = 2**18
"""Below, what any operator costs by itself hides the difference: squeeze-excite layers took 0.95 to 1.06 of theirs."""


def reshaping_candidates(planner: Planner) -> list[Candidate]:
    """Every layer that multiplies one vector of channels for each image, written in the other way."""
    found = []
    for node, operator in planner.operators.items():
        if node.op != "call_module" or not isinstance(operator, Map) or not operator.multiplies:
            continue
        structure = operator.build(_META)
        linear = structure.spatial_axes == 0
        if structure.weight.numel() < _LEAST_WEIGHTS:
            continue
        fits = len(planner.unit.shapes[operator.input]) == 2 if linear else _is_pointwise(structure)
        if fits and (linear or _has_one_pixel(planner, operator.input)):
            found.append(_candidate(planner, node, operator, linear))
    return found


def _candidate(planner: Planner, node: fx.Node, operator: Map, linear: bool) -> Candidate:
    path = planner.unit.full_path(str(node.target))
    title = "a 1×1 convolution of a 1×1 map" if linear else "a linear layer"
    return Candidate(
        operators=[node],
        draft=Draft({str(node.target): 0}),
        make=partial(_make, planner, node, operator),
        folded=[FoldedRegion(path, {"linear" if linear else "convolution": 1}, title)],
    )


def _make(planner: Planner, node: fx.Node, operator: Map, prove: bool) -> tuple[list[NewLayer], list[float]]:
    def build() -> nn.Module:
        return _reshaped(operator.build(_CPU))

    distances = []
    if prove:
        size = planner.unit.shapes[operator.input][1:]
        distances = [prove_layer(operator.build(_CPU), build(), [(2, *size), (3, *size)])]
    return [new_layer(build, build(), planner.unit.kinds[node])], distances


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
        shape = planner.unit.shapes.get(node, ())
        if len(shape) < 3 or any(side != 1 for side in shape[2:]):
            return False
        name = operator_name(node, planner)
        if name.startswith("adaptive") or name == "mean":
            return _averages_all(planner, node, len(shape) - 2)
        operator = planner.operators.get(node)
        pointwise_map = isinstance(operator, Map) and _is_pointwise(operator.build(_META))
        passes = pointwise_map or isinstance(operator, Same) or name in ELEMENTWISE
        if not passes or len(node.all_input_nodes) != 1:
            return False
        (node,) = node.all_input_nodes


def _averages_all(planner: Planner, node: fx.Node, axes: int) -> bool:
    """Whether an average leaves one pixel of any map."""
    call = Call(node, planner.constants)
    if operator_name(node, planner) == "mean":
        along = call.argument(1, "dim", ())
        found = {a % (axes + 2) for a in (along if isinstance(along, (tuple, list)) else (along,))}
        return found >= set(range(2, axes + 2))
    size: Any = call.argument(1, "output_size")
    if node.op == "call_module":
        size = getattr(planner.unit.attribute(str(node.target)), "output_size", None)
    return size in (1, (1,) * axes, [1] * axes)
