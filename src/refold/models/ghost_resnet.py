"""ResNet-50 with ghost or RepGhost modules for the convolutions of its body."""

from functools import partial
from math import ceil
from typing import ClassVar, NamedTuple

from torch import nn

from refold.blocks import ConvNorm, GhostModule, GhostModuleFactory, GhostResidual, RepGhostModule
from refold.models.classifier import ImageClassifier, check_arguments


class GhostResNetTable(NamedTuple):
    """A row of the family: what stands for a convolution, and the factor of the body's channels."""

    module: GhostModuleFactory
    width: float = 1.0


# A RepGhost module gives no more channels than its 1x1 convolution computes; the whole body is narrower instead.
# The ratio that the paper prints as 1.4 is 1 / 0.7: only this meets its parameters and its cost.
NETWORKS = {
    "cghost_resnet50_s2": GhostResNetTable(partial(GhostModule, ratio=2)),
    "cghost_resnet50_s4": GhostResNetTable(partial(GhostModule, ratio=4)),
    "repghost_resnet50_s14": GhostResNetTable(RepGhostModule, 0.7),
    "repghost_resnet50_s2": GhostResNetTable(RepGhostModule, 0.5),
}

_STEM_CHANNELS = 64
_DEPTHS, _CHANNELS, _EXPANSION = (3, 4, 6, 3), (64, 128, 256, 512), 4


class GhostResNet(ImageClassifier):
    """ResNet-50's stem and four stages of ``GhostResidual``.

    Images ``(batch, in_chans, height, width)`` of any height and width to logits ``(batch, num_classes)``.
    Raises ``InputError`` where an argument cannot be used.

    Source: GhostNets on Heterogeneous Devices, table 7; RepGhost, appendix B.4 and table 12.
    """

    first_convs: ClassVar[tuple[str, ...]] = ("stem.conv",)

    def __init__(
        self,
        table: GhostResNetTable,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        check_arguments(num_classes, in_chans, drop_rate, global_pool)
        stages, channels = [], _STEM_CHANNELS
        features = {"stem": channels}
        for stage, (depth, planes) in enumerate(zip(_DEPTHS, _CHANNELS, strict=True)):
            mid_channels = ceil(planes * table.width)
            out_channels = ceil(planes * _EXPANSION * table.width)
            blocks: list[nn.Module] = [] if stage else [nn.MaxPool2d(3, stride=2, padding=1)]
            for block in range(depth):
                stride = 2 if stage and not block else 1
                blocks.append(
                    GhostResidual(channels, mid_channels, out_channels, stride=stride, module=table.module)
                )
                channels = out_channels
            stages.append(nn.Sequential(*blocks))
            features[f"stages.{stage}"] = channels
        super().__init__(
            stem=ConvNorm(in_chans, _STEM_CHANNELS, 7, stride=2, activation=True),
            stages=stages,
            feature_channels=features,
            num_classes=num_classes,
            in_chans=in_chans,
            drop_rate=drop_rate,
            global_pool=global_pool,
        )
