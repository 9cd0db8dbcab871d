"""Carry a fold out in the file: operators that went go, new layers take their place, all else stays as it is."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from refold.errors import InputError
from refold.folding.answers import shared_copy
from refold.onnx_files.network import OnnxNetwork, Program
from refold.onnx_files.node import DTYPES
from refold.onnx_files.reading import read_ir
from refold.onnx_files.steps import Step
from refold.recording.arguments import Arguments, plain_mode
from refold.recording.recorder import record
from refold.recording.recording import PlacedFunction, Recording, nodes_in

_TYPES = {dtype: ir.DataType(number) for number, dtype in DTYPES.items()}
_INFIX = {
    operator.add: "Add",
    operator.sub: "Sub",
    operator.mul: "Mul",
    torch.add: "Add",
    torch.cat: "Concat",
}
_PADS = (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)


def written(plain: nn.Module, program: Program, arguments: Arguments) -> ir.Model:
    """The file of a network that a program was folded to (or that it is), with what changed in the place of what was
    there.

    `arguments` is a call that the network takes.
    """
    if not isinstance(plain, OnnxNetwork):  # all of it became one layer
        plain = nn.Sequential(plain)
    with plain_mode():
        recording = record(shared_copy(plain).eval(), arguments)
    return _Writer(program, recording).model


class _Writer:
    """Changes the graph of a file into what ran."""

    def __init__(self, program: Program, recording: Recording) -> None:
        self.model = read_ir(program)
        self._version = next(v for d, v in self.model.graph.opset_imports.items() if d in ("", "ai.onnx"))
        self._graph, self._recording, self._constants = self.model.graph, recording, program.constants
        self._nodes = list(self._graph)
        self._steps = {step.function.number: step for step in program.steps}
        self._named = _values_of(self._graph)
        self._values: dict[fx.Node, ir.Value] = {}
        self._rows: dict[fx.Node, tuple[ir.Value, ...]] = {}
        self._seen: set[int] = set()
        self._made: dict[str, ir.Value] = {}
        self._cursor: ir.Node | None = None
        self._idle = {node for node in self._nodes if _is_idle(node)}
        self._unread = {name for name, value in self._graph.initializers.items() if _is_unread(value)}
        self._renames: dict[ir.Value, ir.Value] = {}
        """New values, and the old ones whose places they take."""
        self._new: set[ir.Node] = set()
        inputs = iter(program.inputs)
        for node in recording.graph.nodes:
            if node.op == "placeholder":
                self._values[node] = self._named[next(inputs)]
            elif node.op == "get_attr":
                self._values[node] = self._constant(str(node.target))
            elif node.op != "output":
                self._write(node)
        self._set_outputs(next(node for node in recording.graph.nodes if node.op == "output"))
        self._clear()
        self._take_names()

    def _write(self, node: fx.Node) -> None:
        if isinstance(node.target, PlacedFunction):
            self._place(node, node.target.number)
        elif node.op == "call_module":
            layer: Any = self._recording.attribute(str(node.target))
            (source,) = node.all_input_nodes
            border = self._border(source)
            if border is not None and isinstance(layer, _ConvNd):
                ends = _ends(border, len(layer.kernel_size))
                self._values[node] = self._convolution(layer, self._values[source.all_input_nodes[0]], ends)
            elif self._border(node) is None:
                self._values[node] = self._layer(layer, self._values[source], self._dimensions(source))
        elif node.target is operator.getitem and node.args[0] in self._rows:
            self._values[node] = self._rows[node.args[0]][int(node.args[1])]  # type: ignore[index, arg-type]  # checked
        elif node.target in _INFIX:
            self._values[node] = self._infix(node)
        elif node in self._recording.varying:
            raise InputError(f"{node.target} cannot be written into an ONNX file; fold without this rewrite.")

    def _border(self, node: fx.Node) -> nn.Module | None:
        """The layer that pads with zeros for convolutions alone, which take the padding up."""
        layer = self._recording.attribute(str(node.target)) if node.op == "call_module" else None
        zeros = isinstance(layer, _PADS) and layer.value == 0
        read = [self._recording.attribute(str(u.target)) for u in node.users if u.op == "call_module"]
        alone = len(read) == len(node.users) and all(_takes_border(each) for each in read)
        return layer if zeros and alone else None

    def _place(self, node: fx.Node, number: int) -> None:
        """An operator of the file: itself where it is met first, a copy of it afterwards."""
        step, own = self._steps[number], self._nodes[number]
        read = [self._values.get(value) for value in nodes_in((node.args, node.kwargs))]
        pairs = {place: value for place, value in zip(step.reads, read, strict=True) if value is not None}
        if number in self._seen:
            own = self._copied(own, pairs)
        else:
            self._seen.add(number)
            self._rewire(own, pairs, step)
            self._advance(own)
        outputs = tuple(value for value in own.outputs if value.name)
        self._rows[node] = outputs
        self._values[node] = outputs[0]

    def _rewire(self, own: ir.Node, pairs: dict[int, ir.Value], step: Step) -> None:
        for place, value in pairs.items():
            if place >= len(own.inputs):
                _replace_captured(own, self._named[step.captured[place - len(own.inputs)]], value)
                continue
            old = own.inputs[place]
            if old is not None and old is not value:
                self._renames.setdefault(value, old)
                own.replace_input_with(place, value)

    def _copied(self, own: ir.Node, pairs: dict[int, ir.Value]) -> ir.Node:
        inputs = [pairs.get(i, value) for i, value in enumerate(own.inputs)]
        return self._add(own.op_type, inputs, dict(own.attributes), len(own.outputs), own.domain)

    def _layer(self, layer: nn.Module, source: ir.Value, dimensions: int) -> ir.Value:
        """The new nodes that a layer is."""
        if isinstance(layer, nn.Sequential):
            for part in layer:
                source = self._layer(part, source, dimensions)
                dimensions = (
                    2 if isinstance(part, nn.Flatten) else 4 if isinstance(part, nn.Unflatten) else dimensions
                )
            return source
        if isinstance(layer, nn.Identity):
            return source
        if isinstance(layer, _ConvNd):
            padding: Any = layer.padding
            return self._convolution(layer, source, tuple(padding) * 2)
        if isinstance(layer, nn.Linear):
            return self._linear(layer, source, dimensions)
        if isinstance(layer, nn.Flatten):
            return self._one("Flatten", [source], {"axis": layer.start_dim})
        if isinstance(layer, nn.Unflatten):
            shape = self._array(np.array([0, *layer.unflattened_size], dtype=np.int64), "shape")
            return self._one("Reshape", [source, shape])
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            names = ("weight", "bias", "running_mean", "running_var")
            weights = [self._tensor(getattr(layer, name), name) for name in names]
            return self._one("BatchNormalization", [source, *weights], {"epsilon": layer.eps})
        if isinstance(layer, _PADS):
            return self._padded(layer, source, dimensions)
        raise InputError(
            f"A {type(layer).__name__} cannot be written into an ONNX file; fold without this rewrite."
        )

    def _convolution(self, layer: Any, source: ir.Value, ends: tuple[int, ...]) -> ir.Value:
        settings: dict[str, Any] = {
            "dilations": list(layer.dilation),
            "group": layer.groups,
            "kernel_shape": list(layer.kernel_size),
            "pads": list(ends),
            "strides": list(layer.stride),
        }
        kind = "Conv"
        if isinstance(layer, _ConvTransposeNd):
            kind, settings["output_padding"] = "ConvTranspose", list(layer.output_padding)
        weights = [self._tensor(layer.weight, "weight")]
        if layer.bias is not None:
            weights.append(self._tensor(layer.bias, "bias"))
        return self._one(kind, [source, *weights], settings)

    def _linear(self, layer: nn.Linear, source: ir.Value, dimensions: int) -> ir.Value:
        if dimensions == 2:
            bias = layer.bias if layer.bias is not None else layer.weight.new_zeros(layer.out_features)
            weights = [self._tensor(layer.weight, "weight"), self._tensor(bias, "bias")]
            return self._one("Gemm", [source, *weights], {"transB": 1})
        found = self._one("MatMul", [source, self._tensor(layer.weight.t(), "weight")])
        return found if layer.bias is None else self._one("Add", [found, self._tensor(layer.bias, "bias")])

    def _padded(self, layer: Any, source: ir.Value, dimensions: int) -> ir.Value:
        own = _ends(layer, dimensions - 2)
        half = len(own) // 2
        ends = [0, 0, *own[:half], 0, 0, *own[half:]]
        if self._version < 11:
            return self._one("Pad", [source], {"pads": ends, "value": float(layer.value)})
        dtype = source.dtype or ir.DataType.FLOAT
        value = self._array(np.array(layer.value, dtype=dtype.numpy()), "value")
        return self._one("Pad", [source, self._array(np.array(ends, dtype=np.int64), "pads"), value])

    def _infix(self, node: fx.Node) -> ir.Value:
        kind = _INFIX[node.target]  # type: ignore[index]  # it was looked up before
        if kind == "Concat":
            parts, axis = node.args[0], node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
            return self._one("Concat", [self._values[v] for v in nodes_in(parts)], {"axis": axis})
        dtype = self._recording.kinds[node][0]
        sides = [
            self._values[value]
            if isinstance(value, fx.Node)
            else self._tensor(torch.tensor(value, dtype=dtype), "factor")
            for value in node.args
        ]
        return self._one(kind, sides)

    def _constant(self, name: str) -> ir.Value:
        return self._named[self._constants[name]]

    def _one(self, kind: str, inputs: list[ir.Value], settings: dict[str, Any] | None = None) -> ir.Value:
        return self._add(kind, inputs, settings or {}, 1).outputs[0]

    def _add(
        self,
        kind: str,
        inputs: list[ir.Value | None],
        settings: dict[str, Any],
        outputs: int,
        domain: str = "",
    ) -> ir.Node:
        attributes = ir.convenience.convert_attributes(settings)
        made = ir.Node(domain, kind, inputs, attributes, num_outputs=outputs)
        self._new.add(made)
        for value in made.outputs:
            value.name = self._free_name(f"folded_{len(self._new)}")
        made.name = made.outputs[0].name
        if self._cursor is None:
            self._graph.insert_before(self._nodes[0], made)
        else:
            self._graph.insert_after(self._cursor, made)
        self._cursor = made
        return made

    def _advance(self, node: ir.Node) -> None:
        self._cursor = node

    def _tensor(self, tensor: Tensor, name: str) -> ir.Value:
        value = tensor.detach().cpu().contiguous()
        if value.dtype == torch.bfloat16:
            held = ir.Tensor(
                value.view(torch.int16).numpy().view(ir.DataType.BFLOAT16.numpy()), dtype=ir.DataType.BFLOAT16
            )
            return self._initializer(held, name)
        return self._array(value.numpy(), name)

    def _array(self, array: np.ndarray[Any, Any], name: str) -> ir.Value:
        return self._initializer(ir.tensor(array), name)

    def _initializer(self, held: ir.TensorProtocol, name: str) -> ir.Value:
        own = self._free_name(f"folded_{len(self._new) + 1}.{name}")
        value = ir.Value(
            name=own, shape=ir.Shape(held.shape), type=ir.TensorType(held.dtype), const_value=held
        )
        held.name = own
        self._graph.register_initializer(value)
        if self.model.ir_version < 4:  # where constants are inputs as well
            self._graph.inputs.append(value)
        self._named[own] = value
        return value

    def _free_name(self, name: str) -> str:
        while name in self._named:
            name += "_"
        self._named[name] = ir.Value(name=name)
        return name

    def _dimensions(self, node: fx.Node) -> int:
        return len(self._recording.shapes[node])

    def _set_outputs(self, end: fx.Node) -> None:
        """Let the outputs of the file be what the network returns, under their names."""
        old = list(self._graph.outputs)
        for index, (node, value) in enumerate(zip(nodes_in(end.args), old, strict=True)):
            new = self._values[node]
            if new is value:
                continue
            taken = new.producer() is None or new.is_graph_output() or new.producer() not in self._new
            if taken:  # it has a name of its own
                new = self._one("Identity", [new])
            new.type, new.shape, new.doc_string = value.type, value.shape, value.doc_string
            new.metadata_props.update(value.metadata_props)
            name = value.name
            value.name = self._free_name(f"{name}_before")
            new.name = name
            self._graph.outputs[index] = new
            value.replace_all_uses_with(new)

    def _clear(self) -> None:
        """Remove what nobody reads any more, and was read before."""
        for node in reversed(list(self._graph)):
            if node not in self._idle and _is_idle(node):
                self._graph.remove(node, safe=True)
        for name, value in list(self._graph.initializers.items()):
            if name not in self._unread and _is_unread(value):
                del self._graph.initializers[name]
                if value in self._graph.inputs:
                    self._graph.inputs.remove(value)

    def _take_names(self) -> None:
        """Let new values have the names, and what is known of them, of those in whose places they stand."""
        kept = set(self._graph)
        for new, old in self._renames.items():
            producer, before = new.producer(), old.producer()
            if producer not in self._new or before is None or before in kept or new.is_graph_output():
                continue
            name, old.name = old.name, None
            new.name, new.type = name, old.type
            if new.shape is None:
                new.shape = old.shape
            assert producer is not None
            producer.name = f"{before.name or name}_folded"


def _takes_border(layer: Any) -> bool:
    plain = isinstance(layer, _ConvNd) and not isinstance(layer, _ConvTransposeNd)
    return plain and not any(layer.padding)


def _ends(layer: Any, axes: int) -> tuple[int, ...]:
    """The padding of a layer as ONNX orders it: all starts, then all ends."""
    given = layer.padding
    pairs = [(given[2 * i], given[2 * i + 1]) for i in range(axes)][::-1]
    return (*(before for before, _ in pairs), *(after for _, after in pairs))


def _values_of(graph: ir.Graph) -> dict[str, ir.Value]:
    found = {str(value.name): value for value in graph.inputs}
    found |= dict(graph.initializers.items())
    found |= {str(value.name): value for node in graph for value in node.outputs if value.name}
    return found


def _is_unread(value: ir.Value) -> bool:
    return not value.uses() and not value.is_graph_output()


def _is_idle(node: ir.Node) -> bool:
    return all(_is_unread(value) for value in node.outputs)


def _replace_captured(node: ir.Node, old: ir.Value, new: ir.Value) -> None:
    """Let the subgraphs of a node read another value."""
    if old is new:
        return
    for attribute in node.attributes.values():
        graphs = [attribute.value] if attribute.type == ir.AttributeType.GRAPH else []
        graphs = list(attribute.value) if attribute.type == ir.AttributeType.GRAPHS else graphs
        for graph in graphs:
            for index, value in enumerate(graph.outputs):
                if value is old:
                    graph.outputs[index] = new
            for inner in graph:
                for place, value in enumerate(inner.inputs):
                    if value is old:
                        inner.replace_input_with(place, new)
                _replace_captured(inner, old, new)
