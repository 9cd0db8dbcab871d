"""Run single operators that the table does not know: by ONNX Runtime, where it has no kernel for the type by ONNX's
reference implementation, and where that does not know them either by ONNX Runtime in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.reference
import torch
from torch import Tensor

from refold.errors import InputError, first_line
from refold.onnx_files.node import DTYPES

_HALVES = (torch.float16, torch.bfloat16)


class Evaluated:
    """An operator of a file as a function of tensors, those that it captures for its subgraphs behind its inputs."""

    def __init__(self, node: bytes, opsets: dict[str, int], ir_version: int, captured: Sequence[str]) -> None:
        self._node, self._opsets, self._ir_version = node, opsets, ir_version
        self._captured = list(captured)
        self._runs: dict[tuple[Any, ...], Callable[[dict[str, Any]], list[Any]]] = {}

    def __deepcopy__(self, memo: Any) -> Evaluated:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_runs": {}}

    def __call__(self, *tensors: Tensor | None) -> Any:
        """The outputs, one tensor or several; float16 and bfloat16 are computed in float32 and rounded."""
        half = next((t.dtype for t in tensors if t is not None and t.dtype in _HALVES), None)
        given = [t if t is None or half is None or t.dtype != half else t.float() for t in tensors]
        node = onnx.NodeProto.FromString(self._node)
        names = [*node.input, *self._captured]
        feed = {n: _to_numpy(t) for n, t in zip(names, given, strict=True) if n and t is not None}
        types = tuple((name, value.dtype.str) for name, value in feed.items())
        if types not in self._runs:
            self._runs[types] = self._first(node, feed)
        found = [torch.from_numpy(np.array(value)) for value in self._runs[types](feed)]
        if half is not None:
            found = [value.to(half) if value.dtype == torch.float32 else value for value in found]
        return found[0] if len(found) == 1 else tuple(found)

    def _first(self, node: onnx.NodeProto, feed: dict[str, Any]) -> Callable[[dict[str, Any]], list[Any]]:
        """The first way to run the operator that works."""
        failure: Exception | None = None
        for way in (self._in_runtime, self._in_reference, self._in_float32):
            try:
                run = way(node, feed)
                run(feed)
                return run
            except Exception as error:  # each raises what it likes for what it has not
                failure = error
        assert failure is not None
        raise InputError(
            f"The operator {node.op_type}{f' of {node.domain}' if node.domain else ''} cannot be computed "
            f"({first_line(failure)}); leave it out of the file, or fold the model that it was made from."
        ) from failure

    def _in_runtime(
        self, node: onnx.NodeProto, feed: dict[str, Any]
    ) -> Callable[[dict[str, Any]], list[Any]]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(
            self._alone(node, feed).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return lambda given: session.run(None, given)

    def _in_reference(
        self, node: onnx.NodeProto, feed: dict[str, Any]
    ) -> Callable[[dict[str, Any]], list[Any]]:
        evaluator = onnx.reference.ReferenceEvaluator(self._alone(node, feed))
        return lambda given: evaluator.run(None, given)

    def _in_float32(
        self, node: onnx.NodeProto, feed: dict[str, Any]
    ) -> Callable[[dict[str, Any]], list[Any]]:
        """By the only kernel that there may be; what it rounds is the same before and after a fold, or nearly so."""

        def narrow(given: dict[str, Any]) -> dict[str, Any]:
            return {n: v.astype(np.float32) if v.dtype == np.float64 else v for n, v in given.items()}

        run = self._in_runtime(node, narrow(feed))
        return lambda given: run(narrow(given))

    def _alone(self, node: onnx.NodeProto, feed: dict[str, Any]) -> onnx.ModelProto:
        """The operator as a model."""
        inputs = [
            onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(v.dtype), None)
            for n, v in feed.items()
        ]
        outputs = [onnx.helper.make_empty_tensor_value_info(name) for name in node.output if name]
        graph = onnx.helper.make_graph([node], "operator", inputs, outputs)
        opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in self._opsets.items()]
        return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=self._ir_version)


def _to_numpy(tensor: Tensor) -> Any:
    return tensor.detach().cpu().numpy()


def constant_value(node: bytes, opsets: dict[str, int], inputs: Sequence[np.ndarray[Any, Any] | None]) -> Any:
    """What an operator makes of small constants, as an array; None where it cannot be computed or gives several."""
    tensors = [None if value is None else torch.from_numpy(np.array(value)) for value in inputs]
    try:
        found = Evaluated(node, opsets, 8, ())(*tensors)
    except (InputError, TypeError, ValueError):
        return None
    return found.numpy() if isinstance(found, Tensor) and found.dtype in DTYPES.values() else None
