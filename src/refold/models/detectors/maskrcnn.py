"""Mask R-CNN: a first stage that proposes boxes, and a second that names them and draws their masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign

from refold.boxes.coding import boxes_from_deltas
from refold.boxes.grids import anchor_boxes, anchor_sizes, rows_of
from refold.boxes.pooling import pooled_in_boxes
from refold.boxes.suppression import Suppression, first_of_each
from refold.errors import InputError
from refold.models.backbone import Backbone
from refold.models.pyramids import FeaturePyramid

_BOX_SIDE, _MASK_SIDE = 7, 14
_SMALLEST, _MOST = 1e-3, 2**31

MaskedTruth = tuple[Tensor, Tensor, Tensor]
"""The boxes ``(n, 4)`` of an image, x1, y1, x2, y2 in pixels, labels ``(n,)`` and masks ``(n, height, width)``."""


class MaskRCNN(nn.Module):
    """Boxes that may hold something are proposed on a pyramid; what the maps show in each is named, and drawn.

    A backbone's maps of strides 4 to 32 become a pyramid with ``channels``, and a coarser one follows. The forward pass
    ends where boxes have to be chosen. Images ``(batch, in_chans, height, width)`` give the four maps of the pyramid
    ``(batch, channels, height / stride, width / stride)``, the finest first, then for each of five strides three logits
    a cell, then for each three times four deltas. `candidates` and `masks`, which `refold.detections` calls, go on from
    there: torchvision's heads read ``proposals`` boxes an image, with ``hidden`` values in between, and those found.

    Source: Mask R-CNN, section 3 and figure 4 (right); torchvision's parts and their settings.
    """

    output_kind: ClassVar[str] = "maps"
    class_layers: ClassVar[tuple[str, ...]] = (
        "roi_heads.box_predictor.",
        "roi_heads.mask_predictor.mask_fcn_logits.",
    )
    strides: ClassVar[tuple[int, ...]] = (4, 8, 16, 32, 64)
    needs_suppression = True
    runs_apart: ClassVar[tuple[str, ...]] = ("roi_heads",)
    _ratios = (0.5, 1.0, 2.0)

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        channels: int = 256,
        hidden: int = 1024,
        proposals: int = 1000,
    ) -> None:
        super().__init__()
        if min(channels, hidden, proposals) < 1:
            raise InputError(
                f"channels is {channels}, hidden {hidden} and proposals {proposals}; give at least 1 of each."
            )
        self.num_classes = num_classes
        self.proposals = proposals
        self.backbone = backbone
        self.pyramid = FeaturePyramid(backbone.channels, channels)
        counts = {"training": 2 * proposals, "testing": proposals}
        self.rpn = RegionProposalNetwork(
            # Its anchors lie by what the image's side is divided by the map's, which is no stride for any size.
            nn.Identity(),
            RPNHead(channels, len(self._ratios)),
            *(0.7, 0.3, 256, 0.5),
            counts,
            counts,
            nms_thresh=0.7,
        )
        self.suppression = Suppression(self.rpn.nms_thresh)
        self.roi_heads = _second_stage(channels, hidden, num_classes + 1)

    def forward(self, images: Tensor) -> list[Tensor]:
        pyramid = self.pyramid(self.backbone(images))
        logits, deltas = self.rpn.head([*pyramid, F.max_pool2d(pyramid[-1], 1, stride=2)])
        return [*pyramid, *logits, *deltas]

    def parts(self, maps: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
        """What `forward` gives, taken apart: the pyramid, and logits and deltas of each stride."""
        levels = len(self.strides)
        return maps[: levels - 1], maps[levels - 1 : -levels], maps[-levels:]

    def decode(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """What the first stage thinks: scores ``(batch, anchors, 1)`` of holding anything, and boxes ``(batch, anchors,
        4)`` in pixels."""
        scores, boxes = zip(*self._by_level(maps), strict=True)
        return torch.cat(scores, 1)[..., None], torch.cat(boxes, 1)

    def _by_level(self, maps: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Scores ``(batch, anchors)`` and boxes ``(batch, anchors, 4)`` of each stride."""
        _, logits, deltas = self.parts(maps)
        anchors = self._anchors(logits)
        return [
            (rows_of(own, 1)[..., 0].sigmoid(), boxes_from_deltas(rows_of(shift, 4), around))
            for own, shift, around in zip(logits, deltas, anchors, strict=True)
        ]

    def _anchors(self, logits: Sequence[Tensor]) -> list[Tensor]:
        return [
            anchor_boxes(map_, stride, anchor_sizes(8 * stride, (1.0,), self._ratios))
            for map_, stride in zip(logits, self.strides, strict=True)
        ]

    def propose(self, maps: Sequence[Tensor], size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Boxes ``(n, 4)`` that may hold something in images of a ``size`` (height, width), and their images ``(n,)``.

        Of each stride the best are taken, overlapping ones suppressed, and of what is left the best of each image stay.
        """
        count = self.proposals * (2 if self.training else 1)
        taken, groups, levels = [], [], len(self.strides)
        for level, (scores, boxes) in enumerate(self._by_level(maps)):
            number = scores.shape[0]
            # Filled up, for a small map has fewer boxes than are taken; those filled in score nothing and go.
            filled = torch.cat([scores, scores.new_zeros(1, count).expand(number, count)], 1)
            best, places = filled.topk(count, dim=1)
            rows = places.clamp(max=scores.shape[1] - 1)[..., None].expand(-1, -1, 4)
            taken.append(torch.cat([boxes.gather(1, rows), best[..., None]], -1).flatten(0, 1))
            image = torch.arange(number, device=boxes.device)[:, None].expand(number, count)
            groups.append((image * levels + level).flatten())
        height, width = size
        rows, group = torch.cat(taken), torch.cat(groups)
        boxes = torch.stack([rows[:, side].clamp(0, (width, height)[side % 2]) for side in range(4)], -1)
        is_real = ((boxes[:, 2:] - boxes[:, :2]) >= _SMALLEST).all(1) & (rows[:, 4] > 0)
        kept = is_real.nonzero()[:, 0]
        boxes, best, group = boxes[kept], rows[kept, 4], group[kept]
        kept = self.suppression(boxes, best, group)
        boxes, image_index = boxes[kept], group[kept] // levels
        kept = first_of_each(image_index, maps[0].shape[0], count)
        # Said, for without a bound PyTorch writes the number of all pairs with classes as one that no ONNX file holds.
        torch._check(kept.shape[0] <= _MOST)
        return boxes[kept], image_index[kept]

    def candidates(
        self, maps: Sequence[Tensor], size: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Every class of every proposal: boxes ``(n, 4)`` in pixels, scores, labels and image indices ``(n,)``."""
        proposals, image_index = self.propose(maps, size)
        pooled = pooled_in_boxes(self.parts(maps)[0], self.strides, proposals, image_index, side=_BOX_SIDE)
        logits, deltas = self.roi_heads.box_predictor(self.roi_heads.box_head(pooled))
        shifts = deltas.unflatten(1, (-1, 4))[:, 1:] / deltas.new_tensor(self.roi_heads.box_coder.weights)
        boxes = boxes_from_deltas(shifts, proposals[:, None])
        scores = logits.softmax(-1)[:, 1:]
        labels = torch.arange(self.num_classes, device=scores.device)[None].expand_as(scores)
        images = image_index[:, None].expand_as(scores)
        return boxes.flatten(0, 1), scores.flatten(), labels.flatten(), images.flatten()

    def masks(self, maps: Sequence[Tensor], boxes: Tensor, labels: Tensor, image_index: Tensor) -> Tensor:
        """How surely each point of boxes ``(n, 4)`` belongs to what is in them, from 0 to 1: ``(n, 28, 28)``."""
        # One box more, which goes again: not every engine takes none.
        extra = boxes.new_tensor([[0.0, 0.0, 1.0, 1.0]])
        boxes = torch.cat([boxes, extra])
        labels, image_index = (torch.cat([part, part.new_zeros(1)]) for part in (labels, image_index))
        pooled = pooled_in_boxes(self.parts(maps)[0], self.strides, boxes, image_index, side=_MASK_SIDE)
        logits = self.roi_heads.mask_predictor(self.roi_heads.mask_head(pooled))
        places = (labels + 1)[:, None, None, None].expand(-1, 1, *logits.shape[2:])
        masks: Tensor = logits.gather(1, places)[:-1, 0].sigmoid()
        return masks

    def loss(self, maps: Sequence[Tensor], truth: Sequence[MaskedTruth]) -> Tensor:
        """The loss of what `forward` gave for the boxes ``(n, 4)``, labels ``(n,)`` and masks of each image.

        The sum of both stages' losses of classes and boxes and that of masks, as torchvision has them.

        Source: Mask R-CNN, section 3; Faster R-CNN, section 3.1.2.
        """
        pyramid, logits, deltas = self.parts(maps)
        # To torchvision, the class 0 is background.
        targets = [{"boxes": b, "labels": labels + 1, "masks": masks} for b, labels, masks in truth]
        anchors = [torch.cat(self._anchors(logits))] * len(truth)
        labels, matched = self.rpn.assign_targets_to_anchors(anchors, targets)
        wanted = self.rpn.box_coder.encode(matched, anchors)
        first = self.rpn.compute_loss(
            torch.cat([rows_of(map_, 1) for map_ in logits], 1).flatten(),
            torch.cat([rows_of(map_, 4) for map_ in deltas], 1).flatten(0, 1),
            labels,
            wanted,
        )
        # What is seen of an image here is its finest map; its last rows may be less than whole cells.
        height, width = (side * self.strides[0] for side in pyramid[0].shape[-2:])
        with torch.no_grad():
            boxes, image_index = self.propose(maps, (height, width))
        proposals = [boxes[image_index == index] for index in range(len(truth))]
        second = self._second_loss(pyramid, proposals, [(height, width)] * len(truth), targets)
        return sum([*first, *second.values()], pyramid[0].new_zeros(()))

    def _second_loss(self, pyramid: Sequence[Tensor], *arguments: Any) -> dict[str, Tensor]:
        """torchvision's losses, which it computes in training mode alone; nothing else in it knows the mode."""
        mode = self.roi_heads.training
        self.roi_heads.training = True
        try:
            maps = {str(level): map_ for level, map_ in enumerate(pyramid)}
            _, losses = self.roi_heads(maps, *arguments)
        finally:
            self.roi_heads.training = mode
        found: dict[str, Tensor] = losses
        return found


def _second_stage(channels: int, hidden: int, classes: int) -> RoIHeads:
    """torchvision's heads with its settings; ``classes`` counts the background."""
    names = ["0", "1", "2", "3"]
    return RoIHeads(
        MultiScaleRoIAlign(names, _BOX_SIDE, sampling_ratio=2),
        TwoMLPHead(channels * _BOX_SIDE**2, hidden),
        FastRCNNPredictor(hidden, classes),
        # Overlaps of boxes and of background, boxes an image and their share; what follows is for its own inference.
        *(0.5, 0.5, 512, 0.25, None, 0.05, 0.5, 100),
        mask_roi_pool=MultiScaleRoIAlign(names, _MASK_SIDE, sampling_ratio=2),
        mask_head=MaskRCNNHeads(channels, (channels,) * 4, 1),
        mask_predictor=MaskRCNNPredictor(channels, channels, classes),
    )
