"""The block of RepVGG, and the forms that its report compares it with."""

from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Protocol

from timm.layers import SqueezeExcite
from torch import Tensor, nn

from refold.blocks.branches import BranchSum, ConvNorm
from refold.blocks.dirac import DiracConv2d, TrivialConv2d
from refold.errors import InputError


class LayersFactory(Protocol):
    """Whatever builds what stands before a block's activation, with the shapes of a centred convolution."""

    def __call__(self, in_channels: int, out_channels: int, *, stride: int, groups: int) -> nn.Module: ...


class ResidualLayers(nn.Module):
    """ResNet's two 3x3 layers with a ReLU between, added to their input.

    The shortcut is the identity where channels and stride allow it, else a 1x1 convolution with batch norm.
    ``groups`` divide the second convolution.
    Maps ``(batch, in_channels, height, width)`` to ``(batch, out_channels, height / stride, width /
    stride)``, rounded up.

    Source: RepVGG report, section 4.3, "shortcuts just like ResNet-18/34".
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, groups: int) -> None:
        super().__init__()
        self.first = ConvNorm(in_channels, out_channels, 3, stride=stride, activation=True)
        self.second = ConvNorm(out_channels, out_channels, 3, groups=groups)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            self.shortcut = ConvNorm(in_channels, out_channels, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x)) + self.shortcut(x)
        return out


def _norm_after_sum(in_channels: int, out_channels: int, *, stride: int, groups: int) -> nn.Module:
    branches = BranchSum(
        in_channels, out_channels, (3, 1), stride=stride, groups=groups, skip=False, identity=True, norm=False
    )
    return nn.Sequential(OrderedDict(sum=branches, bn=nn.BatchNorm2d(out_channels)))


# What stands before the ReLU; all but `relu_in_branches` and `residual` are one 3x3 convolution at inference.
REPARAMETERIZATIONS: Mapping[str, LayersFactory] = MappingProxyType(
    {
        # Figure 6 and the full-featured row of figure 7.
        "full": partial(BranchSum, kernel_sizes=(3, 1)),
        "no_identity": partial(BranchSum, kernel_sizes=(3, 1), skip=False),
        "no_pointwise": partial(BranchSum, kernel_sizes=(3,)),
        "none": partial(BranchSum, kernel_sizes=(3,), skip=False),
        # The others of figure 7, in its order.
        "identity_without_norm": partial(BranchSum, kernel_sizes=(3, 1), skip=False, identity=True),
        "norm_after_sum": _norm_after_sum,
        "relu_in_branches": partial(BranchSum, kernel_sizes=(3, 1), activation=True),
        "dirac": partial(ConvNorm, kernel_size=3, conv=DiracConv2d),
        "trivial": partial(ConvNorm, kernel_size=3, conv=TrivialConv2d),
        "asymmetric": partial(BranchSum, kernel_sizes=(3, (1, 3), (3, 1)), skip=False),
        "residual": ResidualLayers,
    }
)


class RepVGGBlock(nn.Module):
    """Branches summed, then squeeze-excite if asked for, then ReLU.

    By default the branches are RepVGG's ``3x3 + 1x1 + identity``; ``reparameterization`` names another row of
    ``REPARAMETERIZATIONS``, or builds the branches itself. ``"residual"`` stands for two layers, all others for
    one. The squeeze-excite of RepVGG-D2se sits between the sum and the ReLU and takes maps of any height and
    width.
    Maps ``(batch, in_channels, height, width)`` to ``(batch, out_channels, height / stride, width /
    stride)``, rounded up.
    Raises ``InputError`` for a name that is not in the table.

    Source: RepVGG report, section 3.1, figures 2, 6 and 7.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        reparameterization: str | LayersFactory = "full",
        *,
        stride: int = 1,
        groups: int = 1,
        squeeze_channels: int | None = None,
    ) -> None:
        super().__init__()
        build = _layers(reparameterization) if isinstance(reparameterization, str) else reparameterization
        self.conv = build(in_channels, out_channels, stride=stride, groups=groups)
        self.se: nn.Module = (
            nn.Identity()
            if squeeze_channels is None
            else SqueezeExcite(out_channels, rd_channels=squeeze_channels)
        )
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.se(self.conv(x)))
        return out


def _layers(name: str) -> LayersFactory:
    if name not in REPARAMETERIZATIONS:
        raise InputError(
            f"reparameterization is {name!r}; choose one of {', '.join(map(repr, REPARAMETERIZATIONS))}."
        )
    return REPARAMETERIZATIONS[name]
