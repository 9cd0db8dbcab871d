"""The table of ONNX operators: for each, the function of torch that computes it and the operator that the registry of
`refold.recording.operators` knows it as, which says what it is linearly.

Entries that move values are in `rearranging`. What is not in the table, or is called in a way that its entry does not
know, stays as it is and is computed by ONNX's own implementations (`evaluating`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from refold.onnx_files import functions, rearranging  # noqa: F401  # which puts its entries into the table
from refold.onnx_files.node import DTYPES, OnnxNode
from refold.onnx_files.table import TABLE, Call, Entry, entry


def call_of(node: OnnxNode) -> Call | None:
    """The call that an operator of ONNX is; None for one that the table does not know."""
    found = TABLE.get(node.kind) if node.domain == "" else None
    return None if found is None else found(node)


def _plain(run: Callable[..., Any], name: str) -> Entry:
    """A function of all inputs, without settings."""
    return lambda node: Call(run, name, tuple(node.inputs))


TABLE |= {
    kind: _plain(run, name)
    for kind, run, name in (
        ("Relu", F.relu, "relu"),
        ("Sigmoid", torch.sigmoid, "sigmoid"),
        ("Tanh", torch.tanh, "tanh"),
        ("HardSwish", F.hardswish, "hardswish"),
        ("Softsign", F.softsign, "softsign"),
        ("Softplus", F.softplus, "softplus"),
        ("Mish", F.mish, "mish"),
        ("Erf", torch.erf, ""),
        ("Exp", torch.exp, ""),
        ("Log", torch.log, ""),
        ("Sqrt", torch.sqrt, ""),
        ("Abs", torch.abs, ""),
        ("Reciprocal", torch.reciprocal, ""),
        ("Sin", torch.sin, ""),
        ("Cos", torch.cos, ""),
        ("Floor", torch.floor, "floor"),
        ("Ceil", torch.ceil, "ceil"),
        ("Round", torch.round, "round"),
        ("Sign", torch.sign, "sign"),
        ("Not", torch.logical_not, ""),
        ("And", torch.logical_and, ""),
        ("Or", torch.logical_or, ""),
        ("Equal", torch.eq, ""),
        ("Less", torch.lt, ""),
        ("LessOrEqual", torch.le, ""),
        ("Greater", torch.gt, ""),
        ("GreaterOrEqual", torch.ge, ""),
        ("Where", torch.where, ""),
        ("Pow", functions.power, ""),
        ("Min", functions.least, ""),
        ("Max", functions.greatest, ""),
        ("PRelu", functions.prelu, "prelu"),
        ("Range", functions.span, ""),
        ("Size", functions.size_of, ""),
        ("Neg", torch.neg, "neg"),
        ("Add", torch.add, "add"),
        ("Sub", torch.sub, "sub"),
        ("Mul", torch.mul, "mul"),
        ("Div", functions.divided, "div"),
        ("MatMul", torch.matmul, "matmul"),
        ("Identity", functions.same, "alias"),
    )
}


@entry("Dropout")
def _dropout(node: OnnxNode) -> Call | None:
    trains = node.inputs[2:3] != [] and node.inputs[2] is not None
    if len(node.outputs) > 1 or (trains and node.numbers(2) != [0]):
        return None
    return Call(functions.same, "alias", (node.inputs[0],))


@entry("Sum")
def _sum(node: OnnxNode) -> Call:
    if len(node.inputs) == 2:
        return Call(torch.add, "add", tuple(node.inputs))
    if len(node.inputs) == 1:
        return Call(functions.same, "alias", tuple(node.inputs))
    return Call(functions.added, "added", tuple(node.inputs))


@entry("Cast", "CastLike")
def _cast(node: OnnxNode) -> Call | None:
    dtype = DTYPES.get(node.attribute("to")) if node.kind == "Cast" else node.dtype(node.inputs[1])
    return None if dtype is None else Call(torch.Tensor.to, "to", (node.inputs[0], dtype))


@entry("LeakyRelu", "Elu", "Celu")
def _with_slope(node: OnnxNode) -> Call:
    run, name, default = {
        "LeakyRelu": (F.leaky_relu, "leaky_relu", 0.01),
        "Elu": (F.elu, "elu", 1.0),
        "Celu": (F.celu, "celu", 1.0),
    }[node.kind]
    return Call(run, name, (node.inputs[0], node.attribute("alpha", default)))


@entry("Selu")
def _selu(node: OnnxNode) -> Call:
    alpha = node.attribute("alpha", 1.67326319217681884765625)
    gamma = node.attribute("gamma", 1.05070102214813232421875)
    return Call(functions.selu, "selu", (node.inputs[0], alpha, gamma))


@entry("HardSigmoid")
def _hard_sigmoid(node: OnnxNode) -> Call:
    settings = node.attribute("alpha", 0.2), node.attribute("beta", 0.5)
    return Call(functions.hard_sigmoid, "hardsigmoid", (node.inputs[0], *settings))


@entry("Gelu")
def _gelu(node: OnnxNode) -> Call:
    return Call(F.gelu, "gelu", (node.inputs[0],), {"approximate": node.attribute("approximate", "none")})


@entry("Clip")
def _clip(node: OnnxNode) -> Call:
    if node.version < 11:
        ends: list[Any] = [node.attribute("min", None), node.attribute("max", None)]
    else:
        given = [*node.inputs[1:], None, None][:2]
        known = [None if value is None else node.known(value) for value in given]
        if any(v is not None and k is None for v, k in zip(given, known, strict=True)):
            return Call(functions.clamp, "", (node.inputs[0], *given))
        ends = [None if value is None else float(value) for value in known]
    if None in ends:
        return Call(functions.clamp, "clamp", (node.inputs[0], *ends))
    return Call(F.hardtanh, "hardtanh", (node.inputs[0], *ends))


@entry("Softmax", "LogSoftmax")
def _softmax(node: OnnxNode) -> Call:
    logarithm = node.kind == "LogSoftmax"
    if node.version < 13:
        settings = (node.attribute("axis", 1), logarithm)
        return Call(functions.softmax_of_matrix, "", (node.inputs[0], *settings))
    run, name = (torch.log_softmax, "log_softmax") if logarithm else (torch.softmax, "softmax")
    return Call(run, name, (node.inputs[0], node.attribute("axis", -1)))


@entry("Conv")
def _convolution(node: OnnxNode) -> Call | None:
    window = node.window(node.shape(node.inputs[1])[2:], node.inputs[0])
    if window is None:
        return None
    axes, inputs = len(window.kernel_size), [*node.inputs, None][:3]
    name = f"conv{axes}d"
    if not 1 <= axes <= 3:
        return None
    settings = (window.dilation, node.attribute("group", 1))
    if all(before == after for before, after in window.ends):
        ends = tuple(before for before, _ in window.ends)
        return Call(getattr(F, name), name, (*inputs, window.stride, ends, *settings))
    return Call(functions.convolution, name, (*inputs, window.stride, window.ends, *settings))


@entry("ConvTranspose")
def _transposed_convolution(node: OnnxNode) -> Call | None:
    window = node.window(node.shape(node.inputs[1])[2:], None)
    automatic = node.attribute("auto_pad", "NOTSET").startswith("SAME")
    if window is None or automatic or "output_shape" in node.attributes:
        return None
    axes, inputs = len(window.kernel_size), [*node.inputs, None][:3]
    if not 1 <= axes <= 3 or any(before != after for before, after in window.ends):
        return None
    name, ends = f"conv_transpose{axes}d", tuple(before for before, _ in window.ends)
    beyond = tuple(node.attribute("output_padding", [0] * axes))
    settings = (window.stride, ends, beyond, node.attribute("group", 1), window.dilation)
    return Call(getattr(F, name), name, (*inputs, *settings))


@entry("BatchNormalization")
def _batch_norm(node: OnnxNode) -> Call | None:
    trains = bool(node.attribute("training_mode", 0)) or (node.version < 14 and len(node.outputs) > 1)
    if (trains and len(node.outputs) > 1) or node.attribute("spatial", 1) != 1:
        return None
    settings = (trains, 0.0, node.attribute("epsilon", 1e-5), False)
    return Call(torch.batch_norm, "batch_norm", (*node.inputs, *settings))


@entry("Gemm")
def _gemm(node: OnnxNode) -> Call:
    a, b, c = [*node.inputs, None][:3]
    alpha, beta = node.attribute("alpha", 1.0), node.attribute("beta", 1.0)
    turn_a, turn_b = bool(node.attribute("transA", 0)), bool(node.attribute("transB", 0))
    row = c is None or node.shape(c) in ((), (1,)) or len(node.shape(c)) == 1
    if not turn_a and turn_b and row and alpha == beta == 1 and len(node.shape(c)) == 1:
        return Call(F.linear, "linear", (a, b, c))
    if not turn_a and not turn_b and c is not None:
        return Call(torch.addmm, "addmm", (c, a, b), {"beta": beta, "alpha": alpha})
    if not turn_a and turn_b and c is None and alpha == 1:
        return Call(F.linear, "linear", (a, b))
    return Call(functions.gemm, "", (a, b, c, alpha, beta, turn_a, turn_b))


@entry("Einsum")
def _einsum(node: OnnxNode) -> Call:
    return Call(torch.einsum, "", (node.attribute("equation"), *node.inputs))


@entry("AveragePool")
def _average_pool(node: OnnxNode) -> Call | None:
    window = node.window(node.attribute("kernel_shape"), node.inputs[0])
    if window is None or any(each != 1 for each in window.dilation):
        return None
    axes = len(window.kernel_size)
    ceil, counted = bool(node.attribute("ceil_mode", 0)), bool(node.attribute("count_include_pad", 0))
    even = all(
        before == after <= k // 2 for (before, after), k in zip(window.ends, window.kernel_size, strict=True)
    )
    if not 1 <= axes <= 3:
        return None
    if even and not (ceil and counted):
        ends = tuple(before for before, _ in window.ends)
        name = f"avg_pool{axes}d"
        settings = (window.kernel_size, window.stride, ends, ceil, counted)
        return Call(getattr(F, name), name, (node.inputs[0], *settings))
    return Call(
        functions.average_pool,
        "",
        (node.inputs[0], window.kernel_size, window.stride, window.ends, ceil, counted),
    )


@entry("MaxPool")
def _max_pool(node: OnnxNode) -> Call | None:
    window = node.window(node.attribute("kernel_shape"), node.inputs[0])
    if window is None or len(node.outputs) > 1 or not 1 <= len(window.kernel_size) <= 3:
        return None
    ceil = bool(node.attribute("ceil_mode", 0))
    settings = (window.kernel_size, window.stride, window.ends, window.dilation, ceil)
    return Call(functions.max_pool, f"max_pool{len(window.kernel_size)}d", (node.inputs[0], *settings))


@entry("GlobalAveragePool", "GlobalMaxPool")
def _global_pool(node: OnnxNode) -> Call | None:
    axes = len(node.shape(node.inputs[0])) - 2
    if not 1 <= axes <= 3:
        return None
    name = f"adaptive_{'avg' if node.kind == 'GlobalAveragePool' else 'max'}_pool{axes}d"
    return Call(getattr(F, name), name, (node.inputs[0], (1,) * axes))


_REDUCED = {"ReduceMean": "mean", "ReduceSum": "sum", "ReduceMax": "max", "ReduceMin": "min"}
_REDUCED |= {"ReduceL1": "norm1", "ReduceL2": "norm2", "ReduceSumSquare": "squares"}


@entry(*_REDUCED)
def _reduce(node: OnnxNode) -> Call:
    axes = node.numbers(1, "axes")
    keep = bool(node.attribute("keepdims", 1))
    kind = _REDUCED[node.kind]
    given: Any = axes
    if axes is None and len(node.inputs) > 1 and node.inputs[1] is not None:
        given = node.inputs[1]
    if kind == "mean" and axes:
        return Call(torch.mean, "mean", (node.inputs[0], tuple(axes), keep))
    every = not node.attribute("noop_with_empty_axes", 0)
    return Call(functions.reduced, "", (node.inputs[0], given, keep, kind, every))


@entry("DequantizeLinear", "QuantizeLinear")
def _quantised(node: OnnxNode) -> Call | None:
    values = [*node.inputs, None][:3]
    dtype = node.dtype(values[2]) if values[2] is not None else torch.uint8
    unusual = any(node.attribute(name, 0) for name in ("block_size", "output_dtype", "precision"))
    if unusual or dtype not in functions.RANGES:
        return None
    args = (*values, node.attribute("axis", 1))
    if node.kind == "DequantizeLinear":
        return Call(functions.dequantised, "", args)
    return Call(functions.quantised, "round", (*args, dtype))


@entry("LayerNormalization")
def _layer_norm(node: OnnxNode) -> Call | None:
    if len(node.outputs) > 1:
        return None
    settings = (node.attribute("axis", -1), node.attribute("epsilon", 1e-5))
    return Call(functions.layer_norm, "layer_norm", (*[*node.inputs, None][:3], *settings))


@entry("InstanceNormalization")
def _instance_norm(node: OnnxNode) -> Call:
    x, scale, bias = node.inputs
    settings = {"weight": scale, "bias": bias, "eps": node.attribute("epsilon", 1e-5)}
    return Call(F.instance_norm, "instance_norm", (x,), settings)


@entry("ArgMax")
def _argmax(node: OnnxNode) -> Call | None:
    if node.attribute("select_last_index", 0):
        return None
    return Call(
        torch.argmax, "", (node.inputs[0], node.attribute("axis", 0), bool(node.attribute("keepdims", 1)))
    )


@entry("CumSum")
def _cumulative_sum(node: OnnxNode) -> Call | None:
    axis = node.numbers(1)
    plain = not node.attribute("exclusive", 0) and not node.attribute("reverse", 0)
    return Call(torch.cumsum, "", (node.inputs[0], axis[0])) if axis and plain else None
