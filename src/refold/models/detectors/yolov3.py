"""YOLOv3 with the light neck that MobileNets are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from refold.boxes.grids import cell_centres, rows_of
from refold.models.backbone import Backbone
from refold.models.pyramids import resized_like, start_low


class YOLOv3(nn.Module):
    """Three anchors a cell on three maps, each with a box, an objectness and a score for each class.

    A backbone's maps of strides 8, 16 and 32 go through five convolutions of ``channels`` each, the coarsest first,
    whose result is resized and concatenated to the next finer map.

    Images ``(batch, in_chans, height, width)`` give one map ``(batch, 3 * (num_classes + 5), height / stride, width /
    stride)`` a stride, the finest first; for each anchor x, y, width and height, objectness and classes.

    Source: YOLOv3, sections 2.1 to 2.3; MMDetection's comparison of MobileNets, which RepGhost's table 5 follows, for
    the width of 96 channels.
    """

    output_kind: ClassVar[str] = "maps"
    strides: ClassVar[tuple[int, ...]] = (8, 16, 32)
    needs_suppression = True
    anchor_sizes: ClassVar[tuple[tuple[tuple[float, float], ...], ...]] = (
        ((10, 13), (16, 30), (33, 23)),
        ((30, 61), (62, 45), (59, 119)),
        ((116, 90), (156, 198), (373, 326)),
    )

    def __init__(self, backbone: Backbone, num_classes: int, *, channels: int = 96) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone = backbone
        *finer, coarsest = backbone.channels
        self.blocks = nn.ModuleList(
            [*(_block(own + channels, channels) for own in finer), _block(coarsest, channels)]
        )
        self.down = nn.ModuleList([_layer(channels, channels) for _ in finer])
        self.heads = nn.ModuleList(
            [
                nn.Sequential(
                    _layer(channels, channels, 3), nn.Conv2d(channels, len(sizes) * (num_classes + 5), 1)
                )
                for sizes in self.anchor_sizes
            ]
        )
        for head in self.heads:
            start_low(head[1])  # type: ignore[index]  # a list of modules to mypy
            with torch.no_grad():
                rows = head[1].bias.view(3, -1)  # type: ignore[index]
                rows[:, :4] = 0

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.backbone(images)
        found = [self.blocks[-1](maps[-1])]
        for index in range(len(maps) - 2, -1, -1):
            coarser = resized_like(self.down[index](found[0]), maps[index])
            found.insert(0, self.blocks[index](torch.cat([coarser, maps[index]], 1)))
        return [head(map_) for head, map_ in zip(self.heads, found, strict=True)]

    def rows(self, maps: Sequence[Tensor]) -> Tensor:
        """What `forward` gives as rows ``(batch, anchors, num_classes + 5)``."""
        return torch.cat([rows_of(map_, self.num_classes + 5) for map_ in maps], 1)

    def boxes(self, maps: Sequence[Tensor]) -> Tensor:
        """The boxes ``(batch, anchors, 4)``, x1, y1, x2, y2 in pixels (YOLOv3, section 2.1)."""
        boxes = []
        for map_, stride, sizes in zip(maps, self.strides, self.anchor_sizes, strict=True):
            rows = rows_of(map_, self.num_classes + 5)[..., :4].unflatten(1, (-1, len(sizes)))
            corners = cell_centres(map_, stride)[:, None] - stride / 2
            centres = corners + rows[..., :2].sigmoid() * stride
            halves = map_.new_tensor(sizes) * rows[..., 2:].clamp(max=8.0).exp() / 2
            boxes.append(torch.cat([centres - halves, centres + halves], -1).flatten(1, 2))
        return torch.cat(boxes, 1)

    def decode(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Scores ``(batch, anchors, num_classes)`` from 0 to 1, and boxes ``(batch, anchors, 4)`` in pixels."""
        rows = self.rows(maps)
        return rows[..., 4:5].sigmoid() * rows[..., 5:].sigmoid(), self.boxes(maps)


def _layer(in_channels: int, out_channels: int, kernel_size: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.LeakyReLU(0.1, inplace=True),
    )


def _block(in_channels: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        _layer(in_channels, channels),
        _layer(channels, 2 * channels, 3),
        _layer(2 * channels, channels),
        _layer(channels, 2 * channels, 3),
        _layer(2 * channels, channels),
    )
