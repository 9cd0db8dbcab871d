"""The heads of segmenters: from the maps of a backbone to a map of logits."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from refold.blocks import ConvNorm
from refold.models.pyramids import FeaturePyramid
from refold.models.segmenters.segmenter import resized


class LiteASPP(nn.Module):
    """Scores of a coarse map, gated by what the whole image shows, and added to scores of a fine one.

    Two maps ``(batch, in_channels, height, width)``, the finer first, give logits ``(batch, num_classes, ...)`` of the
    size of the finer.

    Source: Searching for MobileNetV3, section 5.3 and figure 10 ("LR-ASPP"), the gate over the whole image, so that
    images of any size will do.
    """

    def __init__(self, in_channels: Sequence[int], num_classes: int, *, channels: int = 128) -> None:
        super().__init__()
        fine, coarse = in_channels
        self.conv = ConvNorm(coarse, channels, activation=True)
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(coarse, channels, 1, bias=False), nn.Sigmoid()
        )
        self.score_fine = nn.Conv2d(fine, num_classes, 1)
        self.score_coarse = nn.Conv2d(channels, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        fine, coarse = maps
        gated = self.conv(coarse) * self.gate(coarse)
        out: Tensor = self.score_fine(fine) + self.score_coarse(resized(gated, fine))
        return out


class DeepLab(nn.Module):
    """Depthwise separable convolutions of several dilations and the mean of the image, then a finer map beside.

    Two maps ``(batch, in_channels, height, width)``, the finer first, give logits ``(batch, num_classes, ...)`` of the
    size of the finer. ``dilations`` are for a coarse map of stride 16.

    Source: DeepLabv3+, sections 3.1 and 3.2.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        *,
        channels: int = 256,
        dilations: Sequence[int] = (6, 12, 18),
        fine_channels: int = 48,
    ) -> None:
        super().__init__()
        fine, coarse = in_channels
        self.branches = nn.ModuleList(
            [
                ConvNorm(coarse, channels, activation=True),
                *(_separable(coarse, channels, dilation) for dilation in dilations),
            ]
        )
        # A mean of one image is one value a channel, of which a batch norm learns nothing.
        self.mean = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(coarse, channels, 1), nn.ReLU(inplace=True)
        )
        self.merge = ConvNorm((2 + len(dilations)) * channels, channels, activation=True)
        self.fine = ConvNorm(fine, fine_channels, activation=True)
        self.decode = nn.Sequential(
            _separable(channels + fine_channels, channels), _separable(channels, channels)
        )
        self.drop = nn.Dropout(0.1)
        self.score = nn.Conv2d(channels, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        fine, coarse = maps
        mean = self.mean(coarse).expand(-1, -1, *coarse.shape[-2:])
        merged = self.merge(torch.cat([*(branch(coarse) for branch in self.branches), mean], 1))
        decoded = self.decode(torch.cat([resized(merged, fine), self.fine(fine)], 1))
        out: Tensor = self.score(self.drop(decoded))
        return out


class PyramidSum(nn.Module):
    """A feature pyramid, each map doubled in size, convolution by convolution, to the finest one's, and summed.

    Maps ``(batch, in_channels, height, width)``, the finest first, each half as large as the one before, give logits
    ``(batch, num_classes, ...)`` of the size of the finest.

    Source: Panoptic Feature Pyramid Networks, section 3 and figure 3, with batch norm.
    """

    def __init__(
        self, in_channels: Sequence[int], num_classes: int, *, channels: int = 256, out_channels: int = 128
    ) -> None:
        super().__init__()
        self.pyramid = FeaturePyramid(in_channels, channels)
        self.steps = nn.ModuleList(
            [_steps([channels] + [out_channels] * max(1, level)) for level in range(len(in_channels))]
        )
        self.drop = nn.Dropout(0.1)
        self.score = nn.Conv2d(out_channels, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        pyramid = self.pyramid(maps)
        found: list[Tensor] = []
        for level, steps in enumerate(self.steps):
            map_ = pyramid[level]
            for index, step in enumerate(steps.children(), start=1):
                map_ = step(map_)
                if level:
                    map_ = resized(map_, pyramid[level - index])
            found.append(map_)
        out: Tensor = self.score(self.drop(sum(found[1:], found[0])))
        return out


def _steps(widths: Sequence[int]) -> nn.ModuleList:
    return nn.ModuleList([ConvNorm(a, b, 3, activation=True) for a, b in pairwise(widths)])


def _separable(in_channels: int, channels: int, dilation: int = 1) -> nn.Sequential:
    depthwise = nn.Conv2d(
        in_channels, in_channels, 3, padding=dilation, dilation=dilation, groups=in_channels, bias=False
    )
    return nn.Sequential(
        depthwise,
        nn.BatchNorm2d(in_channels),
        nn.ReLU(inplace=True),
        ConvNorm(in_channels, channels, activation=True),
    )
