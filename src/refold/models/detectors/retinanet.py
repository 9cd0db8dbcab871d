"""RetinaNet: nine anchors a cell on five maps, and two heads that all maps share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refold.boxes.coding import boxes_from_deltas, deltas_from_boxes
from refold.boxes.grids import anchor_boxes, anchor_sizes, rows_of
from refold.boxes.losses import focal_loss
from refold.boxes.matching import IGNORED, Truth, match_by_overlap
from refold.models.backbone import Backbone
from refold.models.pyramids import FeaturePyramid, start_low


class RetinaNet(nn.Module):
    """Each anchor of five maps gets a score for each class, and the shift and growth that make it a box.

    A backbone's maps of strides 8, 16 and 32 become a pyramid of strides 8 to 128 with ``channels``. Two heads of four
    3x3 convolutions, the same for every map, read it.

    Images ``(batch, in_chans, height, width)`` give, for each stride, the finest first, maps of logits ``(batch, 9 *
    num_classes, height / stride, width / stride)``, then for each stride maps of deltas ``(batch, 9 * 4, ...)``.

    Source: RetinaNet, section 4 and figure 3.
    """

    output_kind: ClassVar[str] = "maps"
    class_layers: ClassVar[tuple[str, ...]] = ("class_head.",)
    strides: ClassVar[tuple[int, ...]] = (8, 16, 32, 64, 128)
    needs_suppression = True
    _scales = tuple(2 ** (index / 3) for index in range(3))
    _ratios = (0.5, 1.0, 2.0)

    def __init__(self, backbone: Backbone, num_classes: int, *, channels: int = 256, depth: int = 4) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone = backbone
        self.pyramid = FeaturePyramid(backbone.channels, channels, extra=2)
        anchors = len(self._scales) * len(self._ratios)
        self.class_head = _head(channels, depth, anchors * num_classes)
        self.box_head = _head(channels, depth, anchors * 4)
        start_low(self.class_head[-1])  # type: ignore[arg-type]  # a module to mypy

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.pyramid(self.backbone(images))
        return [self.class_head(map_) for map_ in maps] + [self.box_head(map_) for map_ in maps]

    def anchors(self, maps: Sequence[Tensor]) -> Tensor:
        """The anchors ``(anchors, 4)`` of what `forward` gives, x1, y1, x2, y2 in pixels."""
        return torch.cat(
            [
                anchor_boxes(map_, stride, anchor_sizes(4 * stride, self._scales, self._ratios))
                for map_, stride in zip(maps, self.strides, strict=False)
            ]
        )

    def logits_and_deltas(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Rows ``(batch, anchors, num_classes)`` and ``(batch, anchors, 4)`` of what `forward` gives."""
        classes, deltas = maps[: len(self.strides)], maps[len(self.strides) :]
        logits = torch.cat([rows_of(map_, self.num_classes) for map_ in classes], 1)
        return logits, torch.cat([rows_of(map_, 4) for map_ in deltas], 1)

    def loss(self, maps: Sequence[Tensor], truth: Sequence[Truth]) -> Tensor:
        """The loss of what `forward` gave for the boxes ``(n, 4)`` and labels ``(n,)`` of each image.

        Focal loss of all anchors that are not ignored and the smooth L1 loss of deltas, divided by the anchors with a
        box.

        Source: RetinaNet, section 4, "Training"; the point where the second becomes linear is Detectron's, 1 / 9.
        """
        logits, deltas = self.logits_and_deltas(maps)
        anchors = self.anchors(maps)
        loss = deltas.sum() * 0  # of images without boxes there is a gradient, too
        positives = 0
        for index, (boxes, labels) in enumerate(truth):
            number = match_by_overlap(anchors, boxes, foreground=0.5, background=0.4)
            places = (number >= 0).nonzero()[:, 0]
            wanted = torch.zeros_like(logits[index])
            wanted[places, labels[number[places]]] = 1.0
            counted = number != IGNORED
            loss = loss + focal_loss(logits[index][counted], wanted[counted])
            targets = deltas_from_boxes(boxes[number[places]], anchors[places])
            loss = loss + F.smooth_l1_loss(deltas[index][places], targets, reduction="sum", beta=1 / 9)
            positives += len(places)
        return loss / max(positives, 1)

    def decode(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Scores ``(batch, anchors, num_classes)`` from 0 to 1, and boxes ``(batch, anchors, 4)`` in pixels."""
        logits, deltas = self.logits_and_deltas(maps)
        return logits.sigmoid(), boxes_from_deltas(deltas, self.anchors(maps))


def _head(channels: int, depth: int, out_channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(inplace=True)]
    head = nn.Sequential(*layers, nn.Conv2d(channels, out_channels, 3, padding=1))
    for layer in head:
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]  # all of these have one
    return head
