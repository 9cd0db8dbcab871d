"""RepVGG: plain 3x3 networks trained as a sum of 3x3, 1x1 and identity branches."""

from dataclasses import dataclass
from typing import ClassVar

from timm.layers import make_divisible
from torch import nn

from refold.blocks import RepVGGBlock
from refold.models.classifier import ImageClassifier, check_arguments
from refold.models.layouts import CheckpointLayout


@dataclass(frozen=True)
class RepVGGTable:
    """A row of the family: blocks of the four stages, and the channels of the stem and the stages.

    ``groups`` divide the convolutions of every second block, ``squeeze_ratio`` gives squeeze-excite its
    width.
    """

    depths: tuple[int, int, int, int]
    channels: tuple[int, int, int, int, int]
    groups: int = 1
    squeeze_ratio: int | None = None


# The only form whose block stands for two layers.
_PAIRS = "residual"

_A = (2, 4, 14, 1)
_B = (4, 6, 16, 1)

NETWORKS = {
    "repvgg_a0": RepVGGTable(_A, (48, 48, 96, 192, 1280)),
    "repvgg_a1": RepVGGTable(_A, (64, 64, 128, 256, 1280)),
    "repvgg_a2": RepVGGTable(_A, (64, 96, 192, 384, 1408)),
    "repvgg_b0": RepVGGTable(_B, (64, 64, 128, 256, 1280)),
    "repvgg_b1": RepVGGTable(_B, (64, 128, 256, 512, 2048)),
    "repvgg_b1g2": RepVGGTable(_B, (64, 128, 256, 512, 2048), groups=2),
    "repvgg_b1g4": RepVGGTable(_B, (64, 128, 256, 512, 2048), groups=4),
    "repvgg_b2": RepVGGTable(_B, (64, 160, 320, 640, 2560)),
    "repvgg_b2g2": RepVGGTable(_B, (64, 160, 320, 640, 2560), groups=2),
    "repvgg_b2g4": RepVGGTable(_B, (64, 160, 320, 640, 2560), groups=4),
    "repvgg_b3": RepVGGTable(_B, (64, 192, 384, 768, 2560)),
    "repvgg_b3g2": RepVGGTable(_B, (64, 192, 384, 768, 2560), groups=2),
    "repvgg_b3g4": RepVGGTable(_B, (64, 192, 384, 768, 2560), groups=4),
    "repvgg_d2se": RepVGGTable((8, 14, 24, 1), (64, 160, 320, 640, 2560), squeeze_ratio=16),
}

_OFFICIAL = CheckpointLayout(
    "official RepVGG",
    (
        (r"^stage0\.", "stem."),
        *((rf"^stage{stage + 1}\.", f"stages.{stage}.") for stage in range(4)),
        (r"\.rbr_dense\.", ".conv.branches.0."),
        (r"\.rbr_1x1\.", ".conv.branches.1."),
        (r"\.rbr_identity\.", ".conv.skip."),
        (r"\.rbr_reparam\.", ".conv."),
        (r"\.se\.down\.", ".se.fc1."),
        (r"\.se\.up\.", ".se.fc2."),
        (r"^linear\.", "head.fc."),
    ),
)

_TIMM = CheckpointLayout(
    "timm RepVGG",
    (
        (r"\.conv_kxk\.", ".conv.branches.0."),
        (r"\.conv_1x1\.", ".conv.branches.1."),
        (r"\.identity\.", ".conv.skip."),
        (r"\.reparam_conv\.", ".conv."),
        (r"\.attn\.", ".se."),
    ),
)


class RepVGG(ImageClassifier):
    """A stem block and four stages of ``RepVGGBlock``, each resolution entered by a block of stride 2.

    ``reparameterization`` chooses what each block sums (figures 6 and 7), a name of
    ``refold.blocks.REPARAMETERIZATIONS``. ``"residual"`` makes a block of every two layers of a stage and leaves
    the stem and the last stage single layers without branches. ``width`` scales all channels, rounded to multiples of
    eight.
    Images ``(batch, in_chans, height, width)`` of any height and width to logits ``(batch, num_classes)``.
    Raises ``InputError`` where an argument cannot be used.

    Source: RepVGG report, section 3.2 and figure 3; the official code for depths and widths.
    """

    layouts = (_OFFICIAL, _TIMM)
    first_convs: ClassVar[tuple[str, ...]] = ("stem.conv.branches.0.conv", "stem.conv.branches.1.conv")

    def __init__(
        self,
        table: RepVGGTable,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        *,
        reparameterization: str = "full",
        width: float = 1.0,
    ) -> None:
        check_arguments(num_classes, in_chans, drop_rate, global_pool, width=width)
        pairs = reparameterization == _PAIRS
        single = "none" if pairs else reparameterization
        stem_channels, *stage_channels = (make_divisible(channels * width, 8) for channels in table.channels)
        stages: list[nn.Sequential] = []
        channels, index = stem_channels, 0
        for depth, out_channels in zip(table.depths, stage_channels, strict=True):
            blocks: list[nn.Module] = []
            end = index + depth
            while index < end:
                name, layers = (_PAIRS, 2) if pairs and index + 2 <= end else (single, 1)
                index += layers
                blocks.append(_block(table, channels, out_channels, index, 1 if blocks else 2, name))
                channels = out_channels
            stages.append(nn.Sequential(*blocks))
        super().__init__(
            stem=_block(table, in_chans, stem_channels, 0, 2, single),
            stages=stages,
            feature_channels={"stem": stem_channels}
            | {f"stages.{stage}": width for stage, width in enumerate(stage_channels)},
            num_classes=num_classes,
            in_chans=in_chans,
            drop_rate=drop_rate,
            global_pool=global_pool,
        )


def _block(
    table: RepVGGTable, in_channels: int, out_channels: int, index: int, stride: int, reparameterization: str
) -> RepVGGBlock:
    """The block whose last layer is at ``index``, from the stem's 0: groups sit at 2, 4, ... 26."""
    return RepVGGBlock(
        in_channels,
        out_channels,
        reparameterization,
        stride=stride,
        groups=table.groups if index in range(2, 27, 2) else 1,
        squeeze_channels=table.squeeze_ratio and out_channels // table.squeeze_ratio,
    )
