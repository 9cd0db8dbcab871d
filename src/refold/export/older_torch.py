"""What PyTorch before 2.9 does not write to ONNX right with the onnxscript that runs beside it."""

from typing import Any, Optional

import torch
from torch.torch_version import TorchVersion


def translations() -> dict[Any, Any] | None:
    """How operators are written that PyTorch's own way fails at; None where it fails at none."""
    if TorchVersion(torch.__version__) >= "2.9":
        return None
    import onnxscript

    op = onnxscript.opset18

    # Read by onnxscript, which knows no other way to say that an input may be missing.
    def batch_norm(
        input: onnxscript.FLOAT,
        weight: Optional[onnxscript.FLOAT] = None,  # noqa: UP045
        bias: Optional[onnxscript.FLOAT] = None,  # noqa: UP045
        running_mean: Optional[onnxscript.FLOAT] = None,  # noqa: UP045
        running_var: Optional[onnxscript.FLOAT] = None,  # noqa: UP045
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Any:
        channels = op.Shape(running_mean)
        if weight is None:
            weight = op.Expand(op.CastLike(op.Constant(value_floats=[1.0]), input), channels)
        if bias is None:
            bias = op.Expand(op.CastLike(op.Constant(value_floats=[0.0]), input), channels)
        values = op.BatchNormalization(
            input,
            weight,
            bias,
            running_mean,
            running_var,
            epsilon=eps,
            momentum=1 - momentum,
            training_mode=0,
        )
        return values[0], op.Identity(running_mean), op.Identity(running_var)

    return {torch.ops.aten._native_batch_norm_legit_no_training.default: batch_norm}


def without_statistics(graph: Any) -> None:
    """Take the outputs from the batch norms of an ONNX graph that they have in training only."""
    for node in graph.node:
        if node.op_type == "BatchNormalization" and not any(
            attribute.name == "training_mode" and attribute.i for attribute in node.attribute
        ):
            del node.output[1:]
