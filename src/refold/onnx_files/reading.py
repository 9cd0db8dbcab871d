"""Read ONNX files: what is wrong with one is said in a sentence, and what is right becomes a network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
import torch
from torch import Tensor

from refold.errors import InputError, first_line, some
from refold.files import PathLike
from refold.onnx_files.checking import check_external, check_graph, tensors_of, types_of
from refold.onnx_files.evaluating import Evaluated
from refold.onnx_files.network import OnnxNetwork, Program
from refold.onnx_files.node import DTYPES, OnnxNode
from refold.onnx_files.operators import call_of
from refold.onnx_files.patterns import parts_of_gelu
from refold.onnx_files.steps import Step, captured_by, last_uses, names_in, own_names, step_of, with_tensors
from refold.onnx_files.table import Call

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
            names = some([function.name for function in model.functions])
            self._notes.append(f"functions of the file were written out where they are called ({names})")
            model = onnx.inliner.inline_local_functions(model)
        if model.training_info:
            self._notes.append("how the file is trained (training_info) was left out")
        self._proto = model
        check_external(model, path, name)
        check_graph(model.graph, name)
        program = _bare_program(model, path, name)
        self._model = read_ir(program)
        self._graph = self._model.graph
        self._types = types_of(model)
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
        read = [name for step in steps for name in names_in((step.args, step.kwargs))]
        outputs = tuple(str(value.name) for value in graph.outputs)
        own = own_names({name: None for name in (*read, *outputs) if name in self._constants})
        program = Program(
            self._proto,
            self._path,
            self._name,
            tuple(steps),
            tuple(str(value.name) for value in inputs),
            outputs,
            tuple(self._sides(value) for value in inputs),
            tuple(DTYPES[self._types.dtypes[str(value.name)]] for value in inputs),
            last_uses(steps, outputs),
            {own_name: name for name, own_name in own.items()},
            tuple(self._notes),
            any(t.data_location == onnx.TensorProto.EXTERNAL for t in tensors_of(self._proto.graph)),
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
        together = parts_of_gelu(self._graph)
        for number, node in enumerate(self._graph):
            if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
                self._keep(str(node.outputs[0].name), _constant(node))
                continue
            own = OnnxNode(node, self._version, self._types, lambda v: self._known.get(str(v.name)))
            call = call_of(own)
            if call is not None and node in together:
                call = replace(call, operator="")
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
        filled = with_tensors(
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
            captured = captured_by(node)
            if call is None:
                proto = self._proto.graph.node[number].SerializeToString()
                run = Evaluated(proto, opsets, self._proto.ir_version, [str(v.name) for v in captured])
                call = Call(run, "", (*node.inputs, *captured))
            step = step_of(number, node, call, captured, outputs)
            needed |= set(names_in((step.args, step.kwargs)))
            found.append(step)
        return found[::-1]

    def _statistics(self, steps: list[Step], own: Mapping[str, str]) -> set[str]:
        """What only batch norms read as their mean and variance: no parameters, as in PyTorch."""
        norms, others = set[str](), set[str]()
        for step in steps:
            names = names_in((step.args, step.kwargs))
            places = zip(names, step.reads, strict=True)
            for name, place in places:
                is_one = step.function.kind == "BatchNormalization" and place > 2
                (norms if is_one else others).add(name)
        return {own[name] for name in norms - others if name in own}


def _bare_program(model: onnx.ModelProto, path: Path | None, name: str) -> Program:
    return Program(model, path, name, (), (), (), (), (), ())


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


def _to_torch(tensor: ir.TensorProtocol, name: str) -> Tensor:
    dtype = DTYPES.get(tensor.dtype.value)
    if dtype is None:
        raise InputError(f"The constant '{name}' has the type {tensor.dtype.name}, which PyTorch has not.")
    array = np.array(tensor.numpy())
    if dtype == torch.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
