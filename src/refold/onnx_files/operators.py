"""The table of ONNX operators: for each, the function of torch that computes it and the operator that the registry of
`refold.recording.operators` knows it as, which says what it is linearly.

What is not in the table, or is called in a way that its entry does not know, stays as it is and is computed by ONNX's
own implementations (`evaluating`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from refold.onnx_files import functions
from refold.onnx_files.node import DTYPES, OnnxNode


@dataclass(frozen=True)
class Call:
    """A function and what it is called with, values of the graph (`ir.Value`) in the place of tensors."""

    run: Callable[..., Any]
    operator: str
    """Its name in the registry of operators; empty for what is never more than itself."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


Entry = Callable[[OnnxNode], Call | None]
_TABLE: dict[str, Entry] = {}


def call_of(node: OnnxNode) -> Call | None:
    """The call that an operator of ONNX is; None for one that the table does not know."""
    entry = _TABLE.get(node.kind) if node.domain == "" else None
    return None if entry is None else entry(node)


def _entry(*names: str) -> Callable[[Entry], Entry]:
    def keep(entry: Entry) -> Entry:
        _TABLE.update(dict.fromkeys(names, entry))
        return entry

    return keep


def _plain(run: Callable[..., Any], name: str) -> Entry:
    """A function of all inputs, without settings."""
    return lambda node: Call(run, name, tuple(node.inputs))


_TABLE |= {
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


@_entry("Dropout")
def _dropout(node: OnnxNode) -> Call | None:
    trains = node.inputs[2:3] != [] and node.inputs[2] is not None
    if len(node.outputs) > 1 or (trains and node.numbers(2) != [0]):
        return None
    return Call(functions.same, "alias", (node.inputs[0],))


@_entry("Sum")
def _sum(node: OnnxNode) -> Call:
    if len(node.inputs) == 2:
        return Call(torch.add, "add", tuple(node.inputs))
    return Call(functions.added if len(node.inputs) > 1 else functions.same, "", tuple(node.inputs))


@_entry("Cast", "CastLike")
def _cast(node: OnnxNode) -> Call | None:
    dtype = DTYPES.get(node.attribute("to")) if node.kind == "Cast" else node.dtype(node.inputs[1])
    return None if dtype is None else Call(torch.Tensor.to, "to", (node.inputs[0], dtype))


@_entry("LeakyRelu", "Elu", "Celu")
def _with_slope(node: OnnxNode) -> Call:
    run, name, default = {
        "LeakyRelu": (F.leaky_relu, "leaky_relu", 0.01),
        "Elu": (F.elu, "elu", 1.0),
        "Celu": (F.celu, "celu", 1.0),
    }[node.kind]
    return Call(run, name, (node.inputs[0], node.attribute("alpha", default)))


@_entry("Selu")
def _selu(node: OnnxNode) -> Call:
    alpha = node.attribute("alpha", 1.67326319217681884765625)
    gamma = node.attribute("gamma", 1.05070102214813232421875)
    return Call(functions.selu, "selu", (node.inputs[0], alpha, gamma))


@_entry("HardSigmoid")
def _hard_sigmoid(node: OnnxNode) -> Call:
    settings = node.attribute("alpha", 0.2), node.attribute("beta", 0.5)
    return Call(functions.hard_sigmoid, "hardsigmoid", (node.inputs[0], *settings))


@_entry("Gelu")
def _gelu(node: OnnxNode) -> Call:
    return Call(F.gelu, "gelu", (node.inputs[0],), {"approximate": node.attribute("approximate", "none")})


@_entry("Clip")
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


@_entry("Softmax", "LogSoftmax")
def _softmax(node: OnnxNode) -> Call:
    logarithm = node.kind == "LogSoftmax"
    if node.version < 13:
        settings = (node.attribute("axis", 1), logarithm)
        return Call(functions.softmax_of_matrix, "", (node.inputs[0], *settings))
    run, name = (torch.log_softmax, "log_softmax") if logarithm else (torch.softmax, "softmax")
    return Call(run, name, (node.inputs[0], node.attribute("axis", -1)))


@_entry("Conv")
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


@_entry("ConvTranspose")
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


@_entry("BatchNormalization")
def _batch_norm(node: OnnxNode) -> Call | None:
    trains = bool(node.attribute("training_mode", 0)) or (node.version < 14 and len(node.outputs) > 1)
    if (trains and len(node.outputs) > 1) or node.attribute("spatial", 1) != 1:
        return None
    settings = (trains, 0.0, node.attribute("epsilon", 1e-5), False)
    return Call(torch.batch_norm, "batch_norm", (*node.inputs, *settings))


@_entry("Gemm")
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


@_entry("Einsum")
def _einsum(node: OnnxNode) -> Call:
    return Call(torch.einsum, "", (node.attribute("equation"), *node.inputs))


@_entry("AveragePool")
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


@_entry("MaxPool")
def _max_pool(node: OnnxNode) -> Call | None:
    window = node.window(node.attribute("kernel_shape"), node.inputs[0])
    if window is None or len(node.outputs) > 1 or not 1 <= len(window.kernel_size) <= 3:
        return None
    ceil = bool(node.attribute("ceil_mode", 0))
    settings = (window.kernel_size, window.stride, window.ends, window.dilation, ceil)
    return Call(functions.max_pool, f"max_pool{len(window.kernel_size)}d", (node.inputs[0], *settings))


@_entry("GlobalAveragePool", "GlobalMaxPool")
def _global_pool(node: OnnxNode) -> Call | None:
    axes = len(node.shape(node.inputs[0])) - 2
    if not 1 <= axes <= 3:
        return None
    name = f"adaptive_{'avg' if node.kind == 'GlobalAveragePool' else 'max'}_pool{axes}d"
    return Call(getattr(F, name), name, (node.inputs[0], (1,) * axes))


_REDUCED = {"ReduceMean": "mean", "ReduceSum": "sum", "ReduceMax": "max", "ReduceMin": "min"}
_REDUCED |= {"ReduceL1": "norm1", "ReduceL2": "norm2", "ReduceSumSquare": "squares"}


@_entry(*_REDUCED)
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


@_entry("Concat")
def _concatenation(node: OnnxNode) -> Call:
    return Call(torch.cat, "cat", (list(node.inputs), node.attribute("axis", 1)))


@_entry("Split")
def _split(node: OnnxNode) -> Call | None:
    axis, shape = node.attribute("axis", 0), node.shape(node.inputs[0])
    sizes = node.numbers(1, "split")
    if sizes is None and len(node.inputs) < 2 and shape and shape[axis] is not None:
        each = -(-shape[axis] // len(node.outputs))
        sizes = [min(each, shape[axis] - each * i) for i in range(len(node.outputs))]
    return None if sizes is None else Call(torch.split, "split", (node.inputs[0], sizes, axis))


@_entry("Slice")
def _slice(node: OnnxNode) -> Call:
    names = ("starts", "ends", "axes", "steps")
    given = [node.numbers(1 + i, name) for i, name in enumerate(names)]
    values = [*node.inputs[1:], None, None, None, None][:4]
    if any(value is not None and own is None for value, own in zip(values, given, strict=True)):
        mixed = [value if own is None else own for value, own in zip(values, given, strict=True)]
        return Call(functions.sliced, "", (node.inputs[0], *mixed))
    starts, ends, axes, steps = given
    assert starts is not None
    assert ends is not None
    steps = steps or [1] * len(starts)
    along = axes if axes is not None else list(range(len(starts)))
    if any(step < 1 for step in steps) or (any(a < 0 for a in along) and not node.shape(node.inputs[0])):
        return Call(functions.sliced, "", (node.inputs[0], starts, ends, axes, steps))
    along = [a % len(node.shape(node.inputs[0])) if a < 0 else a for a in along]
    index = [slice(None)] * (max(along) + 1)
    for start, end, axis, step in zip(starts, ends, along, steps, strict=True):
        index[axis] = slice(start, end, None if step == 1 else step)
    return Call(operator.getitem, "getitem", (node.inputs[0], tuple(index)))


@_entry("Pad")
def _pad(node: OnnxNode) -> Call | None:
    ends = node.numbers(1, "pads")
    axes = node.numbers(3) if len(node.inputs) > 3 and node.inputs[3] is not None else None
    mode, value = node.attribute("mode", "constant"), node.attribute("value", 0.0)
    if ends is None or (len(node.inputs) > 3 and node.inputs[3] is not None and axes is None):
        return None
    if node.version > 10 and len(node.inputs) > 2 and node.inputs[2] is not None:
        known = node.known(node.inputs[2])
        if known is None:
            return None
        value = float(known)
    dimensions = len(node.shape(node.inputs[0])) or len(ends) // 2
    along = axes if axes is not None else list(range(len(ends) // 2))
    pairs = [(0, 0)] * dimensions
    for i, axis in enumerate(along):
        pairs[axis % dimensions] = (ends[i], ends[i + len(along)])
    first = next((i for i, pair in enumerate(pairs) if any(pair)), dimensions)
    flat = [end for pair in reversed(pairs[first:]) for end in pair]
    if not flat:
        return Call(functions.same, "alias", (node.inputs[0],))
    if mode == "constant":
        return Call(F.pad, "pad", (node.inputs[0], flat, mode, value))
    kept = 2 * (dimensions - 2)
    if first < 2 or mode not in ("reflect", "edge") or not 3 <= dimensions <= 5:
        return None
    flat = [*flat, *(0,) * (kept - len(flat))]
    return Call(F.pad, "pad", (node.inputs[0], flat, {"reflect": "reflect", "edge": "replicate"}[mode]))


@_entry("Transpose")
def _transpose(node: OnnxNode) -> Call | None:
    order = node.attribute("perm", None)
    if order is None:
        order = list(range(len(node.shape(node.inputs[0]))))[::-1]
    return Call(torch.permute, "permute", (node.inputs[0], tuple(order))) if order else None


@_entry("Flatten")
def _flatten(node: OnnxNode) -> Call:
    if node.attribute("axis", 1) == 1:
        return (
            Call(torch.flatten, "flatten", (node.inputs[0], 1))
            if len(node.shape(node.inputs[0])) > 1
            else (Call(functions.flatten, "reshape", (node.inputs[0], 1)))
        )
    return Call(functions.flatten, "reshape", (node.inputs[0], node.attribute("axis", 1)))


@_entry("Reshape")
def _reshape(node: OnnxNode) -> Call:
    shape: Any = node.numbers(1)
    shape = node.inputs[1] if shape is None else shape
    return Call(functions.reshape, "reshape", (node.inputs[0], shape, bool(node.attribute("allowzero", 0))))


@_entry("Squeeze", "Unsqueeze")
def _squeeze(node: OnnxNode) -> Call:
    axes: Any = node.numbers(1, "axes")
    if axes is None and len(node.inputs) > 1:
        axes = node.inputs[1]
    run = functions.squeeze if node.kind == "Squeeze" else functions.unsqueeze
    return Call(run, node.kind.lower(), (node.inputs[0], axes))


@_entry("Expand", "Tile")
def _expand(node: OnnxNode) -> Call:
    shape: Any = node.numbers(1)
    run = functions.expand if node.kind == "Expand" else functions.tile
    return Call(run, "", (node.inputs[0], node.inputs[1] if shape is None else shape))


@_entry("Shape")
def _shape(node: OnnxNode) -> Call:
    return Call(
        functions.shape_of, "", (node.inputs[0], node.attribute("start", 0), node.attribute("end", None))
    )


@_entry("ConstantOfShape")
def _constant_of_shape(node: OnnxNode) -> Call:
    shape: Any = node.numbers(0)
    given: Any = node.attribute("value", None)
    value = 0.0 if given is None else given.numpy().flatten()[0].item()
    dtype = torch.float32 if given is None else DTYPES[given.dtype.value]
    return Call(functions.constant_of_shape, "", (node.inputs[0] if shape is None else shape, value, dtype))


@_entry("Gather")
def _gather(node: OnnxNode) -> Call:
    return Call(functions.gather, "", (*node.inputs, node.attribute("axis", 0)))


@_entry("GatherElements")
def _gather_elements(node: OnnxNode) -> Call:
    return Call(_gather_along, "", (*node.inputs, node.attribute("axis", 0)))


def _gather_along(x: Any, indices: Any, axis: int) -> Any:
    return torch.gather(x, axis, indices.long() % x.shape[axis])


@_entry("DequantizeLinear", "QuantizeLinear")
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


@_entry("LayerNormalization")
def _layer_norm(node: OnnxNode) -> Call | None:
    if len(node.outputs) > 1:
        return None
    settings = (node.attribute("axis", -1), node.attribute("epsilon", 1e-5))
    return Call(functions.layer_norm, "layer_norm", (*[*node.inputs, None][:3], *settings))


@_entry("InstanceNormalization")
def _instance_norm(node: OnnxNode) -> Call:
    x, scale, bias = node.inputs
    settings = {"weight": scale, "bias": bias, "eps": node.attribute("epsilon", 1e-5)}
    return Call(F.instance_norm, "instance_norm", (x,), settings)


@_entry("DepthToSpace", "SpaceToDepth")
def _depth_to_space(node: OnnxNode) -> Call | None:
    block = node.attribute("blocksize")
    if node.kind == "SpaceToDepth" and node.attribute("mode", "DCR") != "DCR":
        return None
    if node.kind == "SpaceToDepth":
        return Call(functions.space_to_depth, "", (node.inputs[0], block))
    return Call(functions.depth_to_space, "", (node.inputs[0], block, node.attribute("mode", "DCR") == "CRD"))


@_entry("ArgMax")
def _argmax(node: OnnxNode) -> Call | None:
    if node.attribute("select_last_index", 0):
        return None
    return Call(
        torch.argmax, "", (node.inputs[0], node.attribute("axis", 0), bool(node.attribute("keepdims", 1)))
    )


@_entry("CumSum")
def _cumulative_sum(node: OnnxNode) -> Call | None:
    axis = node.numbers(1)
    plain = not node.attribute("exclusive", 0) and not node.attribute("reverse", 0)
    return Call(torch.cumsum, "", (node.inputs[0], axis[0])) if axis and plain else None


@_entry("Resize", "Upsample")
def _resize(node: OnnxNode) -> Call | None:
    """What `torch.nn.functional.interpolate` does as well; the other modes are left to ONNX's own implementation."""
    if node.kind == "Upsample":
        position, scales, size = "asymmetric", node.floats(1, "scales"), None
    else:
        place = 1 if node.version < 11 else 2
        scales = node.floats(place)
        sizes = node.inputs[3] if len(node.inputs) > 3 else None
        size = None if sizes is None else node.numbers(3) or sizes
        position = node.attribute(
            "coordinate_transformation_mode", "half_pixel" if node.version > 10 else "asymmetric"
        )
    mode, rounding = node.attribute("mode", "nearest"), node.attribute("nearest_mode", "round_prefer_floor")
    dimensions = len(node.shape(node.inputs[0]))
    strange = (
        any(node.attribute(name, 0) for name in ("antialias", "exclude_outside")) or "axes" in node.attributes
    )
    if strange or not 3 <= dimensions <= 5 or (size is None and not scales):
        return None
    if node.attribute("keep_aspect_ratio_policy", "stretch") != "stretch":
        return None
    if scales and size is None and (len(scales) != dimensions or scales[:2] != [1.0, 1.0]):
        return None
    run = partial(
        functions.resized,
        mode="nearest" if mode == "nearest" else "linear",
        corners=position == "align_corners",
        lone=position == "pytorch_half_pixel",
    )
    args = (node.inputs[0], size, None if size is not None else scales)
    if mode == "nearest":
        whole = size is None and all(scale >= 1 and scale == int(scale) for scale in scales or [])
        down = node.version < 11 or (position == "asymmetric" and rounding == "floor")
        even = whole and position in ("half_pixel", "pytorch_half_pixel") and rounding == "round_prefer_floor"
        return Call(run, "interpolate", args) if (down or even) else None
    if mode == "linear" and position in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        return Call(run, "interpolate", args)
    return None
