"""Pyramids of maps, and the layers that the heads of detectors and segmenters are made of."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import log

from torch import Tensor, nn
from torch.nn import functional as F

from refold.blocks import ConvFactory, ConvNorm, RepeatedConvNorm


class DepthwiseSeparable(nn.Sequential):
    """A depthwise and a 1x1 convolution, each with batch norm and ReLU.

    ``module`` builds both, with training branches or without.
    Maps ``(batch, in_channels, height, width)`` to ``(batch, out_channels, height / stride, width / stride)``, rounded
    up.

    Source: MobileNets, section 3.1.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, module: ConvFactory, *, stride: int = 1
    ) -> None:
        super().__init__(
            module(in_channels, in_channels, kernel_size, stride=stride, groups=in_channels, activation=True),
            module(in_channels, out_channels, activation=True),
        )


def layer_with(branches: int) -> ConvFactory:
    """What builds a convolution with batch norm: of one branch, or repeated with a 1x1 branch and a skip beside.

    Source: GhostNetV3, section 4.1, for the branches.
    """
    return ConvNorm if branches == 1 else partial(RepeatedConvNorm, repeats=branches)


class FeaturePyramid(nn.Module):
    """Maps of a backbone, the finest first, to maps of one width: each gets what the next coarser one knows.

    After the sum a 3x3 convolution; ``extra`` coarser maps follow by 3x3 convolutions with stride 2, the first of the
    backbone's last map, a ReLU before each other.
    ``in_channels`` of the maps ``(batch, channels, height, width)`` become ``channels`` of all.

    Source: Feature Pyramid Networks, section 3; RetinaNet, section 4, for P6 and P7.
    """

    def __init__(self, in_channels: Sequence[int], channels: int, *, extra: int = 0) -> None:
        super().__init__()
        self.lateral = nn.ModuleList([nn.Conv2d(own, channels, 1) for own in in_channels])
        self.smooth = nn.ModuleList([nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels])
        self.extra = nn.ModuleList(
            [
                nn.Conv2d(channels if index else in_channels[-1], channels, 3, stride=2, padding=1)
                for index in range(extra)
            ]
        )
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_uniform_(layer.weight, a=1)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]  # all of these have one

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        merged = [lateral(map_) for lateral, map_ in zip(self.lateral, maps, strict=True)]
        for index in range(len(merged) - 2, -1, -1):
            merged[index] = merged[index] + resized_like(merged[index + 1], merged[index])
        found = [smooth(map_) for smooth, map_ in zip(self.smooth, merged, strict=True)]
        coarsest = maps[-1]
        for index, layer in enumerate(self.extra):
            coarsest = layer(F.relu(coarsest) if index else coarsest)
            found.append(coarsest)
        return found


class LightPyramid(nn.Module):
    """Maps of a backbone, the finest first, to maps of one width, down and up again by depthwise separable layers.

    On the way down each map gets what the next coarser one knows, on the way up what the next finer one does.
    ``in_channels`` of the maps ``(batch, channels, height, width)`` become ``channels`` of all. ``module`` builds the
    layers.

    Source: Path Aggregation Network, section 3.1, with sums and depthwise separable layers.
    """

    def __init__(
        self, in_channels: Sequence[int], channels: int, module: ConvFactory, *, kernel_size: int = 5
    ) -> None:
        super().__init__()
        steps = range(len(in_channels) - 1)
        self.lateral = nn.ModuleList([ConvNorm(own, channels, activation=True) for own in in_channels])
        self.down = nn.ModuleList(
            [DepthwiseSeparable(channels, channels, kernel_size, module) for _ in steps]
        )
        self.reduce = nn.ModuleList(
            [
                module(channels, channels, kernel_size, stride=2, groups=channels, activation=True)
                for _ in steps
            ]
        )
        self.up = nn.ModuleList([DepthwiseSeparable(channels, channels, kernel_size, module) for _ in steps])

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        merged = [lateral(map_) for lateral, map_ in zip(self.lateral, maps, strict=True)]
        for index in range(len(merged) - 2, -1, -1):
            coarser = resized_like(merged[index + 1], merged[index])
            merged[index] = self.down[index](merged[index] + coarser)
        for index in range(len(merged) - 1):
            merged[index + 1] = self.up[index](merged[index + 1] + self.reduce[index](merged[index]))
        return merged


def resized_like(map_: Tensor, reference: Tensor) -> Tensor:
    """A map at the height and width of another one, the nearest value in each place."""
    return F.interpolate(map_, size=reference.shape[-2:], mode="nearest")


def start_low(layer: nn.Conv2d, probability: float = 0.01) -> None:
    """Let a layer of class scores begin with all of them at a small probability, so that background does not drown all.

    Source: RetinaNet, section 4.1.
    """
    nn.init.normal_(layer.weight, std=0.01)
    assert layer.bias is not None
    nn.init.constant_(layer.bias, -log((1 - probability) / probability))
