"""One operator of an ONNX file, run by ONNX Runtime on values that are given."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import Any

import numpy as np
import onnx
import onnxruntime

from refold.quantization.ranges import Range
from refold.quantization.skeleton import DEQUANTIZE, Array, Graph


class Operators:
    """Runs the operators of a graph one by one, with values in the places of their inputs."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._sessions: dict[tuple[str, tuple[int, ...], tuple[bytes, ...]], Any] = {}

    def run(self, node: Any, values: list[Array | None]) -> Array:
        """The first output of an operator; an input that is None is left out."""
        settings = (v.tobytes() for i, v in enumerate(values) if v is not None and _is_setting(node, i))
        key = (node.output[0], tuple(-1 if v is None else v.ndim for v in values), tuple(settings))
        if key not in self._sessions:
            self._sessions[key] = self._session(node, values)
        feed = {
            f"input_{i}": value
            for i, value in enumerate(values)
            if value is not None and not _is_setting(node, i)
        }
        found: Array = self._sessions[key].run(None, feed)[0]
        return found

    def forget(self, node: Any) -> None:
        """Free what was kept to run an operator again."""
        for key in [key for key in self._sessions if key[0] == node.output[0]]:
            del self._sessions[key]

    def _session(self, node: Any, values: list[Array | None]) -> Any:
        alone = onnx.NodeProto()
        alone.CopyFrom(node)
        del alone.input[:], alone.output[:]
        alone.input.extend("" if value is None else f"input_{i}" for i, value in enumerate(values))
        alone.output.extend(["result", *("" for _ in node.output[1:])])
        given = [
            onnx.helper.make_tensor_value_info(
                f"input_{i}", onnx.helper.np_dtype_to_tensor_dtype(value.dtype), [None] * value.ndim
            )
            for i, value in enumerate(values)
            if value is not None and not _is_setting(node, i)
        ]
        settings = [
            onnx.numpy_helper.from_array(value, f"input_{i}")
            for i, value in enumerate(values)
            if value is not None and _is_setting(node, i)
        ]
        result = onnx.ValueInfoProto()
        result.name = "result"
        graph = onnx.helper.make_graph([alone], "operator", given, [result], settings)
        model = onnx.helper.make_model(
            graph, opset_imports=self.graph.opset, ir_version=self.graph.model.ir_version
        )
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )


def _is_setting(node: Any, place: int) -> bool:
    """Whether an input says how the operator works: sizes and scales of Resize, which must be known beforehand."""
    return bool(node.op_type == "Resize") and place > 0


class Stream:
    """The values of a network for some images, in parts, computed operator by operator and freed when read by all.

    Values that are held as integers are read as floats behind the operator that makes them such.
    """

    def __init__(self, graph: Graph, given: dict[str, list[Array]]) -> None:
        self.graph, self.operators = graph, Operators(graph)
        self._values = dict(given)
        self._ranges: dict[str, Range] = {}
        self._left = {name: len(readers) for name, readers in graph.readers.items()}
        for name in graph.outputs:
            self._left[name] = self._left.get(name, 0) + 1

    def hold(self, name: str, parts: list[Array], held_as: Range | None = None) -> None:
        """Give a value; ``held_as`` says what its integers stand for."""
        self._values[name] = parts
        if held_as is not None:
            self._ranges[name] = held_as

    def parts(self, name: str) -> Iterator[Array]:
        """A value part by part, computed from what there is; each operator runs once."""
        maker = self.graph.maker.get(name)
        if maker is not None and maker.op_type == DEQUANTIZE and maker.input[0] in self._ranges:
            held = self._ranges[maker.input[0]]
            return (held.floats(part) for part in self._values[maker.input[0]])
        if name not in self._values:
            self._compute(self.graph.maker[name])
        return iter(self._values[name])

    def values(self, name: str) -> list[Array]:
        """A value, all parts."""
        return list(self.parts(name))

    def _compute(self, node: Any) -> None:
        inputs = [self._input(name) for name in node.input]
        found = []
        for values in zip(*inputs, strict=False):  # constants go on for ever
            found.append(self.operators.run(node, list(values)))
        self.operators.forget(node)
        self.hold(node.output[0], found)
        self.release(node)

    def _input(self, name: str) -> Iterator[Array | None]:
        if not name:
            return repeat(None)
        return repeat(self.graph.constant(name)) if name in self.graph.constants else self.parts(name)

    def release(self, node: Any) -> None:
        """Free what nobody else reads after this operator."""
        for name in dict.fromkeys(node.input):
            self._read(name)

    def _read(self, name: str) -> None:
        if name not in self._left:
            return
        self._left[name] -= 1
        if self._left[name]:
            return
        self._values.pop(name, None)
        maker = self.graph.maker.get(name)
        if maker is not None and maker.op_type == DEQUANTIZE:
            self._read(maker.input[0])


def squared(values: Array) -> float:
    """The sum of the squares."""
    flat = values.ravel()
    return float(np.dot(flat, flat))
