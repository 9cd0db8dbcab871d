"""The bottleneck shared by MobileNetV4, RepGhostNetV2 and their plain counterpart."""

from timm.layers import SqueezeExcite
from torch import Tensor, nn

from refold.blocks.branches import ConvNorm


class InvertedBottleneck(nn.Module):
    """Two 1x1 convolutions with optional depthwise ones before, between and behind them, and a shortcut around all.

    The first 1x1 convolution expands to ``mid_channels``; it and the depthwise convolution in the middle, which
    takes the stride, are activated, the others are not. A kernel of 0 leaves its convolution out. With ``start``
    this is MobileNetV4's universal inverted bottleneck, with ``end`` in its place the bottleneck of
    RepGhost, and with neither MobileNetV3's: ``squeeze_channels`` puts squeeze-excite behind the middle, and
    ``expand=False`` leaves the first 1x1 convolution out, where both sides have equal channels. The shortcut is an
    identity and exists only for equal channels and stride 1.
    Maps ``(batch, in_channels, height, width)`` to ``(batch, out_channels, height / stride, width /
    stride)``, rounded up.

    Source: RepGhost, appendix B.1 and figure 7.
    """

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        *,
        start: int = 0,
        middle: int = 0,
        end: int = 0,
        stride: int = 1,
        shortcut: bool = True,
        squeeze_channels: int | None = None,
        expand: bool = True,
    ) -> None:
        super().__init__()
        self.start = depthwise(in_channels, start)
        self.expand = ConvNorm(in_channels, mid_channels, activation=True) if expand else nn.Identity()
        self.middle = depthwise(mid_channels, middle, stride=stride, activation=True)
        self.se: nn.Module = nn.Identity()
        if squeeze_channels is not None:
            self.se = SqueezeExcite(mid_channels, rd_channels=squeeze_channels, gate_layer="hard_sigmoid")
        self.project = ConvNorm(mid_channels, out_channels)
        self.end = depthwise(out_channels, end)
        self.has_shortcut = shortcut and stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.end(self.project(self.se(self.middle(self.expand(self.start(x))))))
        return out + x if self.has_shortcut else out


def depthwise(channels: int, kernel_size: int, *, stride: int = 1, activation: bool = False) -> nn.Module:
    """A depthwise convolution with batch norm, or an identity for a kernel of 0."""
    if not kernel_size:
        return nn.Identity()
    return ConvNorm(channels, channels, kernel_size, stride=stride, groups=channels, activation=activation)
