"""The layers that are one convolution of their input, from their weights and settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from refold.algebra import Convolution, affine, average_pool, batch_norm, pointwise, zero_padding
from refold.errors import NotFoldable
from refold.folding.operators import Call, Map


def _on(device: torch.device, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().to(device=device, dtype=torch.float64)


def convolution(
    call: Call,
    source: fx.Node,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> Map:
    axes = weight.dim() - 2
    if len(call.shape(source)) != weight.dim():
        raise NotFoldable("its input has no batch axis")
    if weight.numel() == 0 or not weight.is_floating_point():
        raise NotFoldable("its weight is not made of real numbers")
    steps, spacing = _each(stride, axes), _each(dilation, axes)
    extents = [d * (k - 1) for d, k in zip(spacing, weight.shape[2:], strict=True)]
    if padding == "same":
        ends = tuple((extent // 2, extent - extent // 2) for extent in extents)
    else:
        ends = tuple((p, p) for p in _each(0 if padding == "valid" else padding, axes))

    def build(device: torch.device) -> Convolution:
        kernel = _on(device, weight)
        assert kernel is not None
        return Convolution(kernel, _on(device, bias), steps, ends, spacing, groups)

    return Map(source, build, multiplies=True)


def linear(source: fx.Node, weight: Tensor, bias: Tensor | None) -> Map:
    if not weight.is_floating_point() or weight.dim() != 2:
        raise NotFoldable("its weight is not a matrix of real numbers")

    def build(device: torch.device) -> Convolution:
        matrix = _on(device, weight)
        assert matrix is not None
        return pointwise(matrix, _on(device, bias), 0)

    return Map(source, build, multiplies=True)


def batch_norm_map(
    call: Call,
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
    axes = len(call.shape(source)) - 2

    def build(device: torch.device) -> Convolution:
        located = [_on(device, tensor) for tensor in (mean, variance, weight, bias)]
        assert located[0] is not None
        assert located[1] is not None
        return batch_norm(located[0], located[1], located[2], located[3], epsilon, axes)

    return Map(source, build, multiplies=False)


def average_pool_map(
    call: Call,
    source: fx.Node,
    axes: int,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
) -> Map:
    shape = call.shape(source)
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


def zero_padding_map(
    call: Call, source: fx.Node, padding: Sequence[int], mode: str, value: float | None
) -> Map | None:
    if mode != "constant" or value not in (None, 0, 0.0) or not all(isinstance(p, int) for p in padding):
        return None
    shape = call.shape(source)
    axes = len(shape) - 2
    pairs = [(padding[i], padding[i + 1]) for i in range(0, len(padding), 2)][::-1]
    if len(pairs) > axes or axes > 3:
        return None
    ends = (*((0, 0),) * (axes - len(pairs)), *pairs)

    def build(device: torch.device) -> Convolution:
        return zero_padding(shape[1], ends, torch.empty(0, dtype=torch.float64, device=device))

    build(torch.device("meta"))
    return Map(source, build, multiplies=False)


def affine_map(source: fx.Node, scale: Tensor, shift: Tensor | None, spatial_axes: int) -> Map:
    def build(device: torch.device) -> Convolution:
        located = _on(device, scale)
        assert located is not None
        return affine(located, _on(device, shift), spatial_axes)

    return Map(source, build, multiplies=False)


def _each(value: Any, axes: int) -> tuple[int, ...]:
    """One whole number for each axis."""
    values = (value,) * axes if isinstance(value, int) else tuple(value)
    if len(values) == 1:
        values *= axes
    if len(values) != axes or not all(isinstance(v, int) for v in values):
        raise NotFoldable(f"its setting {value!r} is not {axes} whole numbers")
    return values
