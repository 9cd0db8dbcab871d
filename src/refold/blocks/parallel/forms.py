"""The two ways to run parallel branches in training mode that are cheaper than one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refold.blocks.parallel.branch import Geometry, scale_and_shift, uses_batch, widened
from refold.blocks.parallel.recomputing import written_statistics
from refold.blocks.parallel.statistics import neighbourhood_moments, pointwise_moments


def from_moments(
    x: Tensor,
    branches: Sequence[Any],
    skip: nn.Module | None,
    adds_input: bool,
    geometry: Geometry,
    *,
    pointwise: bool,
) -> Tensor:
    """The sum of branches, of the skip and of the input as one convolution, its kernel from the input's statistics.

    `pointwise` says that all kernels are 1x1; else the layer is depthwise, and 3x3 if its stride is 1. `x` is `[batch,
    in_channels, height, width]`.
    """
    seen = x
    if pointwise:
        if geometry.stride != (1, 1):
            seen = x[:, :, :: geometry.stride[0], :: geometry.stride[1]]
        geometry = replace(geometry, kernel_size=(1, 1), stride=(1, 1), padding=(0, 0))
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    with torch.autocast(device, enabled=False):
        seen = seen.to(dtype)
        # Half precision holds inputs, outputs and what is kept. In between all is float32: most of the gradients
        # cancels behind batch norms, and what is left of a rounded kernel or a rounded part of a gradient is noise.
        wide = seen if dtype == torch.float64 else seen.float()
        through, weight, bias = _summed(wide, seen, branches, skip, adds_input, geometry)
        if wide is seen:
            return F.conv2d(through, weight, bias, geometry.stride, geometry.padding, 1, geometry.groups)
        out: Tensor = _Convolution.apply(through, seen, weight, bias, geometry)
        return out.to(dtype)


class _Convolution(torch.autograd.Function):
    """A convolution of `x` that keeps `kept`, the narrower tensor that `x` was cast from."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kept: Tensor, weight: Tensor, bias: Tensor, geometry: Geometry
    ) -> Tensor:
        ctx.save_for_backward(kept, weight)
        ctx.geometry = geometry
        return F.conv2d(x, weight, bias, geometry.stride, geometry.padding, 1, geometry.groups)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight = ctx.saved_tensors
        geometry = ctx.geometry
        needs_x, _, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        of_x, of_weight, of_bias = torch.ops.aten.convolution_backward(
            gradients[0],
            kept.to(weight.dtype),
            weight,
            [len(weight)],
            geometry.stride,
            geometry.padding,
            [1, 1],
            False,
            [0, 0],
            geometry.groups,
            [needs_x, needs_weight, needs_bias],
        )
        return of_x, None, of_weight, of_bias, None


def stacked(x: Tensor, branches: Sequence[Any]) -> list[Tensor]:
    """What the branches write, those with equal kernels as one convolution."""
    parts = []
    for size in dict.fromkeys(branch.conv.kernel_size for branch in branches):
        alike = [branch for branch in branches if branch.conv.kernel_size == size]
        if len(alike) > 1:
            parts.append(_stack(x, alike))
        else:
            parts += [branch(x) for branch in alike]
    return parts


def _summed(
    x: Tensor,
    kept: Tensor,
    branches: Sequence[Any],
    skip: nn.Module | None,
    adds_input: bool,
    geometry: Geometry,
) -> tuple[Tensor, Tensor, Tensor]:
    """`x`, kernel and bias of the one convolution, in the dtype of `x`; the running averages are updated."""
    dtype, kernel_size = x.dtype, geometry.kernel_size
    convolutions = [branch.conv for branch in branches]
    norms = [branch.bn for branch in branches] + ([] if skip is None else [skip])
    kernels = [widened(conv.weight, kernel_size).to(dtype) for conv in convolutions]
    if kernels:
        stack = torch.stack(kernels)
    else:
        stack = x.new_empty(
            0, geometry.out_channels, geometry.in_channels // geometry.groups, *kernel_size, dtype=dtype
        )
    means = variances = None
    if any(uses_batch(norm) for norm in norms):
        if geometry.stride != (1, 1):
            x, means, variances = _strided_statistics(x, kept, convolutions, stack, geometry)
        else:
            x, means, variances = _statistics(x, kept, stack, skip is not None, geometry)
    biases = _biases(convolutions, stack, skip is not None)
    if means is not None and biases is not None:
        means = means + biases
    height, width = geometry.output_size(x)
    count = x.shape[0] * height * width
    scale, shift = scale_and_shift(norms, means, variances, stack, count)
    if biases is not None:
        shift = shift + scale * biases
    weight = (stack * scale[: len(stack), :, None, None, None]).sum(0)
    if skip is not None or adds_input:
        own = scale[len(stack) :].sum(0) + float(adds_input)
        weight = weight + _through(geometry, kernel_size, stack, own)
    return x, weight, shift.sum(0)


def _statistics(
    x: Tensor, kept: Tensor, kernels: Tensor, with_input: bool, geometry: Geometry
) -> tuple[Tensor, Tensor, Tensor]:
    """`x`, batch mean and variance, `[branches, out_channels]`, of what kernels write at stride 1, and of `x`."""
    if geometry.kernel_size == (1, 1):
        x, (mean, covariance) = pointwise_moments(x, geometry.groups, kept)
    else:
        x, (mean, covariance) = neighbourhood_moments(x, kept)
    branches, channels = kernels.shape[:2]
    by_group = kernels.reshape(branches, mean.shape[0], channels // mean.shape[0], -1)
    means = (by_group @ mean.unsqueeze(-1)).reshape(branches, channels)
    variances = ((by_group @ covariance) * by_group).sum(-1).reshape(branches, channels)
    if with_input:
        own_mean, own_variance = _input_statistics(mean, covariance, geometry)
        means, variances = torch.cat([means, own_mean]), torch.cat([variances, own_variance])
    return x, means, variances


def _strided_statistics(
    x: Tensor, kept: Tensor, convolutions: Sequence[nn.Conv2d], kernels: Tensor, geometry: Geometry
) -> tuple[Tensor, Tensor, Tensor]:
    """`x`, batch mean and variance, `[branches, channels]`, of what depthwise kernels write with a stride."""
    spatial = [i for i, conv in enumerate(convolutions) if conv.kernel_size != (1, 1)]
    written = written_statistics(x, kept, kernels[spatial], geometry.stride, geometry.padding)
    means, variances = list(written.means), list(written.variances)
    for i, conv in enumerate(convolutions):
        if i not in spatial:
            # All that a 1x1 kernel does is to scale the pixels in the middle of the windows.
            factor = conv.weight.flatten().to(x.dtype)
            means.insert(i, factor * written.pixel_mean)
            variances.insert(i, factor.square() * written.pixel_variance)
    return written.through, torch.stack(means), torch.stack(variances)


def _input_statistics(mean: Tensor, covariance: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Batch mean and variance of the input, `[1, channels]`, from those of all that kernels see."""
    each = geometry.in_channels // geometry.groups
    taps = mean.shape[1] // each
    spread = covariance.diagonal(dim1=1, dim2=2)
    own = [values.reshape(-1, each, taps)[..., taps // 2].reshape(1, -1) for values in (mean, spread)]
    return own[0], own[1]


def _through(geometry: Geometry, kernel_size: tuple[int, int], like: Tensor, scale: Tensor) -> Tensor:
    """The kernel that multiplies every channel of the input by `scale`."""
    each = geometry.in_channels // geometry.groups
    centre = F.pad(like.new_ones(1, 1), [s // 2 for s in reversed(kernel_size) for _ in (0, 1)])
    place = torch.arange(geometry.out_channels, device=like.device) % each
    chosen = F.one_hot(place, each).to(like.dtype) * scale[:, None]
    return chosen[:, :, None, None] * centre


def _biases(convolutions: Sequence[nn.Conv2d], kernels: Tensor, skip: bool) -> Tensor | None:
    """The biases of the convolutions, and none for the skip: `[branches, out_channels]`."""
    if all(conv.bias is None for conv in convolutions):
        return None
    none = kernels.new_zeros(kernels.shape[1])
    biases = [none if conv.bias is None else conv.bias.to(kernels.dtype) for conv in convolutions]
    return torch.stack(biases + [none] * skip)


def _stack(x: Tensor, branches: Sequence[Any]) -> Tensor:
    """The sum of branches with equal kernels: one convolution for all, and another that scales and adds them."""
    convolutions = [branch.conv for branch in branches]
    norms = [branch.bn for branch in branches]
    first = convolutions[0]
    shape = (first.groups, len(branches), first.out_channels // first.groups)

    def interleaved(tensors: list[Tensor]) -> Tensor:
        # Grouped convolutions write group by group, so the branches of one group have to be neighbours.
        stack = torch.stack([t.unflatten(0, (first.groups, -1)) for t in tensors], 1)
        return stack.flatten(0, 2)

    def by_branch(values: Tensor) -> Tensor:
        return values.reshape(shape).transpose(0, 1).flatten(1)

    has_bias = any(conv.bias is not None for conv in convolutions)
    zeros = first.weight.new_zeros(first.out_channels)
    y = F.conv2d(
        x,
        interleaved([conv.weight for conv in convolutions]),
        interleaved([zeros if c.bias is None else c.bias for c in convolutions]) if has_bias else None,
        first.stride,
        first.padding,
        first.dilation,
        first.groups,
    )
    with torch.autocast(x.device.type, enabled=False):
        wide = y if y.dtype == torch.float64 else y.float()
        means = variances = None
        if any(uses_batch(norm) for norm in norms):
            wide, (mean, covariance) = pointwise_moments(wide, y.shape[1], y)
            means, variances = by_branch(mean), by_branch(covariance)
        count = y.numel() // y.shape[1]
        like = wide.new_empty(len(norms), first.out_channels)
        scale, shift = scale_and_shift(norms, means, variances, like, count)
        own = torch.eye(shape[2], dtype=scale.dtype, device=scale.device).repeat(shape[0], 1)
        adding = (scale.T[:, :, None] * own[:, None]).flatten(1)[..., None, None]
        return F.conv2d(wide, adding, shift.sum(0), groups=first.groups).to(y.dtype)
