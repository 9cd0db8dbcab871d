"""Exact operations on convolutions: the paradigms of structural re-parameterization (RepNeXt, 2.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import gcd, lcm

import torch
import torch.nn.functional as F
from torch import Tensor

from refold.algebra.convolution import Convolution, batch_norm_affine, with_groups
from refold.errors import NotFoldable


def scale_outputs(convolution: Convolution, scale: Tensor, shift: Tensor | None) -> Convolution:
    """`scale * convolution(x) + shift` as one convolution; `scale` and `shift` are `[out_channels]`."""
    weight = convolution.weight * scale.reshape(-1, *(1,) * (convolution.weight.dim() - 1))
    bias = None if convolution.bias is None else convolution.bias * scale
    return replace(convolution, weight=weight, bias=_add_biases([bias, shift]))


def is_channelwise(convolution: Convolution) -> bool:
    """Whether it only scales and shifts each channel."""
    one_tap = convolution.weight[:, 0].numel() == convolution.weight.numel() == convolution.groups
    still = not any(map(any, convolution.padding)) and all(s == 1 for s in convolution.stride)
    return one_tap and still and convolution.out_channels == convolution.groups


def fold_batch_norm(
    convolution: Convolution,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    epsilon: float,
) -> Convolution:
    """A convolution and the batch norm (evaluation mode) after it as one convolution (paradigm 1)."""
    return scale_outputs(convolution, *batch_norm_affine(mean, variance, weight, bias, epsilon))


def align(convolutions: Sequence[Convolution]) -> list[Convolution]:
    """The same functions with one common kernel size, padding and dilation (paradigm 4).

    Kernels are padded with zeros. Every tap keeps its offset from the output position, so odd, even,
    asymmetric, dilated and off-centre kernels are all placed exactly. Raises NotFoldable where strides or
    output sizes differ; with a stride, sizes may agree for some inputs only (an even and an odd kernel), and
    the result holds for these.
    """
    grid = _common_grid(convolutions)
    return [_on_grid([c], grid) for c in convolutions]


def sum_branches(convolutions: Sequence[Convolution]) -> Convolution:
    """Parallel convolutions of one input, added, as one convolution (paradigms 2 and 4).

    Raises NotFoldable where channels, strides or output sizes differ.
    """
    shapes = {(c.in_channels, c.out_channels) for c in convolutions}
    if len(shapes) > 1:
        raise NotFoldable(f"the branches have different channels (in, out): {sorted(shapes)}")
    groups = gcd(*(c.groups for c in convolutions))
    grouped = [with_groups(c, groups) for c in convolutions]
    return _on_grid(grouped, _common_grid(grouped))


def concatenate(convolutions: Sequence[Convolution]) -> Convolution:
    """Parallel convolutions of one input, outputs concatenated, as one without groups (paradigms 3, 4).

    Raises NotFoldable where input channels, strides or output sizes differ.
    """
    inputs = {c.in_channels for c in convolutions}
    if len(inputs) > 1:
        raise NotFoldable(f"the branches read different numbers of channels: {sorted(inputs)}")
    aligned = align([with_groups(c, 1) for c in convolutions])
    return replace(
        aligned[0], weight=torch.cat([c.weight for c in aligned]), bias=_concatenate_biases(aligned)
    )


def side_by_side(convolutions: Sequence[Convolution]) -> Convolution:
    """Convolutions of consecutive channel ranges, outputs concatenated, as one convolution (paradigm 3).

    The finest common groups are kept, so that depthwise branches stay depthwise (RepUnit1; RepNeXt, eq. 2);
    blocks of different shapes become one group. Raises NotFoldable where strides or output sizes differ.
    """
    aligned = align(convolutions)
    in_each = lcm(*(c.weight.shape[1] for c in aligned))
    merged = [in_each // c.weight.shape[1] for c in aligned]
    out_each = {m * c.out_channels // c.groups for c, m in zip(aligned, merged, strict=True)}
    if len(out_each) > 1 or any(c.groups % m for c, m in zip(aligned, merged, strict=True)):
        total = sum(c.in_channels for c in aligned)
        starts = [sum(c.in_channels for c in aligned[:i]) for i in range(len(aligned))]
        return concatenate([widen_inputs(c, start, total) for c, start in zip(aligned, starts, strict=True)])
    blocks = [with_groups(c, c.groups // m) for c, m in zip(aligned, merged, strict=True)]
    return replace(
        blocks[0],
        weight=torch.cat([c.weight for c in blocks]),
        bias=_concatenate_biases(blocks),
        groups=sum(c.groups for c in blocks),
    )


def widen_inputs(convolution: Convolution, start: int, total: int) -> Convolution:
    """The same function of an input with `total` channels, of which it reads those from `start` on."""
    if start == 0 and total == convolution.in_channels:
        return convolution
    dense = with_groups(convolution, 1)
    weight = dense.weight.new_zeros(dense.out_channels, total, *dense.kernel_size)
    weight[:, start : start + dense.in_channels] = dense.weight
    return replace(dense, weight=weight)


def slice_outputs(convolution: Convolution, start: int, stop: int) -> tuple[Convolution, int]:
    """Output channels `start:stop` as a convolution of the input channels they need, and the first of those.

    Whole groups stay groups; a range that cuts a group becomes one group. Raises NotFoldable for a range that
    is empty or not there.
    """
    if not 0 <= start < stop <= convolution.out_channels:
        raise NotFoldable(f"there are no channels {start}:{stop} in {convolution.out_channels}")
    out_each, in_each = convolution.out_channels // convolution.groups, convolution.weight.shape[1]
    first, last = start // out_each, -(-stop // out_each)
    weight = convolution.weight[first * out_each : last * out_each]
    bias = None if convolution.bias is None else convolution.bias[start:stop]
    if start % out_each == 0 and stop % out_each == 0:
        return replace(convolution, weight=weight, bias=bias, groups=last - first), first * in_each
    whole = with_groups(replace(convolution, weight=weight, bias=None, groups=last - first), 1)
    kept = whole.weight[start - first * out_each : stop - first * out_each]
    return replace(whole, weight=kept, bias=bias), first * in_each


def series(first: Convolution, second: Convolution) -> Convolution:
    """`second(first(x))` as one convolution (paradigm 5, for any two kernels).

    Exact only where the zeros with which `second` pads are what `first` would compute there: raises
    NotFoldable where `second` pads while `first` has a bias, or still reaches the image from there.
    """
    require_chained(first, second)
    for axis, padding in enumerate(second.padding):
        if any(padding) and first.bias is not None:
            raise NotFoldable("the second convolution pads with zeros, but the first adds a shift there")
        if _reaches_beyond(first, axis, padding):
            raise NotFoldable("the second convolution pads with zeros where the first still sees the image")
    if is_channelwise(second):
        return scale_outputs(first, second.weight.flatten(), second.bias)
    if is_channelwise(first):
        return _scale_inputs(first, second)
    groups = gcd(first.groups, second.groups)
    first, second = with_groups(first, groups), with_groups(second, groups)
    steps = [s * d for s, d in zip(first.stride, second.dilation, strict=True)]
    dilation = [
        _common_step(k1, d1, k2, d2)
        for k1, d1, k2, d2 in zip(first.kernel_size, first.dilation, second.kernel_size, steps, strict=True)
    ]
    spread_first = _spread(first.weight, [d // c for d, c in zip(first.dilation, dilation, strict=True)])
    spread_second = _spread(second.weight, [d // c for d, c in zip(steps, dilation, strict=True)])
    return Convolution(
        weight=_compose_kernels(spread_first, spread_second, groups),
        bias=_add_biases([_pass_on(first.bias, second.weight, groups), second.bias]),
        stride=tuple(s1 * s2 for s1, s2 in zip(first.stride, second.stride, strict=True)),
        padding=tuple(
            (b1 + s * b2, a1 + s * a2)
            for (b1, a1), (b2, a2), s in zip(first.padding, second.padding, first.stride, strict=True)
        ),
        dilation=tuple(dilation),
        groups=groups,
    )


def _scale_inputs(channelwise: Convolution, second: Convolution) -> Convolution:
    """`second` of channels that are scaled and shifted one by one, without a product of matrices."""
    groups, taps = second.groups, (1,) * second.spatial_axes
    scale = channelwise.weight.reshape(groups, 1, -1, *taps)
    by_group = second.weight.reshape(groups, -1, *second.weight.shape[1:])
    bias = _add_biases([_pass_on(channelwise.bias, second.weight, groups), second.bias])
    return replace(second, weight=(by_group * scale).flatten(0, 1), bias=bias)


def require_chained(first: Convolution, second: Convolution) -> None:
    """Raise NotFoldable unless `second` can read what `first` writes."""
    if first.out_channels != second.in_channels:
        raise NotFoldable(f"{first.out_channels} channels are passed on, {second.in_channels} are expected")
    if first.spatial_axes != second.spatial_axes:
        raise NotFoldable("convolutions over different numbers of spatial axes have no common form")


@dataclass(frozen=True)
class _Axis:
    """A row of taps along one axis: `taps` from the offset `low` on, `step` apart, reading to `margin` beyond."""

    low: int
    taps: int
    step: int
    margin: int

    @property
    def padding(self) -> tuple[int, int]:
        return -self.low, self.margin + self.low + self.step * (self.taps - 1)

    def places(self, convolution: Convolution, axis: int) -> slice:
        """Which of the taps are those of a convolution that fits."""
        first = (-convolution.padding[axis][0] - self.low) // self.step
        taps = convolution.kernel_size[axis]
        spacing = convolution.dilation[axis] // self.step if taps > 1 else 1
        return slice(first, first + (taps - 1) * spacing + 1, spacing)


def _common_grid(convolutions: Sequence[Convolution]) -> list[_Axis]:
    """The smallest grid of taps, one entry an axis, that holds all kernels."""
    first = convolutions[0]
    if any(c.spatial_axes != first.spatial_axes for c in convolutions):
        raise NotFoldable("the branches have different numbers of spatial axes")
    if any(c.stride != first.stride for c in convolutions):
        raise NotFoldable(f"the strides of the branches differ: {sorted({c.stride for c in convolutions})}")
    return [_common_axis(convolutions, axis) for axis in range(first.spatial_axes)]


def _common_axis(convolutions: Sequence[Convolution], axis: int) -> _Axis:
    spans = []
    for c in convolutions:
        low = -c.padding[axis][0]
        high = low + c.dilation[axis] * (c.kernel_size[axis] - 1)
        spans.append((low, high, c.padding[axis][1] - high))
    margins = [margin for *_, margin in spans]
    if max(margins) - min(margins) >= convolutions[0].stride[axis]:
        raise NotFoldable(f"the branches write different sizes along spatial axis {axis}")
    low, (_, high, margin) = min(s[0] for s in spans), max(spans, key=lambda span: span[1])
    tap_steps = [c.dilation[axis] for c in convolutions if c.kernel_size[axis] > 1]
    step = gcd(*tap_steps, *(start - low for start, *_ in spans)) or 1
    return _Axis(low, (high - low) // step + 1, step, margin)


def _on_grid(convolutions: Sequence[Convolution], grid: Sequence[_Axis]) -> Convolution:
    """The sum of convolutions of equal channels and groups, written on a grid that holds them all."""
    first = convolutions[0]
    # Added in place: the weight of the sum and one branch are all that has to fit into memory.
    weight = first.weight.new_zeros(*first.weight.shape[:2], *(axis.taps for axis in grid))
    for c in convolutions:
        places = (slice(None), slice(None), *(axis.places(c, i) for i, axis in enumerate(grid)))
        weight[places] += c.weight
    return replace(
        first,
        weight=weight,
        bias=_add_biases([c.bias for c in convolutions]),
        padding=tuple(axis.padding for axis in grid),
        dilation=tuple(axis.step for axis in grid),
    )


def _reaches_beyond(first: Convolution, axis: int, padding: tuple[int, int]) -> bool:
    """Whether `first`, moved beyond its output into `padding`, still touches its input."""
    span = first.dilation[axis] * (first.kernel_size[axis] - 1) + 1
    before, after = first.padding[axis]
    return (padding[0] > 0 and before + first.stride[axis] < span) or (padding[1] > 0 and after + 1 < span)


def _common_step(taps_first: int, step_first: int, taps_second: int, step_second: int) -> int:
    """The largest spacing of taps in which both kernels can be written; one tap has no spacing."""
    if taps_first == 1:
        return step_second if taps_second > 1 else 1
    return gcd(step_first, step_second) if taps_second > 1 else step_first


def _spread(weight: Tensor, spacing: Sequence[int]) -> Tensor:
    """The kernel with `spacing - 1` zeros between its taps along each axis."""
    kernel = weight.shape[2:]
    spacing = [s if k > 1 else 1 for s, k in zip(spacing, kernel, strict=True)]
    if all(s == 1 for s in spacing):
        return weight
    spread = weight.new_zeros(
        *weight.shape[:2], *((k - 1) * s + 1 for k, s in zip(kernel, spacing, strict=True))
    )
    places = (slice(None), slice(None), *(slice(None, None, s) for s in spacing))
    spread[places] = weight
    return spread


def _compose_kernels(first: Tensor, second: Tensor, groups: int) -> Tensor:
    """The kernel of two undilated kernels in series: a full convolution of the two over their taps."""
    axes = first.dim() - 2
    if axes == 0:
        return _compose_kernels(first.unsqueeze(-1), second.unsqueeze(-1), groups).squeeze(-1)
    transpose = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[axes - 1]
    kernel = second.shape[2:]
    middle_first = second.reshape(groups, -1, second.shape[1], *kernel).transpose(1, 2)
    middle_first = middle_first.reshape(groups * second.shape[1], -1, *kernel)
    return transpose(first.transpose(0, 1), middle_first, groups=groups).transpose(0, 1).contiguous()


def _pass_on(bias: Tensor | None, weight: Tensor, groups: int) -> Tensor | None:
    """What a constant `bias` for each input channel becomes behind an unpadded convolution with `weight`."""
    if bias is None:
        return None
    gain = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
    return (gain.reshape(groups, -1, weight.shape[1]) @ bias.reshape(groups, -1, 1)).flatten()


def _add_biases(biases: Sequence[Tensor | None]) -> Tensor | None:
    present = [b for b in biases if b is not None]
    return reduce(torch.add, present) if present else None


def _concatenate_biases(convolutions: Sequence[Convolution]) -> Tensor | None:
    if all(c.bias is None for c in convolutions):
        return None
    return torch.cat([c.weight.new_zeros(c.out_channels) if c.bias is None else c.bias for c in convolutions])
