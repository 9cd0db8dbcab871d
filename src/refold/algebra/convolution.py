"""A convolution as a value, and the layers that are convolutions in disguise (RepNeXt, 2.2, paradigm 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from refold.errors import NotFoldable

Padding = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Convolution:
    """A convolution with zero padding: the one value on which the whole algebra works.

    `weight` is `[out_channels, in_channels / groups, *kernel_size]`, `bias` `[out_channels]` or None.
    `stride` and `dilation` have one number a spatial axis, `padding` one pair (before, after). One, two and
    three spatial axes are convolutions on `[batch, channels, *size]`; none is a linear layer on
    `[..., channels]`.
    Raises ValueError where the shapes contradict each other.
    """

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, ...]
    padding: Padding
    dilation: tuple[int, ...]
    groups: int = 1

    def __post_init__(self) -> None:
        axes = self.spatial_axes
        if axes not in (0, 1, 2, 3):
            raise ValueError(f"a weight needs 2 to 5 dimensions, this one has {self.weight.dim()}")
        if not len(self.stride) == len(self.padding) == len(self.dilation) == axes:
            raise ValueError(f"stride, padding and dilation need {axes} entries for a weight of this shape")
        if self.out_channels % self.groups:
            raise ValueError(f"{self.out_channels} output channels do not divide into {self.groups} groups")
        if self.bias is not None and tuple(self.bias.shape) != (self.out_channels,):
            raise ValueError(f"the bias has shape {tuple(self.bias.shape)}, expected ({self.out_channels},)")

    @property
    def spatial_axes(self) -> int:
        """The number of spatial axes: 0 for a linear layer, 2 for images."""
        return self.weight.dim() - 2

    @property
    def in_channels(self) -> int:
        """Channels that it reads."""
        return self.weight.shape[1] * self.groups

    @property
    def out_channels(self) -> int:
        """Channels that it writes."""
        return self.weight.shape[0]

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Taps along each spatial axis."""
        return tuple(self.weight.shape[2:])

    @property
    def has_symmetric_padding(self) -> bool:
        """Whether each axis is padded equally at both ends, as torch's layers have it."""
        return all(before == after for before, after in self.padding)

    def __call__(self, x: Tensor) -> Tensor:
        """Apply it to `x`, `[batch, in_channels, *size]` (linear: `[..., in_channels]`)."""
        if self.spatial_axes == 0:
            return F.linear(x, with_groups(self, 1).weight, self.bias)
        apply = (F.conv1d, F.conv2d, F.conv3d)[self.spatial_axes - 1]
        if self.has_symmetric_padding:
            return apply(
                x,
                self.weight,
                self.bias,
                self.stride,
                [p for p, _ in self.padding],
                self.dilation,
                self.groups,
            )
        ends = [end for pair in reversed(self.padding) for end in pair]
        return apply(F.pad(x, ends), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def pointwise(weight: Tensor, bias: Tensor | None, spatial_axes: int, groups: int = 1) -> Convolution:
    """A convolution with one tap from a `[out_channels, in_channels / groups]` matrix."""
    return Convolution(
        weight.reshape(*weight.shape[:2], *(1,) * spatial_axes),
        bias,
        (1,) * spatial_axes,
        ((0, 0),) * spatial_axes,
        (1,) * spatial_axes,
        groups,
    )


def affine(scale: Tensor, shift: Tensor | None, spatial_axes: int) -> Convolution:
    """`scale * x + shift` for each channel (`[channels]` each) as a depthwise convolution with one tap."""
    return pointwise(scale.reshape(-1, 1), shift, spatial_axes, groups=scale.numel())


def identity(channels: int, spatial_axes: int, like: Tensor) -> Convolution:
    """The identity on `channels` channels, in the dtype and on the device of `like` (RepNeXt, eq. 5)."""
    return affine(torch.ones(channels, dtype=like.dtype, device=like.device), None, spatial_axes)


def batch_norm_affine(
    mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor]:
    """The scale and the shift, `[channels]` each, that a batch norm applies in evaluation mode."""
    scale = (variance + epsilon).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias


def batch_norm(
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    epsilon: float,
    spatial_axes: int,
) -> Convolution:
    """A batch norm in evaluation mode as a depthwise convolution with one tap (paradigm 6)."""
    return affine(*batch_norm_affine(mean, variance, weight, bias, epsilon), spatial_axes)


def zero_padding(channels: int, padding: Padding, like: Tensor) -> Convolution:
    """Zero padding, (before, after) for each spatial axis, as a convolution; NotFoldable where it crops."""
    if any(end < 0 for pair in padding for end in pair):
        raise NotFoldable("negative padding crops, which no convolution does")
    unpadded = identity(channels, len(padding), like)
    return Convolution(unpadded.weight, None, unpadded.stride, padding, unpadded.dilation, channels)


def average_pool(
    channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    like: Tensor,
    *,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
) -> Convolution:
    """An average pool as a depthwise convolution (paradigm 6).

    Raises NotFoldable where the border is treated otherwise: `ceil_mode` with a stride, which lets windows
    hang over the end, or padding that is not counted.
    """
    if ceil_mode and any(step > 1 for step in stride):
        raise NotFoldable("an average pool with ceil_mode and a stride lets windows hang over the border")
    if any(padding) and not count_include_pad and divisor is None:
        raise NotFoldable("an average pool that does not count its padding divides by less at the border")
    weight = like.new_full((channels, 1, *kernel_size), 1.0 / (divisor or prod(kernel_size)))
    return Convolution(
        weight, None, tuple(stride), tuple((p, p) for p in padding), (1,) * len(kernel_size), channels
    )


def with_groups(convolution: Convolution, groups: int) -> Convolution:
    """The same function written with fewer groups (a divisor of its own), the new connections being zero."""
    if groups == convolution.groups:
        return convolution
    if convolution.groups % groups:
        raise NotFoldable(f"{convolution.groups} groups cannot be written as {groups} groups")
    merged = convolution.groups // groups
    out_each = convolution.out_channels // convolution.groups
    in_each, kernel = convolution.weight.shape[1], convolution.kernel_size
    weight = convolution.weight.new_zeros(groups, merged, out_each, merged, in_each, *kernel)
    blocks = convolution.weight.reshape(groups, merged, out_each, in_each, *kernel)
    weight.diagonal(dim1=1, dim2=3).copy_(blocks.movedim(1, -1))
    return Convolution(
        weight.reshape(convolution.out_channels, merged * in_each, *kernel),
        convolution.bias,
        convolution.stride,
        convolution.padding,
        convolution.dilation,
        groups,
    )


def with_spatial_axes(convolution: Convolution, spatial_axes: int) -> Convolution:
    """The same function of channels in another layout: a linear layer as a convolution with one tap, or back.

    Raises NotFoldable where the convolution has more than one tap, a stride or padding.
    """
    if convolution.spatial_axes == spatial_axes:
        return convolution
    still = all(step == 1 for step in convolution.stride) and not any(map(any, convolution.padding))
    if convolution.weight[0, 0].numel() > 1 or not still:
        raise NotFoldable("the channels of its inputs lie along different axes")
    matrix = convolution.weight.flatten(1)
    return pointwise(matrix, convolution.bias, spatial_axes, convolution.groups)


def constant_padding(convolution: Convolution, padding: Padding, value: Tensor) -> Convolution:
    """A convolution whose output gets a border that holds `value` (`[channels]`), as one convolution.

    Exact where the border is what the convolution makes of zeros, its bias: a batch norm whose border is filled with
    what it makes of zero (diverse branch block). Raises NotFoldable elsewhere, and for more than one tap.
    """
    still = all(step == 1 for step in convolution.stride) and not any(map(any, convolution.padding))
    if convolution.weight[0, 0].numel() > 1 or not still:
        raise NotFoldable("a border is put around a map of which each pixel sees more than one")
    bias = value.new_zeros(len(value)) if convolution.bias is None else convolution.bias
    if not bias.is_meta and not torch.allclose(bias, value.to(bias), rtol=1e-9, atol=1e-12):
        raise NotFoldable("the border holds another value than the layer before it makes of zeros")
    return Convolution(
        convolution.weight,
        convolution.bias,
        convolution.stride,
        padding,
        convolution.dilation,
        convolution.groups,
    )
