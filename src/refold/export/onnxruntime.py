"""ONNX files, run by ONNX Runtime on the CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from refold.errors import InputError, first_line
from refold.export.engines import Contents, Session
from refold.export.onnx_file import write_onnx
from refold.export.request import Request

_FLOATING = {
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
    onnx.TensorProto.DOUBLE,
}
_RELABELLING = {"Constant", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"}


def write(model: nn.Module, request: Request) -> Sequence[str]:
    """Write one self-contained ONNX file; with a dynamic batch the first axis of every input is ``batch``.

    Raises `InputError` where the model cannot be converted.
    """
    write_onnx(model, request)
    return []


def contents(path: Path) -> Contents:
    """Count what an ONNX file holds; the batch counts as one if it is free, and images without a size tell no MACs."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(str(path))).graph
    parameters = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type in _FLOATING}
    shapes = {value.name: _shape(value) for value in (*graph.value_info, *graph.output, *graph.input)}
    shapes |= {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    of_shapes = _computing_shapes(graph)
    operators = Counter(
        node.op_type
        for node in graph.node
        if node.op_type not in _RELABELLING and not of_shapes.issuperset(node.output)
    )
    return Contents(
        parameters=sum(prod(tensor.dims) for tensor in parameters.values()),
        macs=sum(_macs(node, shapes) for node in graph.node) if _are_sized(graph.input) else None,
        operators=dict(operators.most_common()),
    )


def _computing_shapes(graph: Any) -> set[str]:
    """The values that are made of shapes and whole numbers alone, not of what the network is given."""
    found = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT64}
    found.add("")  # an input that is left out
    for node in graph.node:
        if node.op_type == "Shape" or found.issuperset(node.input):
            found.update(node.output)
    return found


def _are_sized(inputs: Any) -> bool:
    """Whether all axes but the batch have a size."""
    return all(axis.dim_value for value in inputs for axis in value.type.tensor_type.shape.dim[1:])


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(axis.dim_value or 1 for axis in value.type.tensor_type.shape.dim)


def _macs(node: Any, shapes: dict[str, tuple[int, ...]]) -> int:
    if node.op_type not in ("Conv", "Gemm", "MatMul"):
        return 0
    written, weight = prod(shapes[node.output[0]]), shapes[node.input[1]]
    if node.op_type == "Conv":
        return written * prod(weight[1:])
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return written * (weight[-1] if transposed or len(weight) == 1 else weight[-2])


def read_metadata(path: Path) -> dict[str, str]:
    """What `write` put into a file, and what others did."""
    return {entry.key: entry.value for entry in onnx.load(str(path)).metadata_props}


def open(path: Path, *, threads: int | None = None) -> Session:
    """Load an ONNX file in ONNX Runtime, with ``threads`` threads if given.

    Raises `InputError` where ONNX Runtime cannot load or run the file.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise InputError(
            f"ONNX Runtime cannot load '{path}': {first_line(error)}; export a float32 model "
            "(model.float()) if the operators do not exist for this dtype."
        ) from error
    names = [value.name for value in session.get_inputs()]

    def run(*arguments: Tensor) -> list[Tensor]:
        feed = {name: argument.numpy() for name, argument in zip(names, arguments, strict=True)}
        return [torch.from_numpy(output) for output in session.run(None, feed)]

    return run
