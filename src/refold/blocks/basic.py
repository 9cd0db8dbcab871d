"""The basic block of ResNet with an exchangeable convolution, shared by all residual networks of two 3x3 layers."""

from torch import Tensor, nn
from torch.nn import functional as F

from refold.blocks.branches import ConvNorm
from refold.blocks.ghost import GhostModuleFactory


class BasicBlock(nn.Module):
    """Two 3x3 layers, the first activated and with the stride, added to a shortcut; the sum is activated.

    ``module`` builds the layers: a convolution with its batch norm, a ghost module. The shortcut is the identity
    where shapes allow it; else a ``PaddedIdentity``, or with ``projection`` a 1x1 layer with the stride.
    Maps ``(batch, in_channels, height, width)`` to ``(batch, out_channels, height / stride, width /
    stride)``, rounded up.

    Source: He et al., Deep Residual Learning, sections 3.3 and 4.2; GhostNets on Heterogeneous Devices, section 5.2.2.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        module: GhostModuleFactory = ConvNorm,
        projection: bool = False,
    ) -> None:
        super().__init__()
        self.conv1 = module(in_channels, out_channels, activation=True, kernel_size=3, stride=stride)
        self.conv2 = module(out_channels, out_channels, activation=False, kernel_size=3)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            self.shortcut = (
                module(in_channels, out_channels, activation=False, stride=stride)
                if projection
                else PaddedIdentity(in_channels, out_channels, stride=stride)
            )
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.conv2(self.conv1(x)) + self.shortcut(x))
        return out


class PaddedIdentity(nn.Module):
    """The shortcut without parameters: every ``stride``-th pixel, and zeros for the channels that are missing.

    Where ``out_channels`` are fewer than ``in_channels`` the first of them stay.
    Maps ``(batch, in_channels, height, width)`` to ``(batch, out_channels, height / stride, width /
    stride)``, rounded up.

    Source: He et al., Deep Residual Learning, section 3.3, option A.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1) -> None:
        super().__init__()
        self.extra_channels = out_channels - in_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        # A negative number of extra channels cuts.
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra_channels))

    def extra_repr(self) -> str:
        return f"extra_channels={self.extra_channels}, stride={self.stride}"


def basic_stage(
    in_channels: int,
    out_channels: int,
    depth: int,
    *,
    stride: int = 1,
    module: GhostModuleFactory = ConvNorm,
    projection: bool = False,
) -> nn.Sequential:
    """``depth`` basic blocks of one resolution; the first takes the stride and the change of channels.

    Maps ``(batch, in_channels, height, width)`` to ``(batch, out_channels, height / stride, width /
    stride)``, rounded up.
    """
    return nn.Sequential(
        *(
            BasicBlock(
                in_channels if index == 0 else out_channels,
                out_channels,
                stride=stride if index == 0 else 1,
                module=module,
                projection=projection,
            )
            for index in range(depth)
        )
    )
