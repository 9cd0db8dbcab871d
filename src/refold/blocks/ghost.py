"""The modules and the bottleneck of the Ghost networks."""

from collections import OrderedDict
from collections.abc import Callable
from math import ceil
from typing import Literal, Protocol

import torch
from timm.layers import SqueezeExcite
from torch import Tensor, nn

from refold.blocks.attention import DFCAttention
from refold.blocks.branches import BranchSum, ConvFactory, ConvNorm, KernelSize
from refold.errors import InputError

_REPARAMETERIZATIONS = {"batch_norm", "identity", "depthwise", "relu"}


class _Ghost(nn.Module):
    """What ``primary`` gives and what ``cheap`` makes of that, concatenated and cut to ``out_channels``."""

    def __init__(self, primary: nn.Module, cheap: nn.Module | None, out_channels: int, is_cut: bool) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.is_cut = is_cut
        self.primary = primary
        self.cheap = cheap

    def forward(self, x: Tensor) -> Tensor:
        primary: Tensor = self.primary(x)
        if self.cheap is None:
            return primary
        out = torch.cat([primary, self.cheap(primary)], dim=1)
        return out[:, : self.out_channels] if self.is_cut else out


class GhostModule(_Ghost):
    """Some of the outputs from a convolution, the others from a cheap depthwise convolution of those.

    With ``ratio`` s the primary convolution gives ``ceil(out_channels / s)`` channels and the cheap one
    s - 1 maps for each of them; both are concatenated, primary first, and cut to ``out_channels``. The
    cheap convolution reads the activated output of the primary one. A ratio of 1 leaves the primary convolution
    alone, which is the plain layer.
    ``conv`` builds both, with branches in parallel for GhostNetV3.
    Maps ``(batch, in_channels, height, width)`` to ``(batch, out_channels, height / stride, width /
    stride)``, rounded up.
    Raises ``InputError`` for a ratio below 1 or an even ``cheap_kernel_size``.

    Source: GhostNets on Heterogeneous Devices, section 3.1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        activation: bool,
        kernel_size: int = 1,
        stride: int = 1,
        ratio: int = 2,
        cheap_kernel_size: int = 3,
        conv: ConvFactory = ConvNorm,
    ) -> None:
        primary, cheap = ghost_channels(out_channels, ratio, cheap_kernel_size)
        super().__init__(
            conv(in_channels, primary, kernel_size, stride=stride, activation=activation),
            conv(primary, cheap, cheap_kernel_size, groups=primary, activation=activation) if cheap else None,
            out_channels,
            is_cut=primary + cheap > out_channels,
        )


class GhostConv2d(_Ghost):
    """A ghost module with the arguments of ``nn.Conv2d``, for the place of a convolution and its batch norm.

    The activation stays where it was, behind the module; the cheap convolution reads the primary outputs through
    ``activation`` too, which must not work in place. ``norm``, such as ``nn.BatchNorm2d``, builds what follows each of
    the two convolutions from its channels.
    So this computes what ``GhostModule`` does, for every activation and every kind of convolution; the primary one has
    the kernel, stride, padding, dilation and groups, and both have a bias where ``bias`` says so.
    Maps ``(batch, in_channels, height, width)`` to the shape that ``nn.Conv2d`` gives.
    Raises ``InputError`` for a ratio below 1, an even ``cheap_kernel_size``, or groups that do not divide the primary
    channels.

    Source: GhostNets on Heterogeneous Devices, section 3.1 and eq. 1 to 3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: KernelSize,
        *,
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        ratio: int = 2,
        cheap_kernel_size: int = 3,
        norm: Callable[[int], nn.Module] | None = None,
        activation: nn.Module | None = None,
    ) -> None:
        primary, cheap = ghost_channels(out_channels, ratio, cheap_kernel_size)
        if primary % groups:
            raise InputError(
                f"A grouped convolution of {out_channels} channels has {primary} primary channels at ratio {ratio}, "
                f"which its {groups} groups do not divide; choose another ratio or leave this convolution as it is."
            )
        first = nn.Conv2d(
            in_channels, primary, kernel_size, stride, padding, dilation, groups, bias, padding_mode
        )
        second = None
        if cheap:
            pad = cheap_kernel_size // 2
            conv = nn.Conv2d(primary, cheap, cheap_kernel_size, padding=pad, groups=primary, bias=bias)
            second = _layer(activation, conv, norm)
        super().__init__(
            _layer(None, first, norm), second, out_channels, is_cut=primary + cheap > out_channels
        )


def _layer(
    activation: nn.Module | None, conv: nn.Conv2d, norm: Callable[[int], nn.Module] | None
) -> nn.Sequential:
    parts: dict[str, nn.Module] = {} if activation is None else {"act": activation}
    parts["conv"] = conv
    if norm is not None:
        parts["bn"] = norm(conv.out_channels)
    return nn.Sequential(OrderedDict(parts))


def ghost_channels(out_channels: int, ratio: int, cheap_kernel_size: int) -> tuple[int, int]:
    """How many channels the primary and the cheap convolution of a ghost module give, before they are cut.

    Raises ``InputError`` for a ratio below 1 or an even ``cheap_kernel_size``, which no ghost module can have.
    """
    _check_ghost(ratio, cheap_kernel_size)
    primary = ceil(out_channels / ratio)
    return primary, primary * (ratio - 1) if primary < out_channels else 0


def _check_ghost(ratio: int, cheap_kernel_size: int) -> None:
    if ratio < 1:
        raise InputError(f"ratio is {ratio}; give 2 or more, or 1 for plain convolutions.")
    if cheap_kernel_size < 1 or cheap_kernel_size % 2 == 0:
        raise InputError(
            f"cheap_kernel_size is {cheap_kernel_size}; give an odd number, as only these keep the map's size."
        )


def ghost_speed_up(
    in_channels: int, *, kernel_size: int = 1, ratio: int = 2, cheap_kernel_size: int = 3
) -> float:
    """The multiply-accumulates of a convolution divided by those of the ghost module in its place.

    Without rounding: the ratio divides the output channels. Near ``ratio`` where the input channels are many.
    Raises ``InputError`` for a ratio below 1 or an even ``cheap_kernel_size``.

    Source: GhostNets on Heterogeneous Devices, eq. 4.
    """
    _check_ghost(ratio, cheap_kernel_size)
    convolution = in_channels * kernel_size**2
    return ratio * convolution / (convolution + (ratio - 1) * cheap_kernel_size**2)


def ghost_compression(
    in_channels: int, *, kernel_size: int = 1, ratio: int = 2, cheap_kernel_size: int = 3
) -> float:
    """The weights of a convolution divided by those of the ghost module in its place.

    Biases and batch norms, equal in both, are not counted. A weight is multiplied once for every pixel of the output
    in either, so this equals the speed-up.
    Raises ``InputError`` for a ratio below 1 or an even ``cheap_kernel_size``.

    Source: GhostNets on Heterogeneous Devices, eq. 5.
    """
    return ghost_speed_up(
        in_channels, kernel_size=kernel_size, ratio=ratio, cheap_kernel_size=cheap_kernel_size
    )


class RepGhostModule(nn.Module):
    """A 1x1 convolution, then the sum of a depthwise 3x3 convolution and a batch norm, not a concatenation.

    ``reparameterization`` names what is summed with the depthwise 3x3 convolution, several parts joined by
    ``+``: ``batch_norm``, ``identity``, ``depthwise`` (1x1, with a batch norm of its own); or ``none``. ``relu``
    activates the 3x3 convolution before the sum, in activated modules. ``kernel_size`` and ``stride`` are those of
    the first convolution.
    Maps ``(batch, in_channels, height, width)`` to ``(batch, out_channels, height / stride, width / stride)``,
    rounded up; the sum is one depthwise convolution at inference, except with ``relu``.
    Raises ``InputError`` for another reparameterization.

    Source: RepGhost, figure 3d and table 7.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        activation: bool,
        kernel_size: int = 1,
        stride: int = 1,
        reparameterization: str = "batch_norm",
    ) -> None:
        super().__init__()
        parts = _parts(reparameterization)
        self.primary = ConvNorm(in_channels, out_channels, kernel_size, stride=stride, activation=activation)
        self.cheap = BranchSum(
            out_channels,
            out_channels,
            (3, 1) if "depthwise" in parts else (3,),
            groups=out_channels,
            skip="batch_norm" in parts,
            identity="identity" in parts,
        )
        if activation and "relu" in parts:
            self.cheap.branches[0].act = nn.ReLU(inplace=True)
        self.act = nn.ReLU(inplace=True) if activation else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.cheap(self.primary(x)))
        return out


def _parts(reparameterization: str) -> frozenset[str]:
    parts = reparameterization.split("+")
    if parts == ["none"]:
        return frozenset()
    if len(set(parts)) < len(parts) or not set(parts) <= _REPARAMETERIZATIONS:
        raise InputError(
            f"reparameterization is {reparameterization!r}; choose 'none', or one or several of "
            f"{', '.join(sorted(_REPARAMETERIZATIONS))}, joined by '+'."
        )
    return frozenset(parts)


class GhostModuleFactory(Protocol):
    """Whatever builds a module from ``in_channels`` to ``out_channels`` with the shapes of a convolution."""

    def __call__(
        self, in_channels: int, out_channels: int, *, activation: bool, kernel_size: int = 1, stride: int = 1
    ) -> nn.Module: ...


class GhostBottleneck(nn.Module):
    """Two modules around an optional strided depthwise convolution and squeeze-excite, added to a shortcut.

    The first module expands to ``mid_channels`` and is activated, the second projects to ``out_channels`` and
    is not. The shortcut is the identity where shapes allow it, else a depthwise and a 1x1 convolution;
    ``identity_shortcut=False`` leaves the identity out. There is no activation after the addition. With
    ``attention`` the first module's output is multiplied by ``DFCAttention`` of the input, as in GhostNetV2.
    ``conv`` builds the strided convolution, with branches in parallel for GhostNetV3.
    Maps ``(batch, in_channels, height, width)`` to ``(batch, out_channels, height / stride, width /
    stride)``, rounded up.

    Source: GhostNets on Heterogeneous Devices, section 3.2; RepGhost, figure 4; GhostNetV3, figure 2.
    """

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int,
        squeeze_channels: int | None,
        module: GhostModuleFactory,
        attention: bool = False,
        identity_shortcut: bool = True,
        conv: ConvFactory = ConvNorm,
    ) -> None:
        super().__init__()
        self.ghost1 = module(in_channels, mid_channels, activation=True)
        self.attention = DFCAttention(in_channels, mid_channels) if attention else None
        self.depthwise: nn.Module = nn.Identity()
        if stride > 1:
            self.depthwise = conv(mid_channels, mid_channels, kernel_size, stride=stride, groups=mid_channels)
        self.se: nn.Module = nn.Identity()
        if squeeze_channels is not None:
            self.se = SqueezeExcite(mid_channels, rd_channels=squeeze_channels, gate_layer="hard_sigmoid")
        self.ghost2 = module(mid_channels, out_channels, activation=False)
        self.shortcut: nn.Module | None = nn.Identity() if identity_shortcut else None
        if stride > 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                ConvNorm(in_channels, in_channels, kernel_size, stride=stride, groups=in_channels),
                ConvNorm(in_channels, out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        expanded = self.ghost1(x)
        if self.attention is not None:
            expanded = expanded * self.attention(x)
        out: Tensor = self.ghost2(self.se(self.depthwise(expanded)))
        return out if self.shortcut is None else out + self.shortcut(x)


class GhostResidual(nn.Module):
    """ResNet's bottleneck with a module for every convolution: 1x1, 3x3 with the stride, 1x1, added to a shortcut.

    The first two modules are activated, and so is the sum. The shortcut is the identity where shapes allow it, else
    a 1x1 module.
    Maps ``(batch, in_channels, height, width)`` to ``(batch, out_channels, height / stride, width /
    stride)``, rounded up.

    Source: GhostNets on Heterogeneous Devices, section 5.1; RepGhost, appendix B.4.
    """

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        *,
        stride: int,
        module: GhostModuleFactory,
    ) -> None:
        super().__init__()
        self.reduce = module(in_channels, mid_channels, activation=True)
        self.spatial = module(mid_channels, mid_channels, activation=True, kernel_size=3, stride=stride)
        self.expand = module(mid_channels, out_channels, activation=False)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            self.shortcut = module(in_channels, out_channels, activation=False, stride=stride)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.expand(self.spatial(self.reduce(x))) + self.shortcut(x))
        return out
