"""YOLOv3 with the light neck that MobileNets are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_iou

from refold.boxes.grids import cell_centres, rows_of
from refold.boxes.matching import Truth
from refold.models.backbone import Backbone
from refold.models.pyramids import resized_like, start_low

_IGNORED_OVERLAP = 0.5


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
    class_layers: ClassVar[tuple[str, ...]] = ("heads.",)
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
        predict = [nn.Conv2d(channels, len(sizes) * (num_classes + 5), 1) for sizes in self.anchor_sizes]
        for layer, sizes in zip(predict, self.anchor_sizes, strict=True):
            start_low(layer)
            assert layer.bias is not None
            # Boxes are their anchors to begin with.
            nn.init.zeros_(layer.bias.data.view(len(sizes), -1)[:, :4])
        self.heads = nn.ModuleList([nn.Sequential(_layer(channels, channels, 3), layer) for layer in predict])

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

    def loss(self, maps: Sequence[Tensor], truth: Sequence[Truth]) -> Tensor:
        """The loss of what `forward` gave for the boxes ``(n, 4)`` and labels ``(n,)`` of each image, a mean over them.

        Each box is learnt by the anchor whose shape is most like it, at the cell where its centre lies. Others whose
        box overlaps it by more than a half need not be background.

        Source: YOLOv3, section 2.1; cross entropy for x and y and the weights are MMDetection's.
        """
        rows, boxes = self.rows(maps), self.boxes(maps).detach()
        loss = rows.sum() * 0  # of images without boxes there is a gradient, too
        for index, (own, labels) in enumerate(truth):
            wanted = torch.zeros_like(rows[index, :, 4])
            places, targets = self._learnt(maps, own)
            wanted[places] = 1.0
            overlaps = box_iou(boxes[index], own).amax(1) if len(own) else torch.zeros_like(wanted)
            counted = (overlaps <= _IGNORED_OVERLAP) | (wanted > 0)
            predicted = rows[index][places]
            classes = F.one_hot(labels, self.num_classes).to(rows.dtype)
            loss = (
                loss
                + _cross_entropy(rows[index, :, 4][counted], wanted[counted])
                + _cross_entropy(predicted[:, 5:], classes)
                + 2 * _cross_entropy(predicted[:, :2], targets[:, :2])
                + 2 * F.mse_loss(predicted[:, 2:4], targets[:, 2:], reduction="sum")
            )
        return loss / max(len(truth), 1)

    def _learnt(self, maps: Sequence[Tensor], boxes: Tensor) -> tuple[Tensor, Tensor]:
        """The rows ``(n,)`` that learn the boxes, and what x, y, width and height ``(n, 4)`` of each should be."""
        sizes = boxes.new_tensor(self.anchor_sizes).flatten(0, 1)
        sides = boxes[:, 2:] - boxes[:, :2]
        shared = torch.minimum(sides[:, None], sizes).prod(-1)
        likest = (shared / (sides.prod(-1)[:, None] + sizes.prod(-1) - shared)).argmax(1)
        anchors = len(self.anchor_sizes[0])
        level, kind = likest // anchors, likest % anchors
        shapes = [map_.shape[-2:] for map_ in maps]
        heights, widths = (level.new_tensor([shape[axis] for shape in shapes]) for axis in range(2))
        counts = [height * width * anchors for height, width in shapes]
        starts = level.new_tensor([sum(counts[:index]) for index in range(len(counts))])
        stride = boxes.new_tensor(self.strides)[level]
        place = (boxes[:, :2] + boxes[:, 2:]) / 2 / stride[:, None]
        # A box at the very edge has its centre in the last cell.
        column = place[:, 0].long().clamp(min=0).minimum(widths[level] - 1)
        row = place[:, 1].long().clamp(min=0).minimum(heights[level] - 1)
        inside = (place - torch.stack([column, row], -1)).clamp(0, 1)
        rows = starts[level] + (row * widths[level] + column) * anchors + kind
        return rows, torch.cat([inside, (sides / sizes[likest]).log()], -1)

    def decode(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Scores ``(batch, anchors, num_classes)`` from 0 to 1, and boxes ``(batch, anchors, 4)`` in pixels."""
        rows = self.rows(maps)
        return rows[..., 4:5].sigmoid() * rows[..., 5:].sigmoid(), self.boxes(maps)


def _cross_entropy(logits: Tensor, wanted: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")


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
