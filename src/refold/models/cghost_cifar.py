"""VGG-16 and ResNet-56 of ghost modules, for 32x32 images."""

from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

from timm.layers import make_divisible
from torch import nn

from refold.blocks import GhostModule, GhostModuleFactory, basic_stage
from refold.models.classifier import (
    CIFAR10,
    ExpandedHead,
    ImageClassifier,
    check_arguments,
)


class GhostVGGTable(NamedTuple):
    """The channels of every layer, by resolution; the ratio and the cheap kernel of the ghost modules."""

    channels: tuple[tuple[int, ...], ...]
    ratio: int = 2
    cheap_kernel_size: int = 3


class GhostCifarResNetTable(NamedTuple):
    """The basic blocks of each stage, their channels, and the ratio and the cheap kernel of the ghost modules."""

    depth: int
    channels: tuple[int, ...]
    ratio: int = 2
    cheap_kernel_size: int = 3


VGG_NETWORKS = {
    "cghost_vgg16": GhostVGGTable(((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3)),
}
# The paper says that its cheap kernels are 3x3, but only 1x1 meets its parameters and its cost.
RESNET_NETWORKS = {"cghost_resnet56": GhostCifarResNetTable(9, (16, 32, 64), cheap_kernel_size=1)}


class GhostVGG(ImageClassifier):
    """VGG of 3x3 ghost modules with max pooling between the resolutions, then a hidden layer and the classifier.

    ``ratio`` and ``cheap_kernel_size`` are those of the modules (tables 4 and 5); a ratio of 1 gives VGG itself, with
    batch norm. The hidden layer has as many neurons as the last module has channels.
    ``width`` scales all channels, rounded to multiples of eight.
    Images ``(batch, in_chans, height, width)`` of any height and width to logits ``(batch, num_classes)``.
    Raises ``InputError`` where an argument cannot be used.

    Source: GhostNets on Heterogeneous Devices, section 5.2.2.
    """

    first_convs: ClassVar[tuple[str, ...]] = ("stem.primary.conv",)
    feature_strides: ClassVar[tuple[int, ...]] = (1, 2, 4, 8, 16)

    @classmethod
    def preprocessing(cls, row: Any) -> Mapping[str, Any]:
        """Those of CIFAR-10."""
        return CIFAR10

    def __init__(
        self,
        table: GhostVGGTable,
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float = 0.5,
        global_pool: str = "avg",
        *,
        ratio: int | None = None,
        cheap_kernel_size: int | None = None,
        width: float = 1.0,
    ) -> None:
        check_arguments(num_classes, in_chans, drop_rate, global_pool, width=width)
        module = partial(_module(table, ratio, cheap_kernel_size), activation=True, kernel_size=3)
        (channels, *first), *others = (
            [make_divisible(channels * width, 8) for channels in stage] for stage in table.channels
        )
        stem = module(in_chans, channels)
        stages, features = [], {}
        for stage, widths in enumerate([first, *others]):
            layers: list[nn.Module] = [_pool()] if stage else []
            for out_channels in widths:
                layers.append(module(channels, out_channels))
                channels = out_channels
            stages.append(nn.Sequential(*layers))
            features[f"stages.{stage}"] = channels
        super().__init__(
            stem=stem,
            stages=stages,
            final_conv=_pool(),
            head=ExpandedHead(
                channels, channels, num_classes, pool_type=global_pool, drop_rate=drop_rate, norm=True
            ),
            feature_channels=features,
            num_classes=num_classes,
            in_chans=in_chans,
            drop_rate=drop_rate,
            global_pool=global_pool,
        )


class GhostCifarResNet(ImageClassifier):
    """ResNet's basic blocks of ghost modules at three resolutions, all shortcuts without parameters.

    ``ratio`` and ``cheap_kernel_size`` are those of the modules, the stem included; a ratio of 1 gives ResNet itself.
    ``width`` scales all channels, rounded to multiples of two.
    Images ``(batch, in_chans, height, width)`` of any height and width to logits ``(batch, num_classes)``.
    Raises ``InputError`` where an argument cannot be used.

    Source: GhostNets on Heterogeneous Devices, section 5.2.2 and table 6; He et al., Deep Residual Learning, section
    4.2.
    """

    first_convs: ClassVar[tuple[str, ...]] = ("stem.primary.conv",)
    feature_strides: ClassVar[tuple[int, ...]] = (1, 2, 4)

    @classmethod
    def preprocessing(cls, row: Any) -> Mapping[str, Any]:
        """Those of CIFAR-10."""
        return CIFAR10

    def __init__(
        self,
        table: GhostCifarResNetTable,
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        *,
        ratio: int | None = None,
        cheap_kernel_size: int | None = None,
        width: float = 1.0,
    ) -> None:
        check_arguments(num_classes, in_chans, drop_rate, global_pool, width=width)
        module = _module(table, ratio, cheap_kernel_size)
        channels = [make_divisible(channels * width, 2) for channels in table.channels]
        widths = [channels[0], *channels]
        stages = [
            basic_stage(
                in_channels,
                out_channels,
                table.depth,
                stride=2 if stage else 1,
                module=module,
            )
            for stage, (in_channels, out_channels) in enumerate(pairwise(widths))
        ]
        super().__init__(
            stem=module(in_chans, widths[0], activation=True, kernel_size=3),
            stages=stages,
            feature_channels={f"stages.{stage}": each for stage, each in enumerate(channels)},
            num_classes=num_classes,
            in_chans=in_chans,
            drop_rate=drop_rate,
            global_pool=global_pool,
        )


def _module(
    table: GhostVGGTable | GhostCifarResNetTable, ratio: int | None, cheap_kernel_size: int | None
) -> GhostModuleFactory:
    """What builds a ghost module with the given ratio and cheap kernel, or else with those of the row."""
    return partial(
        GhostModule,
        ratio=table.ratio if ratio is None else ratio,
        cheap_kernel_size=table.cheap_kernel_size if cheap_kernel_size is None else cheap_kernel_size,
    )


def _pool() -> nn.Module:
    # Odd sizes are rounded up, so that the smallest images have a map to the end.
    return nn.MaxPool2d(2, ceil_mode=True)
