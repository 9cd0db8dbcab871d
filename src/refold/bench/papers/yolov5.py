"""YOLOv5 as its sizes n and s are built, for RepGhost's table 10: C3 modules that concatenate, or that add."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

_CLASSES, _ANCHORS = 80, 3

Joined = Literal["concatenation", "addition"]


class YOLOv5(nn.Module):
    """Images `(batch, 3, height, width)` to a map of three anchors for each of the strides 8, 16 and 32.

    `width` multiplies all channels: 0.25 in YOLOv5n, 0.5 in YOLOv5s; both have a third of the full depth. `joined` says
    how the two halves of each C3 module meet; its output has the same channels in both.

    Source: YOLOv5, release 6; RepGhost, appendix B.2.
    """

    def __init__(self, width: float, joined: Joined = "concatenation") -> None:
        super().__init__()
        self.pretrained_cfg = {"input_size": (3, 640, 640)}
        a, b, c, d, e = (round(width * channels) for channels in (64, 128, 256, 512, 1024))
        self.stem = nn.Sequential(_layer(3, a, 6, 2), _layer(a, b, 3, 2), C3(b, b, 1, joined))
        self.fine = nn.Sequential(_layer(b, c, 3, 2), C3(c, c, 2, joined))
        self.middle = nn.Sequential(_layer(c, d, 3, 2), C3(d, d, 3, joined))
        self.coarse = nn.Sequential(_layer(d, e, 3, 2), C3(e, e, 1, joined), PooledThrice(e))
        self.narrow = nn.ModuleList([_layer(e, d, 1), _layer(d, c, 1)])
        self.down = nn.ModuleList(
            [C3(2 * d, d, 1, joined, shortcut=False), C3(2 * c, c, 1, joined, shortcut=False)]
        )
        self.reduce = nn.ModuleList([_layer(c, c, 3, 2), _layer(d, d, 3, 2)])
        self.up = nn.ModuleList(
            [C3(2 * c, d, 1, joined, shortcut=False), C3(2 * d, e, 1, joined, shortcut=False)]
        )
        self.heads = nn.ModuleList(
            [nn.Conv2d(channels, _ANCHORS * (_CLASSES + 5), 1) for channels in (c, d, e)]
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        fine = self.fine(self.stem(images))
        middle = self.middle(fine)
        coarse = self.narrow[0](self.coarse(middle))
        between = self.narrow[1](self.down[0](torch.cat([_doubled(coarse), middle], 1)))
        maps = [self.down[1](torch.cat([_doubled(between), fine], 1))]
        for index, narrowed in enumerate((between, coarse)):
            maps.append(self.up[index](torch.cat([self.reduce[index](maps[-1]), narrowed], 1)))
        return [head(map_) for head, map_ in zip(self.heads, maps, strict=True)]


class C3(nn.Module):
    """Half of the channels through bottlenecks, the other half past them, joined and read by a 1x1 convolution."""

    def __init__(
        self, in_channels: int, out_channels: int, depth: int, joined: Joined, *, shortcut: bool = True
    ) -> None:
        super().__init__()
        half = out_channels // 2
        self.joined = joined
        self.through = nn.Sequential(
            _layer(in_channels, half, 1), *(Bottleneck(half, shortcut) for _ in range(depth))
        )
        self.past = _layer(in_channels, half, 1)
        self.read = _layer(half if joined == "addition" else 2 * half, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        halves = self.through(x), self.past(x)
        out: Tensor = self.read(halves[0] + halves[1] if self.joined == "addition" else torch.cat(halves, 1))
        return out


class Bottleneck(nn.Module):
    """A 1x1 and a 3x3 convolution of as many channels, and in the backbone a shortcut over both."""

    def __init__(self, channels: int, shortcut: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(_layer(channels, channels, 1), _layer(channels, channels, 3))
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return x + out if self.shortcut else out


class PooledThrice(nn.Module):
    """A map beside its maxima over 5, 9 and 13 pixels, from pooling three times."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.narrow = _layer(channels, channels // 2, 1)
        self.pool = nn.MaxPool2d(5, stride=1, padding=2)
        self.read = _layer(2 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.narrow(x)]
        for _ in range(3):
            maps.append(self.pool(maps[-1]))
        out: Tensor = self.read(torch.cat(maps, 1))
        return out


def _layer(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Sequential:
    padding = 2 if kernel_size == 6 else kernel_size // 2
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False),
        nn.BatchNorm2d(out_channels, eps=1e-3, momentum=0.03),
        nn.SiLU(inplace=True),
    )


def _doubled(map_: Tensor) -> Tensor:
    return interpolate(map_, scale_factor=2.0, mode="nearest")
