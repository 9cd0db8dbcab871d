"""Read ONNX files: what is wrong with one is said in a sentence, and what is right becomes a network."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
import torch
from torch import Tensor, nn

from refold.errors import InputError, first_line, some
from refold.files import PathLike
from refold.onnx_files.evaluating import Evaluated
from refold.onnx_files.network import Name, OnnxNetwork, Program, Step
from refold.onnx_files.node import DTYPES, OnnxNode, Types
from refold.onnx_files.operators import Call, call_of
from refold.onnx_files.places import place_of
from refold.recording.recording import PlacedFunction

_SMALL = 4096
"""Up to how many numbers a constant is computed before anything runs: shapes, axes and the like."""
_OLDEST = 7
_GROWING = {"Expand", "Tile", "Range", "Resize", "Upsample", "Pad"}
"""What may make much of little."""


def read_network(model: PathLike | onnx.ModelProto | ir.Model) -> OnnxNetwork:
    """The graph of an ONNX file, or of a model that is read already, as a network in evaluation mode.

    Raises `InputError` where the file cannot be read, is not a whole and valid graph, or takes what is no tensor.
    """
    if isinstance(model, ir.Model):
        return _network(ir.to_proto(model), None, model.graph.name or "the model")
    if isinstance(model, onnx.ModelProto):
        return _network(model, None, model.graph.name or "the model")
    path = Path(model)
    return _network(_parsed(path), path, path.name)


def read_ir(program: Program) -> ir.Model:
    """The model of a program to be changed; its tensors stay where they are."""
    model = ir.from_proto(program.model)
    if program.path is not None:
        ir.external_data.set_base_dir(model.graph, program.path.parent)
    return model


def _parsed(path: Path) -> onnx.ModelProto:
    if not path.is_file():
        raise InputError(f"There is no file '{path}'; check the path.")
    try:
        return onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf raises what it likes
        raise InputError(
            f"'{path}' cannot be read as an ONNX file ({first_line(error)}); it may be cut off or be none."
        ) from error


def _network(model: onnx.ModelProto, path: Path | None, name: str) -> OnnxNetwork:
    try:
        return _Reader(model, path, name).network()
    except InputError:
        raise
    except Exception as error:  # a damaged file can go wrong anywhere
        raise InputError(f"{name} is no valid ONNX graph: {first_line(error)}.") from error


class _Reader:
    """Reads one model."""

    def __init__(self, model: onnx.ModelProto, path: Path | None, name: str) -> None:
        self._name, self._path, self._notes = name, path, list[str]()
        self._version = self._checked_version(model)
        if model.functions:
            self._notes.append(
                f"the {len(model.functions)} functions of the file were written out where they are called"
            )
            model = onnx.inliner.inline_local_functions(model)
        self._proto = model
        _check_external(model, path, name)
        _check_graph(model.graph, name)
        program = _bare_program(model, path, name)
        self._model = read_ir(program)
        self._graph = self._model.graph
        self._types = _types(model)
        self._constants: dict[str, ir.TensorProtocol] = {}
        self._known: dict[str, np.ndarray[Any, Any]] = {}

    def network(self) -> OnnxNetwork:
        """The network. Raises InputError, and whatever a damaged file leads to."""
        graph = self._graph
        both = [value.name for value in graph.inputs if value.name in graph.initializers]
        if both:
            self._notes.append(
                f"{len(both)} inputs have values in the file ({some(both)}); they were taken for constants"
            )
        for name, value in graph.initializers.items():
            if value.const_value is None:
                raise InputError(f"{self._name} has no values for the constant '{name}'; export it again.")
            self._keep(name, value.const_value)
        inputs = [value for value in graph.inputs if value.name not in graph.initializers]
        for value in inputs:
            self._require_tensor(value)
        calls = self._calls()
        steps = self._steps(calls)
        read = [name for step in steps for name in _names((step.args, step.kwargs))]
        outputs = tuple(str(value.name) for value in graph.outputs)
        own = _own_names({name: None for name in (*read, *outputs) if name in self._constants})
        program = Program(
            self._proto,
            self._path,
            self._name,
            tuple(steps),
            tuple(str(value.name) for value in inputs),
            outputs,
            tuple(self._sides(value) for value in inputs),
            tuple(DTYPES[self._types.dtypes[str(value.name)]] for value in inputs),
            _last_uses(steps, outputs),
            {own_name: name for name, own_name in own.items()},
            tuple(self._notes),
            any(t.data_location == onnx.TensorProto.EXTERNAL for t in _tensors(self._proto.graph)),
        )
        tensors = {own_name: _to_torch(self._constants[name], name) for name, own_name in own.items()}
        return OnnxNetwork(program, tensors, self._statistics(steps, own)).eval()

    def _checked_version(self, model: onnx.ModelProto) -> int:
        versions = [each.version for each in model.opset_import if each.domain in ("", "ai.onnx")]
        if not model.graph.node or not model.graph.output:
            raise InputError(f"{self._name} has no graph; it may be cut off, or be no ONNX file.")
        if not versions or versions[0] < _OLDEST:
            raise InputError(
                f"{self._name} has version {versions[0] if versions else 'none'} of ONNX's operators, and {_OLDEST} is "
                "the oldest that is read; convert it with onnx.version_converter."
            )
        return int(versions[0])

    def _keep(self, name: str, tensor: ir.TensorProtocol) -> None:
        self._constants[name] = tensor
        if tensor.size <= _SMALL and tensor.dtype.value in DTYPES and tensor.dtype != ir.DataType.BFLOAT16:
            self._known[name] = tensor.numpy()

    def _require_tensor(self, value: ir.Value) -> None:
        kind = self._types.dtypes.get(str(value.name))
        if kind not in DTYPES:
            raise InputError(
                f"The input '{value.name}' of {self._name} is no tensor of numbers, which folding cannot run."
            )

    def _sides(self, value: ir.Value) -> tuple[int | None, ...] | None:
        return self._types.shapes.get(str(value.name))

    def _calls(self) -> list[tuple[int, ir.Node, Call | None]]:
        """Every operator that is no constant, with its number; small constants are computed."""
        found = []
        for number, node in enumerate(self._graph):
            if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
                self._keep(str(node.outputs[0].name), _constant(node))
                continue
            own = OnnxNode(node, self._version, self._types, lambda v: self._known.get(str(v.name)))
            call = call_of(own)
            found.append((number, node, call))
            self._compute(own, call, number)
        return found

    def _compute(self, node: OnnxNode, call: Call | None, number: int) -> None:
        """Compute a small constant."""
        if len(node.outputs) != 1 or any(
            value is not None and value.is_graph_output() for value in node.outputs
        ):
            return
        name = str(node.outputs[0].name)
        if node.kind == "Shape":
            shape = self._types.shapes.get(str(node.inputs[0].name)) if node.inputs[0] is not None else None
            if shape is not None:
                part = shape[node.attribute("start", 0) : node.attribute("end", None)]
                if None not in part:
                    self._known[name] = np.array(part, dtype=np.int64)
            return
        given = [None if value is None else self._known.get(str(value.name)) for value in node.inputs]
        if call is None or any(v is not None and g is None for v, g in zip(node.inputs, given, strict=True)):
            return
        if node.kind == "ConstantOfShape" and math.prod(map(int, given[0])) > _SMALL:  # type: ignore[arg-type]  # as above
            return
        size = self._types.shapes.get(name)
        if size is None or None in size:
            if node.kind in _GROWING:
                return
        elif math.prod(size) > _SMALL:  # type: ignore[arg-type]  # None is excluded
            return
        filled = _with_values(
            call,
            {
                str(v.name): torch.from_numpy(np.array(g))
                for v, g in zip(node.inputs, given, strict=True)
                if v is not None
            },
        )
        found = call.run(*filled[0], **filled[1])
        if isinstance(found, Tensor) and not found.is_floating_point():
            self._known[name] = found.numpy()

    def _steps(self, calls: list[tuple[int, ir.Node, Call | None]]) -> list[Step]:
        """The operators that the outputs need, in order."""
        needed = {str(value.name) for value in self._graph.outputs}
        opsets = {each.domain: each.version for each in self._proto.opset_import}
        found = []
        for number, node, call in reversed(calls):
            outputs = [str(value.name) for value in node.outputs if value.name]
            if needed.isdisjoint(outputs):
                continue
            captured = _captured(node)
            if call is None:
                proto = self._proto.graph.node[number].SerializeToString()
                run = Evaluated(proto, opsets, self._proto.ir_version, [str(v.name) for v in captured])
                call = Call(run, "", (*node.inputs, *captured))
            step = _step(number, node, call, captured, outputs)
            needed |= set(_names((step.args, step.kwargs)))
            found.append(step)
        return found[::-1]

    def _statistics(self, steps: list[Step], own: Mapping[str, str]) -> set[str]:
        """What only batch norms read as their mean and variance: no parameters, as in PyTorch."""
        norms, others = set[str](), set[str]()
        for step in steps:
            names = _names((step.args, step.kwargs))
            places = zip(names, step.reads, strict=True)
            for name, place in places:
                is_one = step.function.kind == "BatchNormalization" and place > 2
                (norms if is_one else others).add(name)
        return {own[name] for name in norms - others if name in own}


def _step(number: int, node: ir.Node, call: Call, captured: list[ir.Value], outputs: list[str]) -> Step:
    function = PlacedFunction(call.run, call.operator, node.op_type, place_of(node), number)
    values = [*node.inputs, *captured]
    left = list(range(len(values)))
    reads = []
    for value in _values((call.args, call.kwargs)):
        places = [i for i, own in enumerate(values) if own is value]
        place = next((i for i in places if i in left), places[-1])
        if place in left:
            left.remove(place)
        reads.append(place)
    args, kwargs = _named((call.args, call.kwargs))
    names = tuple(str(value.name) for value in captured)
    return Step(function, args, kwargs, tuple(reads), names, tuple(outputs))


def _bare_program(model: onnx.ModelProto, path: Path | None, name: str) -> Program:
    return Program(model, path, name, (), (), (), (), (), ())


def _check_external(model: onnx.ModelProto, path: Path | None, name: str) -> None:
    """Raise InputError where tensors lie outside of the folder of the file, or are not there."""
    for tensor in _tensors(model.graph):
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


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _tensors(inner)


def _check_graph(graph: onnx.GraphProto, name: str) -> None:
    """Raise InputError where a value is read that is not there yet, is written twice, or is no tensor."""
    known = {"", *(value.name for value in graph.input), *(tensor.name for tensor in graph.initializer)}
    known |= {tensor.values.name for tensor in graph.sparse_initializer}
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
        twice = next((value for value in node.output if value and value in known), None)
        if twice is not None:
            raise InputError(f"In {name} {title} writes '{twice}', which is there already.")
        known.update(node.output)
    missing = next((value.name for value in graph.output if value.name not in known), None)
    if missing is not None:
        raise InputError(f"The output '{missing}' of {name} is not written by any of its nodes.")


def _types(model: onnx.ModelProto) -> Types:
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


def _constant(node: ir.Node) -> ir.TensorProtocol:
    """The tensor that a node of the kind Constant holds."""
    (name, attribute), *others = node.attributes.items()
    if others or name not in ("value", "value_float", "value_floats", "value_int", "value_ints"):
        raise InputError(
            f"The constant '{node.name or node.outputs[0].name}' is {name}, which folding cannot read."
        )
    if name == "value":
        return attribute.value
    dtype = np.float32 if "float" in name else np.int64
    return ir.tensor(np.array(attribute.value, dtype=dtype), name=node.outputs[0].name)


def _captured(node: ir.Node) -> list[ir.Value]:
    """What only the subgraphs of a node read of the graph around it."""
    found: dict[ir.Value, None] = {}
    for attribute in node.attributes.values():
        graphs = [attribute.value] if attribute.type == ir.AttributeType.GRAPH else []
        graphs = list(attribute.value) if attribute.type == ir.AttributeType.GRAPHS else graphs
        for graph in graphs:
            own = set(graph.inputs) | set(graph.initializers.values())
            read: list[ir.Value | None] = list(graph.outputs)
            for inner in graph:
                own |= set(inner.outputs)
                read += [*inner.inputs, *_captured(inner)]
            found |= dict.fromkeys(value for value in read if value is not None and value not in own)
    return list(found)


def _values(structure: Any) -> Iterator[ir.Value]:
    if isinstance(structure, ir.Value):
        yield structure
    elif isinstance(structure, (list, tuple, dict)):
        for item in structure.values() if isinstance(structure, dict) else structure:
            yield from _values(item)


def _names(structure: Any) -> list[str]:
    if isinstance(structure, Name):
        return [structure.value]
    if isinstance(structure, (list, tuple, dict)):
        items = structure.values() if isinstance(structure, dict) else structure
        return [name for item in items for name in _names(item)]
    return []


def _named(structure: Any) -> Any:
    """The structure with names in the place of values."""
    if isinstance(structure, ir.Value):
        return Name(str(structure.name))
    if isinstance(structure, (list, tuple)):
        return type(structure)(_named(item) for item in structure)
    if isinstance(structure, dict):
        return {key: _named(item) for key, item in structure.items()}
    return structure


def _with_values(call: Call, tensors: Mapping[str, Tensor]) -> Any:
    def of(structure: Any) -> Any:
        if isinstance(structure, ir.Value):
            return tensors[str(structure.name)]
        if isinstance(structure, (list, tuple)):
            return type(structure)(of(item) for item in structure)
        return structure

    return of(call.args), {key: of(item) for key, item in call.kwargs.items()}


def _last_uses(steps: list[Step], outputs: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    seen, found = set(outputs), list[tuple[str, ...]]()
    for step in reversed(steps):
        names = dict.fromkeys((*_names((step.args, step.kwargs)), *step.outputs))
        found.append(tuple(name for name in names if name not in seen))
        seen.update(names)
    return tuple(found[::-1])


def _own_names(names: Mapping[str, None]) -> dict[str, str]:
    """Names of attributes for constants."""
    found: dict[str, str] = {}
    taken = set(dir(nn.Module())) | {"program"}
    for name in names:
        own = re.sub(r"\W", "_", name) or "constant"
        own = own if own.isidentifier() and not own.startswith("_") else f"constant_{own.lstrip('_')}"
        number, plain = 2, own
        while own in taken:
            own, number = f"{plain}_{number}", number + 1
        taken.add(own)
        found[name] = own
    return found


def _to_torch(tensor: ir.TensorProtocol, name: str) -> Tensor:
    dtype = DTYPES.get(tensor.dtype.value)
    if dtype is None:
        raise InputError(f"The constant '{name}' has the type {tensor.dtype.name}, which PyTorch has not.")
    array = np.array(tensor.numpy())
    if dtype == torch.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
