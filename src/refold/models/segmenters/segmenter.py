"""What all segmenters share: a backbone, a head on its maps, and scores at the size of the image."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from refold.models.backbone import Backbone


class Segmenter(nn.Module):
    """A ``head`` reads the maps of a ``backbone``, the finest first, and scores are resized to the image.

    Images ``(batch, in_chans, height, width)`` of any height and width give logits ``(batch, num_classes, height,
    width)``.
    """

    output_kind: ClassVar[str] = "segmentation"
    class_layers: ClassVar[tuple[str, ...]] = ("head.score",)

    def __init__(self, backbone: Backbone, head: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone = backbone
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        return resized(self.head(self.backbone(images)), images)


def resized(map_: Tensor, reference: Tensor) -> Tensor:
    """A map at the height and width of another tensor, linear between the values."""
    return F.interpolate(map_, size=reference.shape[-2:], mode="bilinear", align_corners=False)
