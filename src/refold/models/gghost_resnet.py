"""ResNet-34 and, for 32x32 images, ResNet-56, with G-Ghost stages."""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, NamedTuple

from timm.layers import make_divisible
from torch import nn

from refold.blocks import BasicBlock, Cheap, ConvNorm, gghost_stage, thin_width
from refold.models.classifier import CIFAR10, ImageClassifier, check_arguments
from refold.models.gghost_regnet import initialise


class GGhostResNetTable(NamedTuple):
    """The basic blocks and the channels of each stage; the stem has the channels of the first."""

    depths: tuple[int, ...]
    channels: tuple[int, ...]


NETWORKS = {"gghost_resnet34": GGhostResNetTable((3, 4, 6, 3), (64, 128, 256, 512))}
CIFAR_NETWORKS = {"gghost_resnet56": GGhostResNetTable((9, 9, 9), (16, 32, 64))}


class GGhostResNet(ImageClassifier):
    """ResNet of basic blocks whose stages are G-Ghost stages: the last block has all channels again.

    ``ghost_ratio`` is the share of channels that the cheap operation makes; 0 gives ResNet itself. ``cheap`` is
    ``1x1``, ``3x3`` or ``5x5`` for a convolution, ``identity`` for channels of the first block as they are, or
    ``none`` for a thin path that makes all channels at its end. ``mix=False`` leaves out what the averages of the
    blocks add to the ghost channels. ``width`` scales all channels, rounded to multiples of two.
    Images ``(batch, in_chans, height, width)`` of any height and width to logits ``(batch, num_classes)``.
    Raises ``InputError`` where an argument cannot be used.

    Source: GhostNets on Heterogeneous Devices, section 5.3.3 and table 15.
    """

    first_convs: ClassVar[tuple[str, ...]] = ("stem.conv",)
    small_images: ClassVar[bool] = False

    def __init__(
        self,
        table: GGhostResNetTable,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        *,
        ghost_ratio: float = 0.5,
        cheap: Cheap = "1x1",
        mix: bool = True,
        width: float = 1.0,
    ) -> None:
        check_arguments(num_classes, in_chans, drop_rate, global_pool, width=width)
        widths = [make_divisible(channels * width, 2) for channels in table.channels]
        stages, channels = [], widths[0]
        for stage, (depth, out_channels) in enumerate(zip(table.depths, widths, strict=True)):
            thin_channels = thin_width(out_channels, ghost_ratio)
            stages.append(
                gghost_stage(
                    partial(BasicBlock, projection=not self.small_images),
                    channels,
                    out_channels,
                    depth,
                    stride=2 if stage else 1,
                    thin_channels=thin_channels,
                    thin_block=partial(BasicBlock, projection=True),
                    cheap=cheap,
                    mix=int(mix),
                    split=not self.small_images,
                )
            )
            channels = out_channels
        features = {f"stages.{stage}": channels for stage, channels in enumerate(widths)}
        if not self.small_images:
            stages[0].insert(0, nn.MaxPool2d(3, stride=2, padding=1))
            features = {"stem": widths[0], **features}
        super().__init__(
            stem=self._stem(in_chans, widths[0]),
            stages=stages,
            feature_channels=features,
            num_classes=num_classes,
            in_chans=in_chans,
            drop_rate=drop_rate,
            global_pool=global_pool,
        )
        self.apply(initialise)

    def _stem(self, in_chans: int, channels: int) -> nn.Module:
        kernel_size, stride = (3, 1) if self.small_images else (7, 2)
        return ConvNorm(in_chans, channels, kernel_size, stride=stride, activation=True)


class GGhostCifarResNet(GGhostResNet):
    """The ResNet for 32x32 images: a stem of stride 1, three stages, shortcuts without parameters between them.

    The thin path and the cheap operation read all channels of the first block, the thin path through a block with a
    1x1 convolution as its shortcut. Arguments, shapes and errors are those of ``GGhostResNet``.

    Source: GhostNets on Heterogeneous Devices, section 5.3.1 and tables 11, 13 and 14.
    """

    small_images: ClassVar[bool] = True
    feature_strides: ClassVar[tuple[int, ...]] = (1, 2, 4)

    @classmethod
    def preprocessing(cls, row: Any) -> Mapping[str, Any]:
        return CIFAR10
