"""The units and the block of RepNeXt."""

from collections.abc import Callable

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from refold.blocks.branches import BranchSum
from refold.errors import InputError

_EPS = 1e-6
_UNIT1_KERNELS = (3, 5, 7)


class RepUnit1(nn.Module):
    """Depthwise convolutions 3x3, 5x5 and 7x7 on a third of the channels each, concatenated, and one batch norm.

    Maps ``(batch, channels, height, width)`` to the same shape; at inference it is one depthwise 7x7
    convolution. Raises ``InputError`` where three does not divide ``channels``.

    Source: RepNeXt, figure 2a and eq. 1.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels % len(_UNIT1_KERNELS):
            raise InputError(
                f"RepUnit1 has {channels} channels, which three does not divide; choose a multiple of three."
            )
        self.width = channels // len(_UNIT1_KERNELS)
        self.convs = nn.ModuleList(
            nn.Conv2d(
                self.width,
                self.width,
                kernel_size,
                padding=kernel_size // 2,
                groups=self.width,
                bias=False,
            )
            for kernel_size in _UNIT1_KERNELS
        )
        self.bn = nn.BatchNorm2d(channels, eps=_EPS)

    def forward(self, x: Tensor) -> Tensor:
        thirds = x.split(self.width, dim=1)
        maps = [conv(thirds[index]) for index, conv in enumerate(self.convs)]
        out: Tensor = self.bn(torch.cat(maps, dim=1))
        return out


class RepUnit2(BranchSum):
    """Sum of depthwise convolutions 7x7, 5x5 and 3x3, each with its batch norm.

    Maps ``(batch, channels, height, width)`` to the same shape; at inference it is one depthwise 7x7
    convolution.

    Source: RepNeXt, figure 2b and eq. 3.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, (7, 5, 3), groups=channels, skip=False, eps=_EPS)


class RepUnit3(BranchSum):
    """``RepUnit2`` with its small kernels compressed: 7x7, one row of five columns, three rows of one column.

    Maps ``(batch, channels, height, width)`` to the same shape; at inference it is one depthwise 7x7
    convolution.

    Source: RepNeXt, figure 2c.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, (7, (1, 5), (3, 1)), groups=channels, skip=False, eps=_EPS)


class RepNeXtBlock(nn.Module):
    """A unit and an inverted bottleneck of 1x1 convolutions, with the same activation on its shortcut.

    The activation on the shortcut is what lets the whole block become a plain chain of convolutions. Nothing
    is activated after the addition. ``drop_path_rate`` is the share of samples that skip the main branch in
    training.
    Maps ``(batch, channels, height, width)`` to the same shape.

    Source: RepNeXt, figures 3a and 4.
    """

    def __init__(
        self, channels: int, unit: Callable[[int], nn.Module] = RepUnit3, *, drop_path_rate: float = 0.0
    ) -> None:
        super().__init__()
        self.unit = unit(channels)
        self.expand = nn.Conv2d(channels, 4 * channels, kernel_size=1)
        self.act = nn.GELU()
        self.project = nn.Conv2d(4 * channels, channels, kernel_size=1)
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        main: Tensor = self.project(self.act(self.expand(self.unit(x))))
        out: Tensor = self.act(x) + self.drop_path(main)
        return out
