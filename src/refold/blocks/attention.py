"""The attention of GhostNetV2."""

from torch import Tensor, fx, nn
from torch.nn import functional as F

from refold.blocks.branches import ConvNorm


class DFCAttention(nn.Module):
    """A gate for every position and channel, from long rows and columns of a map of half the size.

    The input is halved by average pooling, goes through a 1x1, a horizontal and a vertical depthwise convolution of
    five taps and a sigmoid, and is enlarged again by repeating the nearest value: decoupled fully connected
    attention.
    Maps ``(batch, in_channels, height, width)`` to gates ``(batch, out_channels, height, width)`` between 0 and 1.

    Source: GhostNetV3, section 3 and figure 2a; the official code for pooling, kernels and norms.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.pointwise = ConvNorm(in_channels, out_channels)
        self.horizontal = ConvNorm(out_channels, out_channels, (1, 5), groups=out_channels)
        self.vertical = ConvNorm(out_channels, out_channels, (5, 1), groups=out_channels)
        self.gate = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(self.vertical(self.horizontal(self.pointwise(half_size(x)))))
        return F.interpolate(gate, size=x.shape[2:], mode="nearest")


@fx.wrap
def half_size(x: Tensor) -> Tensor:
    """Average of every 2x2 pixels, a last odd row or column left out; a single row or column stays.

    Maps ``(batch, channels, height, width)`` to ``(batch, channels, height / 2, width / 2)``, rounded down but at
    least 1.
    """
    if min(x.shape[2:]) > 1:
        return F.avg_pool2d(x, 2)
    return F.avg_pool2d(x, [min(size, 2) for size in x.shape[2:]])
