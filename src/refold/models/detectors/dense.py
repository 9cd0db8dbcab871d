"""The light detector: one prediction a cell, a pyramid of depthwise layers, and no suppression at inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refold.boxes.coding import boxes_from_distances
from refold.boxes.grids import cell_centres, rows_of
from refold.boxes.losses import box_loss, quality_loss
from refold.boxes.matching import Truth, align
from refold.errors import InputError
from refold.models.backbone import Backbone
from refold.models.pyramids import DepthwiseSeparable, LightPyramid, layer_with, start_low

_CELLS_A_BOX, _BOX_WEIGHT = 9, 2.0


class DenseDetector(nn.Module):
    """Each cell of three maps predicts a score for each class and the distances to the sides of one box.

    A backbone's maps of strides 8, 16 and 32 go through a `LightPyramid` of ``channels`` and two depthwise separable
    layers each; ``branches`` is the number of repeated training branches of every convolution in them.

    Images ``(batch, in_chans, height, width)`` give one map ``(batch, num_classes + 4, height / stride, width /
    stride)`` a stride, the finest first: logits, then distances, in strides once softplus was applied.

    With ``one_to_one`` two sets of prediction layers are trained on the same features: the first learns several cells a
    box, the second a single one, and it alone runs in evaluation, so that nothing has to be suppressed. In training
    mode the maps of the first come first.

    Source: FCOS, section 3, for the boxes; PP-PicoDet, section 3, for the light pyramid; DATE (Chen et al.
    2022), section 3, for the second set on shared features.
    """

    output_kind: ClassVar[str] = "maps"
    class_layers: ClassVar[tuple[str, ...]] = ("predict_many.", "predict_one.")
    strides: ClassVar[tuple[int, ...]] = (8, 16, 32)

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        channels: int = 64,
        branches: int = 1,
        one_to_one: bool = True,
    ) -> None:
        super().__init__()
        if branches < 1 or channels < 1:
            raise InputError(f"branches is {branches} and channels {channels}; give at least 1 of each.")
        self.num_classes = num_classes
        self.one_to_one = one_to_one
        self.backbone = backbone
        module = layer_with(branches)
        self.pyramid = LightPyramid(backbone.channels, channels, module)
        # One tower a map: the running statistics of a batch norm are those of one map alone.
        self.towers = nn.ModuleList(
            [
                nn.Sequential(*(DepthwiseSeparable(channels, channels, 5, module) for _ in range(2)))
                for _ in self.strides
            ]
        )
        self.predict_many: nn.Module = self._prediction_layers(channels)
        self.predict_one = self._prediction_layers(channels) if one_to_one else None

    def _prediction_layers(self, channels: int) -> nn.ModuleList:
        layers = [nn.Conv2d(channels, self.num_classes + 4, 1) for _ in self.strides]
        for layer in layers:
            start_low(layer)
            assert layer.bias is not None
            # Boxes of about 2.6 strides to begin with.
            nn.init.ones_(layer.bias.data[-4:])
        return nn.ModuleList(layers)

    @property
    def training_only(self) -> tuple[str, ...]:
        """The parts that folding leaves out."""
        return ("predict_many",) if self.one_to_one else ()

    @property
    def needs_suppression(self) -> bool:
        """Whether several boxes of one object may have high scores."""
        return not self.one_to_one

    def forward(self, images: Tensor) -> list[Tensor]:
        features = [
            tower(map_) for tower, map_ in zip(self.towers, self.pyramid(self.backbone(images)), strict=True)
        ]
        if self.predict_one is None:
            return _applied(self.predict_many, features)
        if not self.training or isinstance(self.predict_many, nn.Identity):
            return _applied(self.predict_one, features)
        return _applied(self.predict_many, features) + _applied(self.predict_one, features)

    def decode(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Scores ``(batch, cells, num_classes)`` from 0 to 1, and boxes ``(batch, cells, 4)`` in pixels."""
        logits, boxes = self.logits_and_boxes(maps)
        return logits.sigmoid(), boxes

    def loss(self, maps: Sequence[Tensor], truth: Sequence[Truth]) -> Tensor:
        """The loss of what `forward` gave, in either mode, for the boxes ``(n, 4)`` and labels ``(n,)`` of each image.

        Qualities of the predictions that `align` chose, nine a box for the first set of layers and one for the second,
        and twice GIoU, both divided by the sum of the qualities.

        Source: TOOD, section 3.3; GFL, eq. 2, for the qualities; PP-YOLOE, section 2.2, for the weights.
        """
        sets = [maps[start : start + len(self.strides)] for start in range(0, len(maps), len(self.strides))]
        counts = [_CELLS_A_BOX, 1] if len(sets) == 2 else [1 if self.one_to_one else _CELLS_A_BOX]
        losses = [self._loss_of(maps, truth, count) for maps, count in zip(sets, counts, strict=True)]
        return sum(losses[1:], losses[0])

    def _loss_of(self, maps: Sequence[Tensor], truth: Sequence[Truth], count: int) -> Tensor:
        logits, boxes = self.logits_and_boxes(maps)
        centres, strides = self._cells(maps)
        scores = logits.detach().sigmoid()
        class_loss = box_losses = boxes.sum() * 0  # of images without boxes there is a gradient, too
        total = boxes.new_zeros(())
        for index, (own, labels) in enumerate(truth):
            found = align(scores[index], boxes[index].detach(), centres, strides, own, labels, count=count)
            wanted = torch.zeros_like(logits[index])
            wanted[found.places, labels[found.boxes]] = found.qualities
            class_loss = class_loss + quality_loss(logits[index], wanted)
            box_losses = box_losses + box_loss(boxes[index][found.places], own[found.boxes], found.qualities)
            total = total + found.qualities.sum()
        return (class_loss + _BOX_WEIGHT * box_losses) / total.clamp(min=1.0)

    def _cells(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The centres ``(cells, 2)`` of all cells, and their strides ``(cells,)``, in pixels."""
        centres = [cell_centres(map_, stride) for map_, stride in zip(maps, self.strides, strict=True)]
        strides = [
            part.new_full((part.shape[0],), stride)
            for part, stride in zip(centres, self.strides, strict=True)
        ]
        return torch.cat(centres), torch.cat(strides)

    def logits_and_boxes(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """What `decode` gives, with logits in place of scores, of one map a stride."""
        logits, boxes = [], []
        for map_, stride in zip(maps, self.strides, strict=True):
            rows = rows_of(map_, self.num_classes + 4)
            logits.append(rows[..., : self.num_classes])
            distances = F.softplus(rows[..., self.num_classes :]) * stride
            boxes.append(boxes_from_distances(distances, cell_centres(map_, stride)))
        return torch.cat(logits, 1), torch.cat(boxes, 1)


def _applied(layers: nn.Module, features: Sequence[Tensor]) -> list[Tensor]:
    return [layer(feature) for layer, feature in zip(layers.children(), features, strict=True)]
