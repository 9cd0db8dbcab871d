"""Random convolutions, inputs that fit them, and a reference that shares no code with the algebra."""

from collections.abc import Callable, Sequence
from math import gcd

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from refold.algebra import Convolution

seeds = st.integers(0, 2**32 - 1)
spatial_axes = st.sampled_from([0, 1, 2, 2, 2, 3])


def for_random(
    *strategies: st.SearchStrategy[object], examples: int = 200
) -> Callable[..., Callable[[], None]]:
    """Run a test on as many examples of the strategies, the same ones each time, however slow the machine."""
    options = settings(max_examples=examples, deadline=None, derandomize=True)
    return lambda test: options(given(*strategies)(test))


def normal(*shape: int, seed: int) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def divisors(number: int) -> list[int]:
    """The divisors of `number`, from 1 on."""
    return [d for d in range(1, number + 1) if number % d == 0]


def new_convolution(
    in_channels: int,
    out_channels: int,
    kernel: Sequence[int],
    *,
    stride: Sequence[int] | None = None,
    padding: Sequence[tuple[int, int]] | None = None,
    dilation: Sequence[int] | None = None,
    groups: int = 1,
    bias: bool = True,
    seed: int = 0,
) -> Convolution:
    """A convolution with normal weights; stride and dilation are one and padding is none unless given."""
    axes = len(kernel)
    return Convolution(
        normal(out_channels, in_channels // groups, *kernel, seed=seed),
        normal(out_channels, seed=seed + 1) if bias else None,
        tuple(stride or (1,) * axes),
        tuple(padding or ((0, 0),) * axes),
        tuple(dilation or (1,) * axes),
        groups,
    )


@st.composite
def channels_and_groups(draw, in_channels=None, out_channels=None):
    """(in, out, groups): dense, grouped, depthwise, and depthwise with a channel multiplier."""
    if in_channels is None and out_channels is None:
        groups = draw(st.integers(1, 4))
        return groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3)), groups
    if out_channels is None:
        groups = draw(st.sampled_from(divisors(in_channels)))
        return in_channels, groups * draw(st.integers(1, 3)), groups
    if in_channels is None:
        groups = draw(st.sampled_from(divisors(out_channels)))
        return groups * draw(st.integers(1, 3)), out_channels, groups
    return in_channels, out_channels, draw(st.sampled_from(divisors(gcd(in_channels, out_channels))))


@st.composite
def convolutions(
    draw, axes=None, in_channels=None, out_channels=None, stride=None, margin=None, bias=None, pads=True
):
    """A convolution over `axes` spatial axes.

    Kernels are odd, even and unequal along the axes, padding differs at the two ends. `margin`, one number an
    axis, fixes padding - dilation * (kernel - 1), which together with the stride sets the size of the output.
    """
    if axes is None:
        axes = draw(spatial_axes)
    largest = 3 if axes == 3 else 5
    in_channels, out_channels, groups = draw(channels_and_groups(in_channels, out_channels))
    kernel, dilation, padding = [], [], []
    for axis in range(axes):
        choices = [(k, d) for k in range(1, largest + 1) for d in (1, 2, 3) if d == 1 or k < 4]
        if margin is not None:
            choices = [(k, d) for k, d in choices if margin[axis] + d * (k - 1) >= 0]
        k, d = draw(st.sampled_from(choices))
        if margin is not None:
            total = margin[axis] + d * (k - 1)
            before = draw(st.integers(0, total))
            padding.append((before, total - before))
        else:
            pad = st.integers(0, 3 if pads else 0)
            padding.append((draw(pad), draw(pad)))
        kernel.append(k)
        dilation.append(d)
    return new_convolution(
        in_channels,
        out_channels,
        kernel,
        stride=[draw(st.integers(1, 3)) for _ in range(axes)] if stride is None else stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()) if bias is None else bias,
        seed=draw(seeds),
    )


def smallest_size(convolution: Convolution) -> list[int]:
    """The smallest input for which the convolution has an output."""
    return [
        max(1, d * (k - 1) + 1 - before - after)
        for k, d, (before, after) in zip(
            convolution.kernel_size, convolution.dilation, convolution.padding, strict=True
        )
    ]


def inputs(convolutions: Sequence[Convolution], channels: int, seed: int = 0, count: int = 4) -> list[Tensor]:
    """Inputs of several unequal small sizes, all large enough for each convolution by itself."""
    axes = convolutions[0].spatial_axes
    smallest = [max(sizes) for sizes in zip(*(smallest_size(c) for c in convolutions), strict=True)]
    return [
        normal(2, channels, *(s + (step + 2 * axis) % 5 for axis, s in enumerate(smallest)), seed=seed + step)
        for step in range(count if axes else 1)
    ]


def reference(convolution: Convolution, x: Tensor) -> Tensor:
    """The convolution by torch, group after group, on an input padded beforehand."""
    ends = [end for pair in reversed(convolution.padding) for end in pair]
    pieces = []
    for index, part in enumerate(F.pad(x, ends).chunk(convolution.groups, 1)):
        weight = convolution.weight.chunk(convolution.groups)[index]
        if convolution.spatial_axes == 0:
            pieces.append(F.linear(part, weight))
        else:
            apply = (F.conv1d, F.conv2d, F.conv3d)[convolution.spatial_axes - 1]
            pieces.append(apply(part, weight, None, convolution.stride, 0, convolution.dilation))
    y = torch.cat(pieces, 1)
    if convolution.bias is None:
        return y
    return y + convolution.bias.reshape(-1, *(1,) * convolution.spatial_axes)


def distance(result: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest expected value; infinite where the shapes differ."""
    if result.shape != expected.shape:
        return float("inf")
    return float((result - expected).abs().max() / expected.abs().max().clamp(min=1))


def assert_equal(result: Tensor, expected: Tensor) -> None:
    """Equal up to the rounding of float64."""
    assert result.shape == expected.shape
    assert result.dtype == expected.dtype
    assert distance(result, expected) <= 1e-11


def to_meta(convolution: Convolution) -> Convolution:
    """The same convolution without data."""
    bias = None if convolution.bias is None else convolution.bias.to("meta")
    return Convolution(
        convolution.weight.to("meta"),
        bias,
        convolution.stride,
        convolution.padding,
        convolution.dilation,
        convolution.groups,
    )


def structure(convolution: Convolution) -> tuple[object, ...]:
    """Everything about a convolution but its numbers and device."""
    return (
        convolution.weight.shape,
        convolution.weight.dtype,
        convolution.bias is None,
        convolution.stride,
        convolution.padding,
        convolution.dilation,
        convolution.groups,
    )
