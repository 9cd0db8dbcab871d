"""Where a file computes in int8: ONNX Runtime's own quantiser decides it and writes the operators."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from refold.errors import InputError, first_line
from refold.export.converting import muted

Array = NDArray[Any]

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
LAYERS = ("Conv", "Gemm", "MatMul")
NO_LAYERS = "The network has no convolution or linear layer to quantise; int8 is for networks made of these."


@dataclass(frozen=True)
class Layer:
    """A layer with integer weights: its operator, and the operators that turn its weight and its bias into floats.

    Where activations are floats, so is the bias, and none turns it into any.
    """

    node: Any
    weight: Any
    bias: Any | None

    @property
    def name(self) -> str:
        """The name of its weight in the file, without what the quantiser appends."""
        return str(self.weight.input[0]).removesuffix("_quantized")

    @property
    def bias_name(self) -> str:
        """The name of its bias, alike; empty where it has none."""
        if self.bias is None:
            return str(self.node.input[2]) if len(self.node.input) > 2 else ""
        return str(self.bias.input[0]).removesuffix("_quantized")


class Graph:
    """An ONNX model with its constants and the operators that make and read each value."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.refresh()

    def refresh(self) -> None:
        """Look at the model again, once it changed."""
        model = self.model
        self.nodes: list[Any] = list(model.graph.node)
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.inputs = [value.name for value in model.graph.input if value.name not in self.constants]
        self.outputs = [value.name for value in model.graph.output]
        self.maker = {name: node for node in self.nodes for name in node.output}
        self.readers: dict[str, list[Any]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                self.readers.setdefault(name, []).append(node)

    def constant(self, name: str) -> Array:
        """The value of a constant."""
        found: Array = numpy_helper.to_array(self.constants[name])
        return found

    def set_constant(self, name: str, value: Array) -> None:
        """Give a constant another value, of any shape and dtype."""
        self.constants[name].CopyFrom(numpy_helper.from_array(np.asarray(value, order="C"), name))

    @cached_property
    def opset(self) -> list[Any]:
        """The sets of operators that the file is written in."""
        return list(self.model.opset_import)

    def is_weight(self, node: Any) -> bool:
        """Whether an operator turns a constant of integers into floats."""
        return node.op_type == DEQUANTIZE and node.input[0] in self.constants

    def quantized(self, name: str) -> Any | None:
        """The operator that rounds a value to integers, where all that reads it reads these."""
        readers = self.readers.get(name, [])
        return readers[0] if len(readers) == 1 and readers[0].op_type == QUANTIZE else None

    def layer(self, node: Any) -> Layer | None:
        """What a node is as a layer with integer weights; None where it is none."""
        if node.op_type not in LAYERS:
            return None
        makers = [self.maker.get(name) for name in node.input]
        if len(makers) < 2 or makers[1] is None or not self.is_weight(makers[1]):
            return None
        bias = makers[2] if len(makers) > 2 and makers[2] is not None and self.is_weight(makers[2]) else None
        return Layer(node, makers[1], bias)

    def reads_integers(self, layer: Layer) -> bool:
        """Whether a layer reads values that were rounded, so that engines compute it with integers."""
        maker = self.maker.get(layer.node.input[0])
        return maker is not None and bool(maker.op_type == DEQUANTIZE)

    @property
    def layers(self) -> list[Layer]:
        """All layers with integer weights, in the order they run."""
        return [layer for node in self.nodes if (layer := self.layer(node)) is not None]


def write_skeleton(
    source: Path, target: Path, example: Mapping[str, Array], *, per_channel: bool, in_float: Collection[str]
) -> Graph:
    """Let ONNX Runtime's quantiser write a file with integer weights and activations, whose scales mean nothing yet.

    ``in_float`` are the names of the weights whose layers stay in float32. What the network returns is not rounded.
    Raises `InputError` where the quantiser refuses the file or finds nothing to quantise.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Once(CalibrationDataReader):  # type: ignore[misc]  # its class is untyped
        def __init__(self) -> None:
            self.left = [dict(example)]

        def get_next(self) -> dict[str, Array] | None:
            return self.left.pop() if self.left else None

    plain = onnx.load(str(source))
    excluded = [node.name for node in plain.graph.node if set(node.input) & set(in_float)]
    try:
        with _own_handler(), muted():
            quantize_static(
                str(source),
                str(target),
                Once(),
                per_channel=per_channel,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=excluded,
            )
    except Exception as error:
        raise InputError(f"ONNX Runtime cannot quantise the network: {first_line(error)}.") from error
    graph = Graph(_with_float_outputs(onnx.load(str(target))))
    if not graph.layers:
        raise InputError(NO_LAYERS)
    return graph


def compact(graph: Graph) -> None:
    """Keep each zero point once, and no shapes of values, which whoever reads the file computes."""
    model, kept = graph.model.graph, dict[bytes, str]()
    for node in model.node:
        if node.op_type in (QUANTIZE, DEQUANTIZE) and len(node.input) > 2:
            name = node.input[2]
            tensor = onnx.TensorProto()
            tensor.CopyFrom(graph.constants[name])
            tensor.name = ""
            node.input[2] = kept.setdefault(tensor.SerializeToString(), name)
    read = {name for node in model.node for name in node.input} | {value.name for value in model.output}
    for tensor in [tensor for tensor in model.initializer if tensor.name not in read]:
        model.initializer.remove(tensor)
    del model.value_info[:]
    graph.refresh()


@contextmanager
def _own_handler() -> Iterator[None]:
    """Keep the quantiser's first warning from giving the root logger a handler for a stream that will be closed."""
    handler = logging.NullHandler()
    logging.root.addHandler(handler)
    try:
        yield
    finally:
        logging.root.removeHandler(handler)


def _with_float_outputs(model: Any) -> Any:
    """The model without the rounding of what it returns: 256 steps for all classes are too few for close answers."""
    graph = Graph(model)
    removed = []
    for name in graph.outputs:
        dequantized = graph.maker.get(name)
        if dequantized is None or dequantized.op_type != DEQUANTIZE:
            continue
        quantized = graph.maker.get(dequantized.input[0])
        if quantized is None or quantized.op_type != QUANTIZE:
            continue
        inner = quantized.input[0]
        source = graph.maker.get(inner)
        if source is None or len(graph.readers[inner]) > 1 or len(graph.readers[dequantized.input[0]]) > 1:
            continue
        source.output[list(source.output).index(inner)] = name
        removed += [quantized, dequantized]
    for node in removed:
        model.graph.node.remove(node)
    return model
