"""What operators of ONNX compute, where no single function of torch does: plain functions of tensors.

Numbers such as shapes and axes are lists, or tensors where the file computes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Numbers = Sequence[int] | Tensor
Ends = tuple[tuple[int, int], ...]
"""How far each spatial axis is padded before and after."""


def same(x: Tensor, *_: Any) -> Tensor:
    return x


def padded(x: Tensor, ends: Ends, value: float = 0.0) -> Tensor:
    """With a border of one value around the last axes."""
    flat = [end for pair in reversed(ends) for end in pair]
    return F.pad(x, flat, value=value) if any(flat) else x


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    ends: Ends,
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    run: Any = (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3]
    return run(padded(x, ends), weight, bias, stride, 0, dilation, groups)  # type: ignore[no-any-return]  # one of three


def max_pool(
    x: Tensor,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    ends: Ends,
    dilation: tuple[int, ...],
    ceil_mode: bool,
) -> Tensor:
    run: Any = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(kernel_size) - 1]
    lowest = -torch.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
    found = run(padded(x, ends, lowest), kernel_size, stride, 0, dilation, ceil_mode)
    return _starting_inside(found, x, stride, ends)


def average_pool(
    x: Tensor,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    ends: Ends,
    ceil_mode: bool,
    count_include_pad: bool,
) -> Tensor:
    """The sums of all windows through the number of values in each."""

    def sums(values: Tensor) -> Tensor:
        flat = values if len(kernel_size) > 1 else values.unsqueeze(-1)
        kernel, steps = ((*each, 1)[: max(2, len(each))] for each in (kernel_size, stride))
        run: Any = F.avg_pool3d if len(kernel_size) == 3 else F.avg_pool2d
        found: Tensor = run(flat, kernel, steps, 0, ceil_mode, divisor_override=1)
        return found if len(kernel_size) > 1 else found.squeeze(-1)

    ones = torch.ones_like(x[:1, :1])
    found = sums(padded(x, ends)) / sums(padded(ones, ends, 1.0 if count_include_pad else 0.0))
    return _starting_inside(found, x, stride, ends)


def _starting_inside(found: Tensor, x: Tensor, stride: tuple[int, ...], ends: Ends) -> Tensor:
    """Without the windows that start in the padding behind the last value, which rounding up may add."""
    for axis, (step, (before, _)) in enumerate(zip(stride, ends, strict=True), start=2):
        most = -(-(x.shape[axis] + before) // step)
        if found.shape[axis] > most:
            found = found.narrow(axis, 0, most)
    return found


def gemm(
    a: Tensor, b: Tensor, c: Tensor | None, alpha: float, beta: float, turn_a: bool, turn_b: bool
) -> Tensor:
    product = alpha * ((a.t() if turn_a else a) @ (b.t() if turn_b else b))
    return product if c is None else product + beta * c


def reshape(x: Tensor, shape: Numbers, keep_zeros: bool) -> Tensor:
    given = numbers(shape)
    return x.reshape(
        tuple(x.shape[i] if side == 0 and not keep_zeros else side for i, side in enumerate(given))
    )


def flatten(x: Tensor, axis: int) -> Tensor:
    axis = axis + x.dim() if axis < 0 else axis
    return x.reshape(x.shape[:axis].numel(), x.shape[axis:].numel())


def squeeze(x: Tensor, axes: Numbers | None) -> Tensor:
    own = range(x.dim()) if axes is None else [axis % x.dim() for axis in numbers(axes)]
    return x.reshape(
        tuple(side for i, side in enumerate(x.shape) if i not in own or (axes is None and side != 1))
    )


def unsqueeze(x: Tensor, axes: Numbers) -> Tensor:
    given = numbers(axes)
    for axis in sorted(axis % (x.dim() + len(given)) for axis in given):
        x = x.unsqueeze(axis)
    return x


def expand(x: Tensor, shape: Numbers) -> Tensor:
    given = numbers(shape)
    return x.expand(torch.broadcast_shapes(x.shape, given))


def tile(x: Tensor, times: Numbers) -> Tensor:
    return x.repeat(*numbers(times))


def shape_of(x: Tensor, start: int, end: int | None) -> Tensor:
    return torch.tensor(list(x.shape)[start:end], dtype=torch.int64)


def size_of(x: Tensor) -> Tensor:
    return torch.tensor(x.numel(), dtype=torch.int64)


def gather(x: Tensor, indices: Tensor, axis: int) -> Tensor:
    axis %= x.dim()
    found = x.index_select(axis, (indices.long() % x.shape[axis]).flatten())
    return found.reshape((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))


def sliced(x: Tensor, starts: Numbers, ends: Numbers, axes: Numbers | None, steps: Numbers | None) -> Tensor:
    own, until = numbers(starts), numbers(ends)
    along = range(len(own)) if axes is None else numbers(axes)
    by = [1] * len(own) if steps is None else numbers(steps)
    for start, end, axis, step in zip(own, until, along, by, strict=True):
        places = range(*slice(start, end, step).indices(x.shape[axis]))
        if step < 0 and end < -x.shape[axis]:
            places = range(*slice(start, None, step).indices(x.shape[axis]))
        x = x.index_select(axis, torch.tensor(list(places), dtype=torch.int64))
    return x


def constant_of_shape(shape: Numbers, value: float | int | bool, dtype: torch.dtype) -> Tensor:
    return torch.full(numbers(shape), value, dtype=dtype)


def span(start: Tensor, limit: Tensor, step: Tensor) -> Tensor:
    return torch.arange(start.item(), limit.item(), step.item(), dtype=start.dtype)


def power(a: Tensor, b: Tensor) -> Tensor:
    return torch.pow(a, b).to(a.dtype)


def divided(a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def least(*values: Tensor) -> Tensor:
    found = values[0]
    for value in values[1:]:
        found = torch.minimum(found, value)
    return found


def greatest(*values: Tensor) -> Tensor:
    found = values[0]
    for value in values[1:]:
        found = torch.maximum(found, value)
    return found


def added(*values: Tensor) -> Tensor:
    found = values[0]
    for value in values[1:]:
        found = found + value
    return found


def clamp(x: Tensor, low: Tensor | None, high: Tensor | None) -> Tensor:
    return torch.clamp(x, low, high) if low is not None or high is not None else x


def hard_sigmoid(x: Tensor, alpha: float, beta: float) -> Tensor:
    return torch.clamp(alpha * x + beta, 0, 1)


def selu(x: Tensor, alpha: float, gamma: float) -> Tensor:
    return gamma * (torch.clamp(x, min=0) + alpha * torch.expm1(torch.clamp(x, max=0)))


def prelu(x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x >= 0, x, slope * x)


def softmax_of_matrix(x: Tensor, axis: int, logarithm: bool) -> Tensor:
    """Up to opset 12: over all axes from one on."""
    flat = flatten(x, axis)
    return (torch.log_softmax(flat, 1) if logarithm else torch.softmax(flat, 1)).reshape(x.shape)


def reduced(x: Tensor, axes: Numbers | None, keep: bool, kind: str, all_axes: bool = True) -> Tensor:
    """The mean, sum, largest or least value, or the norms, over some axes, or over all where none are given."""
    given = [] if axes is None else numbers(axes)
    if not given and not all_axes:
        return x
    along = given or list(range(x.dim()))
    if kind == "mean":
        return torch.mean(x, along, keep)
    if kind == "sum":
        return torch.sum(x, along, keep)
    if kind == "norm1":
        return torch.sum(x.abs(), along, keep)
    if kind == "norm2":
        return torch.sum(x * x, along, keep).sqrt()
    if kind == "squares":
        return torch.sum(x * x, along, keep)
    return torch.amax(x, along, keep) if kind == "max" else torch.amin(x, along, keep)


def resized(
    x: Tensor, size: Numbers | None, scales: Sequence[float] | None, mode: str, corners: bool, lone: bool
) -> Tensor:
    """The spatial axes resized; `size` and `scales` name all axes, of which the first two stay.

    `lone` says that an axis of which one value is left takes the first, and not the middle.
    """
    for axis in range(2, x.dim()) if lone else ():
        if (size is not None and numbers(size)[axis] == 1) or (
            scales and int(x.shape[axis] * scales[axis]) == 1
        ):
            x = x.narrow(axis, 0, 1)
    settings: dict[str, Any] = {} if mode == "nearest" else {"align_corners": corners}
    axes = x.dim() - 2
    mode = mode if mode == "nearest" else ("linear", "bilinear", "trilinear")[axes - 1]
    if size is not None:
        return F.interpolate(x, size=numbers(size)[2:], mode=mode, **settings)
    assert scales is not None
    return F.interpolate(x, scale_factor=list(scales)[2:], mode=mode, **settings)


RANGES = {torch.uint8: (0, 255), torch.int8: (-128, 127), torch.int16: (-(2**15), 2**15 - 1)}
"""The smallest and largest number of types that values are quantised to."""
RANGES[torch.int32] = (-(2**31), 2**31 - 1)


def quantised(x: Tensor, scale: Tensor, zero: Tensor | None, axis: int, dtype: torch.dtype) -> Tensor:
    whole = torch.round(x / _along(scale, x, axis))
    return torch.clamp(whole if zero is None else whole + _along(zero, x, axis), *RANGES[dtype]).to(dtype)


def dequantised(x: Tensor, scale: Tensor, zero: Tensor | None, axis: int) -> Tensor:
    whole = x.to(scale.dtype)
    return (whole if zero is None else whole - _along(zero, x, axis).to(scale.dtype)) * _along(scale, x, axis)


def _along(numbers: Tensor, x: Tensor, axis: int) -> Tensor:
    """One number for all of a tensor, or for each place along an axis."""
    if numbers.numel() == 1:
        return numbers.reshape(())
    return numbers.reshape(-1, *(1,) * (x.dim() - 1 - axis % x.dim()))


def layer_norm(x: Tensor, scale: Tensor, bias: Tensor | None, axis: int, epsilon: float) -> Tensor:
    return F.layer_norm(x, x.shape[axis % x.dim() :], scale, bias, epsilon)


def depth_to_space(x: Tensor, block: int, columns_first: bool) -> Tensor:
    if columns_first:
        return F.pixel_shuffle(x, block)
    b, c, h, w = x.shape
    apart = x.reshape(b, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return apart.reshape(b, c // block**2, h * block, w * block)


def space_to_depth(x: Tensor, block: int) -> Tensor:
    b, c, h, w = x.shape
    apart = x.reshape(b, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
    return apart.reshape(b, c * block**2, h // block, w // block)


def numbers(given: Numbers) -> list[int]:
    """Whole numbers as a list."""
    found = given.flatten().tolist() if isinstance(given, Tensor) else given
    return [int(each) for each in found]
