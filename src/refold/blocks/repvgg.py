"""The block of RepVGG."""

from collections.abc import Sequence

from timm.layers import SqueezeExcite
from torch import Tensor, nn

from refold.blocks.branches import BranchSum, KernelSize


class RepVGGBlock(nn.Module):
    """Branches summed, then squeeze-excite if asked for, then ReLU.

    With the default kernels this is RepVGG's ``3x3 + 1x1 + identity``; the squeeze-excite of RepVGG-D2se sits
    between the sum and the ReLU and takes maps of any height and width.
    Maps ``(batch, in_channels, height, width)`` to ``(batch, out_channels, height / stride, width /
    stride)``, rounded up.

    Source: RepVGG report, section 3.1 and figure 2.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_sizes: Sequence[KernelSize] = (3, 1),
        *,
        stride: int = 1,
        groups: int = 1,
        squeeze_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.conv = BranchSum(in_channels, out_channels, kernel_sizes, stride=stride, groups=groups)
        self.se: nn.Module = (
            nn.Identity()
            if squeeze_channels is None
            else SqueezeExcite(out_channels, rd_channels=squeeze_channels)
        )
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.se(self.conv(x)))
        return out
