"""G-Ghost-RegNetX: RegNetX whose deeper stages are G-Ghost stages."""

from functools import partial
from itertools import pairwise
from typing import ClassVar, NamedTuple

from torch import nn

from refold.blocks import ConvNorm, ResidualBottleneck, gghost_stage
from refold.models.classifier import ImageClassifier, check_arguments
from refold.models.layouts import CheckpointLayout


class RegNetTable(NamedTuple):
    """The blocks and the channels of each stage, and the channels of a group.

    ``ghost`` False is RegNetX itself.
    """

    depths: tuple[int, int, int, int]
    channels: tuple[int, int, int, int]
    group_width: int
    ghost: bool = True


NETWORKS = {
    "gghost_regnetx_002": RegNetTable((1, 1, 4, 7), (24, 56, 152, 368), 8),
    "gghost_regnetx_004": RegNetTable((1, 2, 7, 12), (32, 64, 160, 384), 16),
    "gghost_regnetx_006": RegNetTable((1, 3, 5, 7), (48, 96, 240, 528), 24),
    "gghost_regnetx_008": RegNetTable((1, 3, 7, 5), (64, 128, 288, 672), 16),
    "gghost_regnetx_016": RegNetTable((2, 4, 10, 2), (72, 168, 408, 912), 24),
    "gghost_regnetx_032": RegNetTable((2, 6, 15, 2), (96, 192, 432, 1008), 48),
    "gghost_regnetx_040": RegNetTable((2, 5, 14, 2), (80, 240, 560, 1360), 40),
    "gghost_regnetx_064": RegNetTable((2, 4, 10, 1), (168, 392, 784, 1624), 56),
    "gghost_regnetx_080": RegNetTable((2, 5, 15, 1), (80, 240, 720, 1920), 120),
    "gghost_regnetx_120": RegNetTable((2, 5, 11, 1), (224, 448, 896, 2240), 112),
    "gghost_regnetx_160": RegNetTable((2, 6, 13, 1), (256, 512, 896, 2048), 128),
    "gghost_regnetx_320": RegNetTable((2, 7, 13, 1), (336, 672, 1344, 2520), 168),
    # What the papers compare with at three quarters of the width; timm has the others.
    "regnetx_032_075": RegNetTable((2, 6, 15, 2), (72, 144, 324, 756), 36, ghost=False),
}

_STEM_CHANNELS = 32
# Those of the official code: half of the channels stay, in groups narrowed to three quarters.
_THIN_GROUPS, _THIN_CHANNELS = 0.75, 0.5

_OFFICIAL = CheckpointLayout(
    "official G-Ghost-RegNetX",
    (
        (r"^conv1\.", "stem.conv."),
        (r"^bn1\.", "stem.bn."),
        *((rf"^layer{stage + 1}\.", f"stages.{stage}.") for stage in range(4)),
        (r"^(stages\.\d)\.(base|end|merge|cheap|layers)\.", r"\1.0.\2."),
        (r"\.layers\.(\d+)\.", r".thin.\1."),
        (r"\.merge\.1\.", ".mix.layers.0.conv."),
        (r"\.merge\.2\.", ".mix.layers.0.bn."),
        (r"\.merge\.4\.", ".mix.layers.1.conv."),
        (r"\.merge\.5\.", ".mix.layers.1.bn."),
        (r"\.cheap\.0\.", ".cheap.conv."),
        (r"\.cheap\.1\.", ".cheap.bn."),
        (r"\.downsample\.0\.", ".shortcut.conv."),
        (r"\.downsample\.1\.", ".shortcut.bn."),
        (r"\.conv(\d)\.", r".conv\1.conv."),
        (r"\.bn(\d)\.", r".conv\1.bn."),
        (r"^fc\.", "head.fc."),
    ),
)


class GGhostRegNet(ImageClassifier):
    """RegNetX with a G-Ghost stage for every stage of more than two blocks, or RegNetX as it is.

    The thin path and the cheap 1x1 convolution read different channels of the first block, and the last block has
    all channels. ``mix=False`` leaves the averages of the other blocks out of the ghost channels; with them, training
    needs more than one image a batch.
    Images ``(batch, in_chans, height, width)`` of any height and width to logits ``(batch, num_classes)``.
    Raises ``InputError`` where an argument cannot be used.

    Source: GhostNets on Heterogeneous Devices, section 5.3.4 and tables 17 and 18; the official code.
    """

    layouts = (_OFFICIAL,)
    first_convs: ClassVar[tuple[str, ...]] = ("stem.conv",)

    def __init__(
        self,
        table: RegNetTable,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.2,
        global_pool: str = "avg",
        *,
        mix: bool = True,
    ) -> None:
        check_arguments(num_classes, in_chans, drop_rate, global_pool)
        stages, channels = [], _STEM_CHANNELS
        features = {"stem": channels}
        for stage, (depth, out_channels) in enumerate(zip(table.depths, table.channels, strict=True)):
            build = partial(_stage, mix=mix) if table.ghost else _plain_stage
            stages.append(build(channels, out_channels, depth, table.group_width))
            channels = out_channels
            features[f"stages.{stage}"] = channels
        super().__init__(
            stem=ConvNorm(in_chans, _STEM_CHANNELS, 3, stride=2, activation=True),
            stages=stages,
            feature_channels=features,
            num_classes=num_classes,
            in_chans=in_chans,
            drop_rate=drop_rate,
            global_pool=global_pool,
        )
        self.apply(initialise)


def _stage(in_channels: int, channels: int, depth: int, group_width: int, *, mix: bool) -> nn.Sequential:
    thin_width = int(group_width * _THIN_GROUPS)
    thin_channels = int(channels * _THIN_CHANNELS / thin_width) * thin_width
    return gghost_stage(
        partial(ResidualBottleneck, groups=channels // min(channels, group_width)),
        in_channels,
        channels,
        depth,
        stride=2,
        thin_channels=thin_channels,
        thin_block=partial(ResidualBottleneck, groups=thin_channels // thin_width),
        mix=2 if mix else 0,
        split=True,
    )


def _plain_stage(in_channels: int, channels: int, depth: int, group_width: int) -> nn.Sequential:
    groups = channels // min(channels, group_width)
    widths = [in_channels] + [channels] * depth
    return nn.Sequential(
        *(
            ResidualBottleneck(before, after, stride=1 if index else 2, groups=groups)
            for index, (before, after) in enumerate(pairwise(widths))
        )
    )


def initialise(module: nn.Module) -> None:
    """Draw the weights of a convolution as the official code of G-Ghost does: He et al.'s normal, by its outputs."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
