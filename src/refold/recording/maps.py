"""The layers that are one convolution of their input, from their weights and settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor, fx

from refold.algebra import Convolution, affine, average_pool, batch_norm, pointwise, zero_padding
from refold.errors import NotFoldable
from refold.recording.linear import ConstantBorder, Map, Use


@overload
def on(device: torch.device, tensor: Tensor) -> Tensor: ...
@overload
def on(device: torch.device, tensor: Tensor | None) -> Tensor | None: ...
def on(device: torch.device, tensor: Tensor | None) -> Tensor | None:
    """The tensor in float64 on a device; on meta only its shape."""
    return None if tensor is None else tensor.detach().to(device=device, dtype=torch.float64)


def convolution_map(
    use: Use,
    source: fx.Node,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> Map:
    axes = weight.dim() - 2
    if len(use.shape(source)) != weight.dim():
        raise NotFoldable("its input has no batch axis")
    if weight.numel() == 0 or not weight.is_floating_point():
        raise NotFoldable("its weight is not made of real numbers")
    steps, spacing = _each(stride, axes), _each(dilation, axes)
    extents = [d * (k - 1) for d, k in zip(spacing, weight.shape[2:], strict=True)]
    if padding == "same":
        ends = tuple((extent // 2, extent - extent // 2) for extent in extents)
    elif isinstance(padding, tuple) and all(isinstance(pair, tuple) for pair in padding):
        ends = padding  # (before, after) of each axis
    else:
        ends = tuple((p, p) for p in _each(0 if padding == "valid" else padding, axes))

    def build(device: torch.device) -> Convolution:
        return Convolution(on(device, weight), on(device, bias), steps, ends, spacing, groups)

    return Map(source, build, multiplies=True)


def linear_map(source: fx.Node, weight: Tensor, bias: Tensor | None) -> Map:
    if not weight.is_floating_point() or weight.dim() != 2:
        raise NotFoldable("its weight is not a matrix of real numbers")

    def build(device: torch.device) -> Convolution:
        return pointwise(on(device, weight), on(device, bias), 0)

    return Map(source, build, multiplies=True)


def batch_norm_map(
    use: Use,
    source: fx.Node,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    epsilon: float,
    training: bool,
) -> Map:
    if mean is None or variance is None:
        raise NotFoldable("it has no running statistics, so it normalises each batch by itself")
    if training:
        raise NotFoldable("it is used in training mode")
    axes = len(use.shape(source)) - 2

    def build(device: torch.device) -> Convolution:
        if device.type == "meta":  # its shape alone, which planning asks for often
            return affine(on(device, mean), on(device, mean), axes)
        numbers = (on(device, mean), on(device, variance), on(device, weight), on(device, bias))
        return batch_norm(*numbers, epsilon, axes)

    return Map(source, build, multiplies=False)


def average_pool_map(
    use: Use,
    source: fx.Node,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
) -> Map:
    shape = use.shape(source)
    name = type(use.module).__name__ if use.module is not None else use.name
    axes = next(int(letter) for letter in name if letter.isdigit())
    if len(shape) != axes + 2:
        raise NotFoldable("its input has no batch axis")
    kernel = _each(kernel_size, axes)
    steps = kernel if stride is None or stride == [] else _each(stride, axes)
    ends = _each(padding, axes)

    def build(device: torch.device) -> Convolution:
        like = torch.empty(0, dtype=torch.float64, device=device)
        return average_pool(
            shape[1],
            kernel,
            steps,
            ends,
            like,
            ceil_mode=ceil_mode,
            count_include_pad=count_include_pad,
            divisor=divisor,
        )

    build(torch.device("meta"))
    return Map(source, build, multiplies=False)


def padding_map(
    use: Use, source: fx.Node, padding: Sequence[int], mode: str, value: float | None
) -> Map | ConstantBorder | None:
    if mode != "constant" or not all(isinstance(p, int) for p in padding):
        return None
    shape = use.shape(source)
    axes = len(shape) - 2
    pairs = [(padding[i], padding[i + 1]) for i in range(0, len(padding), 2)][::-1]
    if len(pairs) > axes or axes > 3:
        return None
    ends = (*((0, 0),) * (axes - len(pairs)), *pairs)
    if value:
        return ConstantBorder(source, ends, torch.full((shape[1],), float(value), dtype=torch.float64))

    def build(device: torch.device) -> Convolution:
        return zero_padding(shape[1], ends, torch.empty(0, dtype=torch.float64, device=device))

    build(torch.device("meta"))
    return Map(source, build, multiplies=False)


def padding(use: Use) -> Map | ConstantBorder | None:
    if use.module is not None:
        return padding_map(use, use.source, use.module.padding, "constant", getattr(use.module, "value", 0.0))
    given = use.argument(1, "pad")
    constant = "constant" in use.name
    mode = "constant" if constant else use.argument(2, "mode", "constant")
    value = use.argument(2 if constant else 3, "value")
    return (
        padding_map(use, use.argument(0, "input"), given, mode, value)
        if isinstance(given, (tuple, list))
        else None
    )


def _each(value: Any, axes: int) -> tuple[int, ...]:
    """One whole number for each axis."""
    values = (value,) * axes if isinstance(value, int) else tuple(value)
    if len(values) == 1:
        values *= axes
    if len(values) != axes or not all(isinstance(v, int) for v in values):
        raise NotFoldable(f"its setting {value!r} is not {axes} whole numbers")
    return values
