"""Layers that are better left in float32: found by what the whole network gains where one of them is."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import onnx

from refold.quantization.checking import opened, outputs_of
from refold.quantization.skeleton import DEQUANTIZE, QUANTIZE, Array, Graph, Layer


def by_gain(graph: Graph, plain: Graph, parts: Sequence[Array], wanted: Sequence[Array]) -> list[str]:
    """The layers of an int8 graph, first the one in float32 alone with which the outputs are nearest to ``wanted``."""
    noise = {}
    for layer in graph.layers:
        data = with_float_layers(graph, plain, [layer.name]).SerializeToString()
        found = outputs_of(opened(Path(), data=data), parts)
        noise[layer.name] = sum(float(((a - b) ** 2).sum()) for a, b in zip(wanted, found, strict=True))
    return sorted(noise, key=noise.__getitem__)


def with_float_layers(graph: Graph, plain: Graph, names: Collection[str]) -> Any:
    """The model in which some layers compute in float32, from values that were not rounded for them."""
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    copied = Graph(model)
    for layer in copied.layers:
        if layer.name in names:
            _undo(copied, plain, layer)
    return model


def _undo(graph: Graph, plain: Graph, layer: Layer) -> None:
    node = layer.node
    node.input[0] = _before_rounding(graph, node.input[0])
    original = next(each for each in plain.nodes if layer.name in each.input)
    for place, name in enumerate(original.input[1:], start=1):
        if name not in {tensor.name for tensor in graph.model.graph.initializer}:
            tensor = graph.model.graph.initializer.add()
            tensor.CopyFrom(plain.constants[name])
            tensor.name = f"{name}_float"
        node.input[place] = f"{name}_float"


def _before_rounding(graph: Graph, name: str) -> str:
    dequantized = graph.maker.get(name)
    if dequantized is None or dequantized.op_type != DEQUANTIZE:
        return name
    quantized = graph.maker.get(dequantized.input[0])
    if quantized is None or quantized.op_type != QUANTIZE:
        return name
    found: str = quantized.input[0]
    return found
