"""Files whose weights alone are integers, of 4 or 8 bits: small, and computed in float32."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from refold.errors import InputError, first_line
from refold.quantization.columns import layout_of
from refold.quantization.skeleton import DEQUANTIZE, LAYERS, NO_LAYERS, Graph

# The operators since when integers of 4 bits are among what DequantizeLinear takes, and the files that hold them.
_OPSET, _IR_VERSION = 21, 10
# The most bits of an integer that two of are stored in a byte.
_HALF_BYTE = 4


def write_weights_alone(source: Path, *, per_channel: bool, in_float: Collection[str]) -> Graph:
    """A graph whose weights go through an operator that turns integers into floats, which mean nothing yet.

    ``in_float`` are the names of the weights that stay in float32.
    Raises `InputError` where there is no layer, or the file cannot be written with operators of opset 21.
    """
    model = onnx.load(str(source))
    try:
        if Graph(model).opset[0].version < _OPSET:
            model = onnx.version_converter.convert_version(model, _OPSET)
    except Exception as error:  # the converter's own errors are of several kinds
        raise InputError(
            f"The network cannot be written with opset {_OPSET}: {first_line(error)}."
        ) from error
    model.ir_version = max(model.ir_version, _IR_VERSION)
    graph = Graph(model)
    nodes: list[Any] = []
    for node in model.graph.node:
        name = node.input[1] if node.op_type in LAYERS else ""
        if name in graph.constants and name not in in_float:
            made = _add_integers(graph, node, name, per_channel=per_channel)
            nodes += [made] if made is not None else []
            node.input[1] = f"{name}_dequantized"
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    graph = Graph(model)
    if not graph.layers:
        raise InputError(NO_LAYERS)
    return graph


def _add_integers(graph: Graph, node: Any, name: str, *, per_channel: bool) -> Any | None:
    """Put the constants of a weight into the graph, and the operator that reads them; None where it is there."""
    if f"{name}_quantized" in graph.constants:  # layers may share a weight
        return None
    weight = graph.constant(name)
    layout = layout_of(node, weight.shape)
    scale = np.ones(weight.shape[layout.channel_axis] if per_channel else (), np.float32)
    for end, value in (
        ("quantized", np.zeros(weight.shape, np.int8)),
        ("scale", scale),
        ("zero_point", np.zeros(scale.shape, np.int8)),
    ):
        tensor = graph.model.graph.initializer.add()
        tensor.CopyFrom(numpy_helper.from_array(value, f"{name}_{end}"))
        graph.constants[tensor.name] = tensor
    graph.model.graph.initializer.remove(graph.constants[name])
    return helper.make_node(
        DEQUANTIZE,
        [f"{name}_{end}" for end in ("quantized", "scale", "zero_point")],
        [f"{name}_dequantized"],
        name=f"{name}_dequantize",
        axis=layout.channel_axis,
    )


def pack(graph: Graph, bits: int) -> None:
    """Store the integers of all weights as two in a byte, where they fit."""
    if bits > _HALF_BYTE:
        return
    for layer in graph.layers:
        for name in (layer.weight.input[0], layer.weight.input[2]):
            values = graph.constant(name)
            packed = helper.make_tensor(name, TensorProto.INT4, values.shape, values.astype(np.int8).ravel())
            graph.constants[name].CopyFrom(packed)
