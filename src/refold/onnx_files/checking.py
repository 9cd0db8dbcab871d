"""What a file must be before anything of it is run: whole, in order, and all of it in its own folder."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import onnx

from refold.errors import InputError
from refold.onnx_files.node import Types


def check_external(model: onnx.ModelProto, path: Path | None, name: str) -> None:
    """Raise InputError where tensors lie outside of the folder of the file, or are not there."""
    for tensor in tensors_of(model.graph):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        said = {entry.key: entry.value for entry in tensor.external_data}
        location = said.get("location", "")
        if path is None:
            raise InputError(
                f"The tensor '{tensor.name}' of {name} lies in a file '{location}' beside it; give the path of the "
                "ONNX file, or load it with onnx.load, which reads both."
            )
        root = path.parent.resolve()
        place = (root / location).resolve()
        if not location or os.path.isabs(location) or not place.is_relative_to(root):
            raise InputError(
                f"{name} says that the tensor '{tensor.name}' lies in '{location}', outside of its own folder, which "
                "is not read."
            )
        if not place.is_file():
            raise InputError(
                f"The tensor '{tensor.name}' of {name} lies in '{location}', which is not beside it; put it there."
            )
        end = int(said.get("offset", 0) or 0) + int(said.get("length", 0) or 0)
        if end > place.stat().st_size:
            raise InputError(f"'{location}' beside {name} is cut off before the tensor '{tensor.name}' ends.")


def tensors_of(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from tensors_of(inner)


def check_graph(graph: onnx.GraphProto, name: str) -> None:
    """Raise InputError where a value is read that is not there yet, is there twice, or is no dense tensor."""
    held = Counter(tensor.name for tensor in graph.initializer)
    twice = next((tensor for tensor, count in held.items() if count > 1), None)
    if twice is not None:
        raise InputError(f"{name} holds the constant '{twice}' more than once; keep the one that is meant.")
    _check_dense(graph, name)
    known = {"", *(value.name for value in graph.input), *held}
    written = {output for node in graph.node for output in node.output}
    for node in graph.node:
        title = f"the {node.op_type} '{node.name or next(iter(node.output), '')}'"
        for value in node.input:
            if value in known:
                continue
            if value in written:
                raise InputError(
                    f"In {name} {title} reads '{value}' before it is written: its nodes go round in a circle, "
                    "or are out of order."
                )
            raise InputError(
                f"In {name} {title} reads '{value}', which nothing writes and the file does not hold."
            )
        again = next((value for value in node.output if value and value in known), None)
        if again is not None:
            raise InputError(f"In {name} {title} writes '{again}', which is there already.")
        known.update(node.output)
    missing = next((value.name for value in graph.output if value.name not in known), None)
    if missing is not None:
        raise InputError(f"The output '{missing}' of {name} is not written by any of its nodes.")


def _check_dense(graph: onnx.GraphProto, name: str) -> None:
    sparse = [tensor.values.name for tensor in graph.sparse_initializer]
    sparse += [
        node.output[0] for node in graph.node for setting in node.attribute if setting.name == "sparse_value"
    ]
    if sparse:
        raise InputError(
            f"{name} holds the sparse constant '{sparse[0]}', which is not read; write it densely."
        )


def types_of(model: onnx.ModelProto) -> Types:
    """The types and shapes of all values, as far as ONNX can tell."""
    try:
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except Exception:  # shapes that contradict each other, operators of others: then only what the file says
        graph = model.graph
    dtypes, shapes = dict[str, int](), dict[str, tuple[int | None, ...]]()
    for value in (*graph.value_info, *graph.output, *graph.input):
        kind = value.type.tensor_type
        if not value.type.HasField("tensor_type"):
            continue
        dtypes[value.name] = kind.elem_type
        if kind.HasField("shape"):
            shapes[value.name] = tuple(
                axis.dim_value if axis.HasField("dim_value") and axis.dim_value > 0 else None
                for axis in kind.shape.dim
            )
    for tensor in graph.initializer:
        dtypes[tensor.name], shapes[tensor.name] = tensor.data_type, tuple(tensor.dims)
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            held = node.attribute[0].t
            dtypes[node.output[0]], shapes[node.output[0]] = held.data_type, tuple(held.dims)
    return Types(dtypes, shapes)
