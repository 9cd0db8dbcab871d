"""Which functions and tensor methods are linear, and how."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from refold.folding.maps import (
    affine_map,
    average_pool_map,
    batch_norm_map,
    convolution,
    linear,
    zero_padding_map,
)
from refold.folding.operators import Call, Concatenation, Flattened, Linear, Map, Restored, Same, Slice, Sum


def function_operator(call: Call) -> Linear | None:
    """How a called function or method is linear in its inputs, or None where it is not. Raises NotFoldable."""
    target = call.node.target
    recognise = _METHODS.get(target) if isinstance(target, str) else _FUNCTIONS.get(target)
    if recognise is None and call.node in call.unit.handed_on:
        return _idle_in_evaluation(call)
    return recognise(call) if recognise else None


_CHUNKS = {torch.chunk, torch.split, torch.tensor_split, "chunk", "split", "tensor_split"}
_CHUNK_SIZES = (
    "chunks",
    "split_size_or_sections",
    "split_size",
    "indices_or_sections",
    "sections",
    "indices",
)


def _function_convolution(call: Call) -> Map | None:
    source = call.argument(0, "input")
    weight, bias = call.constant(call.argument(1, "weight")), call.constant(call.argument(2, "bias"))
    if weight is None:
        return None
    return convolution(
        call,
        source,
        weight,
        bias,
        call.argument(3, "stride", 1),
        call.argument(4, "padding", 0),
        call.argument(5, "dilation", 1),
        call.argument(6, "groups", 1),
    )


def _function_linear(call: Call) -> Map | None:
    weight, bias = call.constant(call.argument(1, "weight")), call.constant(call.argument(2, "bias"))
    return None if weight is None else linear(call.argument(0, "input"), weight, bias)


def _function_batch_norm(call: Call) -> Map:
    names = ("running_mean", "running_var", "weight", "bias")
    mean, variance, weight, bias = (call.constant(call.argument(1 + i, name)) for i, name in enumerate(names))
    training, epsilon = call.argument(5, "training", False), call.argument(7, "eps", 1e-5)
    return batch_norm_map(
        call, call.argument(0, "input"), mean, variance, weight, bias, epsilon, bool(training)
    )


def _torch_batch_norm(call: Call) -> Map:
    names = ("weight", "bias", "running_mean", "running_var")
    weight, bias, mean, variance = (call.constant(call.argument(1 + i, name)) for i, name in enumerate(names))
    training, epsilon = call.argument(5, "training"), call.argument(7, "eps")
    return batch_norm_map(
        call, call.argument(0, "input"), mean, variance, weight, bias, epsilon, bool(training)
    )


def _function_average_pool(call: Call) -> Map:
    return average_pool_map(
        call,
        call.argument(0, "input"),
        int(str(getattr(call.node.target, "__name__", ""))[-2]),
        call.argument(1, "kernel_size"),
        call.argument(2, "stride"),
        call.argument(3, "padding", 0),
        call.argument(4, "ceil_mode", False),
        call.argument(5, "count_include_pad", True),
        call.argument(6, "divisor_override"),
    )


def _function_pad(call: Call) -> Map | None:
    padding = call.argument(1, "pad")
    if not isinstance(padding, (tuple, list)):
        return None
    mode, value = call.argument(2, "mode", "constant"), call.argument(3, "value")
    return zero_padding_map(call, call.argument(0, "input"), padding, mode, value)


def _same(call: Call) -> Same:
    return Same(call.node.all_input_nodes[0])


def _flattened(call: Call) -> Flattened | None:
    source, shape = call.argument(0, "input"), call.shape(call.argument(0, "input"))
    start, end = call.argument(1, "start_dim", 0), call.argument(2, "end_dim", -1)
    leading = start == 0 and end in (len(shape) - 2, -2) and len(shape) > 2
    return Flattened(source) if leading else None


def _restored(call: Call) -> Restored | None:
    source, like = call.argument(0, "input"), call.argument(1, "other")
    varies = call.constants.varies(source) and call.constants.varies(like)
    return Restored(source, like) if varies and call.shape(source)[-1] == call.shape(like)[-1] else None


def _idle_in_evaluation(call: Call) -> Same | None:
    """A function such as torchvision's stochastic depth, which was told that this is no training."""
    try:
        given = inspect.signature(call.node.target).bind(*call.node.args, **call.node.kwargs)  # type: ignore[arg-type]  # a function's target
    except (TypeError, ValueError):
        return None
    idle = given.arguments.get("training") is False and len(call.node.all_input_nodes) == 1
    return _same(call) if idle else None


def _function_dropout(call: Call) -> Same | None:
    default = None if call.node.target is torch.dropout else True
    training = call.argument(2, "training", default)
    return _same(call) if training is False else None


def _plus(call: Call, sign: float = 1.0) -> Linear | None:
    left, right = call.argument(0, "input"), call.argument(1, "other")
    factor = sign * float(call.argument(2, "alpha", 1.0))
    if not call.constants.varies(right):
        return _shifted(call, left, right, 1.0, factor)
    if not call.constants.varies(left):
        return _shifted(call, right, left, factor, 1.0)
    if call.shape(left) != call.shape(right):
        return None
    return Sum((left, right), (1.0, factor))


def _minus(call: Call) -> Linear | None:
    return _plus(call, -1.0)


def _builtin_sum(call: Call) -> Linear | None:
    terms = call.argument(0, "iterable")
    if len(call.node.args) != 1 or not isinstance(terms, (tuple, list)):
        return None
    if not all(isinstance(t, fx.Node) and call.shape(t) == call.shape(call.node) for t in terms):
        return None
    return Sum(tuple(terms), (1.0,) * len(terms))


def _negative(call: Call) -> Sum:
    return Sum((call.node.all_input_nodes[0],), (-1.0,))


def _times(call: Call) -> Linear | None:
    left, right = call.argument(0, "input"), call.argument(1, "other")
    source, factor = (left, right) if call.constants.varies(left) else (right, left)
    if call.constants.varies(factor):
        return None
    return _scaled(call, source, call.constant(factor))


def _divided(call: Call) -> Linear | None:
    left, right = call.argument(0, "input"), call.argument(1, "other")
    if (
        not call.constants.varies(left)
        or call.constants.varies(right)
        or call.node.kwargs.get("rounding_mode")
    ):
        return None
    factor = call.constant(right)
    return None if factor is None else _scaled(call, left, factor.reciprocal())


def _scaled(call: Call, source: fx.Node, factor: Tensor | None) -> Linear | None:
    """The input times a constant: a number, or one number a channel."""
    if factor is None or call.shape(source) != call.shape(call.node):
        return None
    if factor.numel() == 1:
        return Sum((source,), (float(factor),))
    channels = _by_channel(factor, call.shape(source))
    return None if channels is None else affine_map(source, channels[0], None, channels[1])


def _shifted(call: Call, source: fx.Node, shift: Any, factor: float, shift_factor: float) -> Linear | None:
    """The input (times a factor) plus a constant: a number, or one number a channel."""
    value = call.constant(shift)
    if value is None or call.shape(source) != call.shape(call.node):
        return None
    if value.numel() == 1 and float(value) == 0.0:
        return Sum((source,), (factor,))
    shape = call.shape(source)
    channels = _by_channel(value, shape) if value.numel() > 1 else None
    if value.numel() == 1 and len(shape) in (3, 4, 5):
        channels = (value.reshape(1).expand(shape[1]), len(shape) - 2)
    if channels is None:
        return None
    scale = torch.full_like(channels[0], factor).contiguous()
    return affine_map(source, scale, channels[0] * shift_factor, channels[1])


def _by_channel(value: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, int] | None:
    """A broadcast constant as one number a channel, and the spatial axes of that layout; None where it is not."""
    aligned = (1,) * (len(shape) - value.dim()) + tuple(value.shape)
    for axis, spatial_axes in ((1, len(shape) - 2), (len(shape) - 1, 0)):
        expected = tuple(size if i == axis else 1 for i, size in enumerate(shape))
        if aligned == expected and spatial_axes <= 3:
            return value.reshape(-1), spatial_axes
    return None


def _concatenation(call: Call) -> Concatenation | None:
    inputs = call.argument(0, "tensors")
    axis = call.argument(1, "dim", call.node.kwargs.get("axis", 0))
    if not isinstance(inputs, (tuple, list)) or not all(isinstance(i, fx.Node) for i in inputs):
        return None
    axes = _layout(axis, len(call.shape(call.node)))
    return None if axes is None else Concatenation(tuple(inputs), axes)


def _layout(axis: Any, dimensions: int) -> int | None:
    """The spatial axes of a layout whose channels are at `axis`; None where that is no channel axis."""
    if not isinstance(axis, int) or not 2 <= dimensions <= 5:
        return None
    axis %= dimensions
    if axis == 1:
        return dimensions - 2
    return 0 if axis == dimensions - 1 else None


def _item(call: Call) -> Slice | None:
    value: Any = call.node.args[0]
    index: Any = call.node.args[1]
    if isinstance(value, fx.Node) and value.op != "placeholder" and isinstance(index, int):
        return _chunk_item(call, value, index)
    if not isinstance(index, tuple) or value not in call.unit.shapes:
        return None
    shape = call.shape(value)
    sliced = [i for i, part in enumerate(index) if part is not Ellipsis and part != slice(None)]
    if len(sliced) != 1 or not isinstance(index[sliced[0]], slice):
        return None
    axis = sliced[0] - len(index) if Ellipsis in index[: sliced[0]] else sliced[0]
    part = index[sliced[0]]
    if any(not isinstance(end, (int, type(None))) for end in (part.start, part.stop, part.step)):
        return None
    axes = _layout(axis, len(shape))
    if axes is None:
        return None
    start, stop, step = part.indices(shape[axis])
    return Slice(value, start, stop, axes) if step == 1 and stop > start else None


def _chunk_item(call: Call, chunks: fx.Node, index: int) -> Slice | None:
    """One item of `chunk` or `split`: the channels before it are those that the earlier items have."""
    if chunks.target not in _CHUNKS:
        return None
    split = Call(chunks, call.constants)
    source = split.argument(0, "input", chunks.kwargs.get("tensor"))
    axis = split.argument(2, "dim", 0)
    sizes = next(
        (chunks.kwargs[name] for name in _CHUNK_SIZES if name in chunks.kwargs), None
    ) or split.argument(1, "")
    shape, own = call.shape(source), call.shape(call.node)
    axes = _layout(axis, len(shape))
    if axes is None:
        return None
    total = shape[axis]
    ends = _chunk_ends(str(getattr(chunks.target, "__name__", chunks.target)), sizes, total)
    if ends is None:
        return None
    stop = ends[index]
    return Slice(source, stop - own[axis], stop, axes)


def _chunk_ends(name: str, sizes: Any, total: int) -> list[int] | None:
    if isinstance(sizes, int):
        if name == "chunk":
            sizes = math.ceil(total / sizes)
        elif name == "tensor_split":
            return [total * (i + 1) // sizes for i in range(sizes)] if total % sizes == 0 else None
        return [min(start + sizes, total) for start in range(0, total, sizes)]
    if name == "tensor_split" or not all(isinstance(size, int) for size in sizes):
        return None
    return [sum(sizes[: i + 1]) for i in range(len(sizes))]


def _narrow(call: Call) -> Slice | None:
    source, axis, start, length = (
        call.argument(i, n) for i, n in enumerate(("input", "dim", "start", "length"))
    )
    axes = _layout(axis, len(call.shape(source)))
    if axes is None or not isinstance(start, int) or not isinstance(length, int) or start < 0:
        return None
    return Slice(source, start, start + length, axes)


_FUNCTIONS: dict[Any, Callable[[Call], Linear | None]] = {
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _function_convolution),
    F.linear: _function_linear,
    F.batch_norm: _function_batch_norm,
    torch.batch_norm: _torch_batch_norm,
    **dict.fromkeys((F.avg_pool1d, F.avg_pool2d, F.avg_pool3d), _function_average_pool),
    **dict.fromkeys((F.pad, torch.constant_pad_nd), _function_pad),
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout), _function_dropout),
    operator.pos: _same,
    **dict.fromkeys((operator.add, operator.iadd, torch.add), _plus),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub), _minus),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul), _times),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div), _divided),
    **dict.fromkeys((operator.neg, torch.neg), _negative),
    sum: _builtin_sum,
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), _concatenation),
    operator.getitem: _item,
    torch.narrow: _narrow,
    torch.flatten: _flattened,
}


_METHODS: dict[str, Callable[[Call], Linear | None]] = {
    "contiguous": _same,
    "flatten": _flattened,
    **dict.fromkeys(("reshape_as", "view_as"), _restored),
    **dict.fromkeys(("add", "add_"), _plus),
    **dict.fromkeys(("sub", "sub_"), _minus),
    **dict.fromkeys(("mul", "mul_"), _times),
    **dict.fromkeys(("div", "div_"), _divided),
    "neg": _negative,
    "narrow": _narrow,
}
