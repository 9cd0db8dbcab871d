"""ResNet's bottleneck, as RegNet and G-GhostNet have it: groups, any inner width, squeeze-excite."""

from timm.layers import SqueezeExcite
from torch import Tensor, nn

from refold.blocks.branches import ConvNorm


class ResidualBottleneck(nn.Module):
    """A 1x1, a strided and grouped 3x3 and a 1x1 convolution, added to a shortcut; the first two are activated.

    ``mid_channels`` are those of the 3x3 convolution, ``out_channels`` if none are given. ``squeeze_channels``
    puts a squeeze-excite behind it. The shortcut is the identity where shapes allow it, else a 1x1 convolution
    with the stride. ``activation`` is that of the sum.
    Maps ``(batch, in_channels, height, width)`` to ``(batch, out_channels, height / stride, width /
    stride)``, rounded up.

    Source: GhostNets on Heterogeneous Devices, section 4.4; the official code of G-Ghost-RegNetX.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        mid_channels: int | None = None,
        groups: int = 1,
        squeeze_channels: int | None = None,
        activation: bool = True,
    ) -> None:
        super().__init__()
        mid_channels = mid_channels or out_channels
        self.conv1 = ConvNorm(in_channels, mid_channels, activation=True)
        self.conv2 = ConvNorm(mid_channels, mid_channels, 3, stride=stride, groups=groups, activation=True)
        self.se: nn.Module = nn.Identity()
        if squeeze_channels is not None:
            self.se = SqueezeExcite(mid_channels, rd_channels=squeeze_channels, gate_layer="hard_sigmoid")
        self.conv3 = ConvNorm(mid_channels, out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            self.shortcut = ConvNorm(in_channels, out_channels, stride=stride)
        self.act = nn.ReLU(inplace=True) if activation else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.conv3(self.se(self.conv2(self.conv1(x)))) + self.shortcut(x))
        return out
