"""The branches of one layer, from its convolution and the shapes of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, pad_same
from torch import Tensor, nn

from refold.blocks.parallel import BranchComputation, ParallelBranches
from refold.blocks.parallel.branch import Branch, common_geometry, padding_of
from refold.unfolding.plans import Kind, Shape


def kind_of(conv: nn.Conv2d) -> Kind | None:
    """Which kind of layer of the plans it is; None for a 1x1 convolution that only scales channels."""
    single = conv.kernel_size == (1, 1)
    if conv.groups == conv.in_channels > 1:
        return None if single else "depthwise"
    if single:
        return "pointwise"
    return "dense" if conv.groups == 1 else "grouped"


def build(
    conv: nn.Conv2d,
    norm: nn.Module,
    shapes: Sequence[Shape],
    repeats: int,
    *,
    scale: float,
    form: BranchComputation,
) -> ParallelBranches | None:
    """The layer `conv` with its `norm` (`nn.Identity` for none), and beside it what the plan adds, where it fits.

    The last batch norm of every new branch starts at `scale`. None where nothing fits.
    """
    builder = _Builder(conv, norm)
    added: list[nn.Module] = [builder.convolution(builder.size) for _ in range(repeats - 1)]
    skip = None
    for shape in shapes:
        if shape == "identity":
            skip = builder.norm(conv.in_channels) if common_geometry([conv]).keeps_shape else None
        elif (branch := builder.branch(shape)) is not None:
            added.append(branch)
    if not added and skip is None:
        return None
    for last in [skip, *(list(branch.modules())[-1] for branch in added)]:
        if isinstance(last, nn.BatchNorm2d):
            nn.init.constant_(last.weight, scale)
    made = ParallelBranches([Branch(conv, norm), *added], skip, form=form)
    return made.train(conv.training)


class _Builder:
    """Makes branches beside a convolution."""

    def __init__(self, conv: nn.Conv2d, norm: nn.Module) -> None:
        self._conv = conv
        self._like = norm
        self._padding = padding_of(conv) or (0, 0)
        self._stride = (conv.stride[0], conv.stride[1])
        self.size = (conv.kernel_size[0], conv.kernel_size[1])

    def branch(self, shape: Shape) -> nn.Module | None:
        """One branch, or None where it does not fit."""
        height, width = self.size
        sizes: dict[Shape, tuple[int, int]] = {
            "1x1": (1, 1),
            "column": (height, 1),
            "row": (1, width),
            "smaller": (height - 2, width - 2),
            "smallest": (height - 4, width - 4),
            "smaller row": (1, width - 2),
            "smallest column": (height - 4, 1),
        }
        if shape in sizes:
            return self.convolution(sizes[shape]) if self._fits(sizes[shape]) else None
        if not self._fits((1, 1)):
            return None
        if shape == "split":
            return self._split()
        if shape == "average":
            pool = nn.AvgPool2d(self.size, self._stride, self._padding)
            changes = self._conv.in_channels != self._conv.out_channels or max(self._conv.dilation) > 1
            return None if changes else nn.Sequential(pool, self.norm(self._conv.out_channels))
        return self._bordered(average=shape == "1x1, average")

    def convolution(self, size: tuple[int, int]) -> Branch:
        """A convolution with another kernel, centred on the layer's, and its batch norm."""
        return Branch(self._convolution(size), self.norm(self._conv.out_channels))

    def norm(self, channels: int) -> nn.BatchNorm2d:
        """A batch norm with the settings of the layer's own."""
        like = self._like
        settings: dict[str, Any] = (
            {"eps": like.eps, "momentum": like.momentum} if isinstance(like, nn.BatchNorm2d) else {}
        )
        weight = self._conv.weight
        return nn.BatchNorm2d(channels, **settings, device=weight.device, dtype=weight.dtype)

    def _fits(self, size: tuple[int, int]) -> bool:
        smaller = min(size) >= 1 and size != self.size
        even = all((own - new) % 2 == 0 for own, new in zip(self.size, size, strict=True))
        return smaller and even and min(self._padding_for(size)) >= 0

    def _padding_for(self, size: tuple[int, int]) -> tuple[int, int]:
        height, width = (
            padding - dilation * (own - new) // 2
            for padding, dilation, own, new in zip(
                self._padding, self._conv.dilation, self.size, size, strict=True
            )
        )
        return height, width

    def _convolution(
        self, size: tuple[int, int], *, padding: tuple[int, int] | None = None, inputs: int | None = None
    ) -> nn.Conv2d:
        conv = self._conv
        made = nn.Conv2d(
            inputs or conv.in_channels,
            conv.out_channels,
            size,
            stride=self._stride,
            padding=self._padding_for(size) if padding is None else padding,
            dilation=(conv.dilation[0], conv.dilation[1]),
            groups=conv.groups,
            bias=False,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        return _initialised(made)

    def _split(self) -> nn.Module | None:
        conv, sizes = self._conv, [tuple(max(k - less, 1) for k in self.size) for less in (4, 2, 0)]
        if conv.in_channels != conv.out_channels or conv.in_channels < len(sizes):
            return None
        return Split([self._convolution((h, w)) for h, w in sizes], self.norm(conv.out_channels))

    def _bordered(self, *, average: bool) -> nn.Module | None:
        conv = self._conv
        depthwise = conv.groups == conv.in_channels
        if average and max(conv.dilation) > 1:
            return None
        # Twice the channels between depthwise convolutions; the average has to have the outputs of the layer.
        inner = conv.out_channels if average else conv.in_channels * (2 if depthwise else 1)
        device, dtype = conv.weight.device, conv.weight.dtype
        pointwise = nn.Conv2d(
            conv.in_channels, inner, 1, groups=conv.groups, bias=False, device=device, dtype=dtype
        )
        _initialised(pointwise)
        if not average and not depthwise:
            each = conv.in_channels // conv.groups
            with torch.no_grad():
                pointwise.weight.copy_(torch.eye(each).repeat(conv.groups, 1)[:, :, None, None])
        second: nn.Module
        if average:
            second = nn.AvgPool2d(self.size, self._stride)
        else:
            second = self._convolution(self.size, padding=(0, 0), inputs=inner)
        return Bordered(pointwise, self.norm(inner), self._padding, second, self.norm(conv.out_channels))


def _initialised(conv: nn.Conv2d) -> nn.Conv2d:
    """Normal numbers that keep the variance of the gradient, counting the outputs of one group only."""
    outputs = prod(conv.kernel_size) * conv.out_channels // conv.groups
    nn.init.normal_(conv.weight, 0.0, (2.0 / outputs) ** 0.5)
    return conv


class SamePadded(nn.Module):
    """Parallel branches that see a map padded as TensorFlow's "same" does: by what its size lacks, more at the end.

    Maps `[batch, in_channels, height, width]` to `[batch, out_channels, height / stride, width / stride]`, rounded up.
    It stands in the place of timm's `Conv2dSame`; kernels that are smaller than the layer's have no place here.
    """

    def __init__(self, parallel: ParallelBranches) -> None:
        super().__init__()
        self.parallel = parallel
        # Folding makes one convolution of the branches.
        self.geometry = parallel.geometry

    def forward(self, x: Tensor) -> Tensor:
        geometry = self.geometry
        out: Tensor = self.parallel(pad_same(x, geometry.kernel_size, geometry.stride, geometry.dilation))
        return out


def without_padding(conv: Conv2dSame) -> nn.Conv2d:
    """The convolution that it runs on the map that it padded, with the same parameters."""
    plain = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        dilation=conv.dilation,
        groups=conv.groups,
        bias=conv.bias is not None,
        device="meta",
    )
    plain._parameters.update(conv._parameters)
    return plain.train(conv.training)


class Split(nn.Module):
    """Depthwise convolutions of equal shares of the channels, the last taking what is left over, and a batch norm.

    Maps `[batch, channels, height, width]` to the layer's output. Source: RepNeXt, figure 2a and eq. 1.
    """

    def __init__(self, convolutions: Sequence[nn.Conv2d], bn: nn.BatchNorm2d) -> None:
        super().__init__()
        channels, parts = bn.num_features, len(convolutions)
        self.widths = [channels // parts] * (parts - 1) + [channels - channels // parts * (parts - 1)]
        self.convs = nn.ModuleList()
        for conv, width in zip(convolutions, self.widths, strict=True):
            weight = nn.Parameter(conv.weight.detach()[:width].clone())
            narrow = nn.utils.skip_init(
                nn.Conv2d,
                width,
                width,
                conv.kernel_size,
                stride=conv.stride,
                padding=conv.padding,
                dilation=conv.dilation,
                groups=width,
                bias=False,
            )
            narrow.weight = weight
            self.convs.append(narrow)
        self.bn = bn

    def forward(self, x: Tensor) -> Tensor:
        parts = x.split(self.widths, dim=1)
        out: Tensor = self.bn(torch.cat([conv(parts[i]) for i, conv in enumerate(self.convs)], dim=1))
        return out


class Bordered(nn.Module):
    """A 1x1 convolution and a batch norm, then a convolution or average pool that sees the batch norm of zeros beyond
    the border, and a batch norm.

    Only with that border are the two one convolution. In training mode, it is made of the running averages, and the
    statistics are those of the map without it. Source: Diverse Branch Block.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        norm: nn.BatchNorm2d,
        padding: tuple[int, int],
        second: nn.Module,
        bn: nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.conv = conv
        self.norm = norm
        self.second = second
        self.bn = bn
        self.border = (padding[1], padding[1], padding[0], padding[0])

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            inner = self.norm(self.conv(x))
            with torch.no_grad():
                zero = inner.new_zeros(1, inner.shape[1], 1, 1)
                level = F.batch_norm(
                    zero,
                    self.norm.running_mean,
                    self.norm.running_var,
                    self.norm.weight,
                    self.norm.bias,
                    eps=self.norm.eps,
                )
            inner = F.pad(inner - level, self.border) + level
        else:
            inner = self.norm(self.conv(F.pad(x, self.border)))
        out: Tensor = self.bn(self.second(inner))
        return out
