"""MobileOne: depthwise and 1x1 convolutions in turn, each trained as a sum of branches."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import nn

from refold.blocks import BranchSum, RepVGGBlock, repeated_kernels
from refold.models.classifier import ImageClassifier, check_arguments
from refold.models.layouts import CheckpointLayout


@dataclass(frozen=True)
class MobileOneTable:
    """A row of the family: the channels of the stem and the four stages, and the branches of a kernel.

    ``squeezed`` counts the last units of each stage that have squeeze-excite.
    """

    channels: tuple[int, int, int, int, int]
    branches: int = 1
    squeezed: tuple[int, int, int, int] = (0, 0, 0, 0)


NETWORKS = {
    "mobileone_s0": MobileOneTable((48, 48, 128, 256, 1024), branches=4),
    "mobileone_s1": MobileOneTable((64, 96, 192, 512, 1280)),
    "mobileone_s2": MobileOneTable((64, 96, 256, 640, 2048)),
    "mobileone_s3": MobileOneTable((64, 128, 320, 768, 2048)),
    "mobileone_s4": MobileOneTable((64, 192, 448, 896, 2048), squeezed=(0, 0, 5, 1)),
}

# Units of each stage; a unit is a depthwise 3x3 and a 1x1 block.
_DEPTHS = (2, 8, 10, 1)
_SQUEEZE_RATIO = 16


class MobileOne(ImageClassifier):
    """A stem and four stages of depthwise 3x3 and 1x1 blocks in turn, each stage entered with stride 2.

    Each block is ``RepVGGBlock`` with its kernel repeated, a 1x1 branch beside the 3x3 ones and a batch norm as
    skip.
    Images ``(batch, in_chans, height, width)`` of any height and width to logits ``(batch, num_classes)``.
    Raises ``InputError`` where an argument cannot be used.

    Source: the official code of MobileOne; GhostNetV3, table 9, for the sizes.
    """

    first_convs: ClassVar[tuple[str, ...]] = ("stem.conv.branches.0.conv", "stem.conv.branches.1.conv")

    def __init__(
        self,
        table: MobileOneTable,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        check_arguments(num_classes, in_chans, drop_rate, global_pool)
        stem_channels, *stage_channels = table.channels
        stages: list[nn.Sequential] = []
        channels = stem_channels
        for depth, out_channels, squeezed in zip(_DEPTHS, stage_channels, table.squeezed, strict=True):
            blocks: list[nn.Module] = []
            for unit in range(depth):
                squeeze = unit >= depth - squeezed
                blocks += _unit(
                    channels, out_channels, table.branches, stride=1 if unit else 2, squeeze=squeeze
                )
                channels = out_channels
            stages.append(nn.Sequential(*blocks))
        super().__init__(
            stem=RepVGGBlock(in_chans, stem_channels, stride=2),
            stages=stages,
            feature_channels={"stem": stem_channels}
            | {f"stages.{stage}": width for stage, width in enumerate(stage_channels)},
            num_classes=num_classes,
            in_chans=in_chans,
            drop_rate=drop_rate,
            global_pool=global_pool,
        )
        self.layouts = _layouts(table)


def _unit(
    in_channels: int, out_channels: int, branches: int, *, stride: int, squeeze: bool
) -> tuple[RepVGGBlock, RepVGGBlock]:
    def block(kernel_size: int, width: int, stride: int, groups: int) -> RepVGGBlock:
        return RepVGGBlock(
            in_channels,
            width,
            partial(BranchSum, kernel_sizes=repeated_kernels(kernel_size, branches)),
            stride=stride,
            groups=groups,
            squeeze_channels=width // _SQUEEZE_RATIO if squeeze else None,
        )

    return block(3, in_channels, stride, in_channels), block(1, out_channels, 1, 1)


def _layouts(table: MobileOneTable) -> tuple[CheckpointLayout, ...]:
    """The names of both sources; the 1x1 branch is the last one here, after the only one of the stem.

    In plain form a sum of branches is one convolution, but the only branch of a block without skip stays where it is.
    """
    widths = zip(table.channels, table.channels[1:], strict=False)
    single = [
        stage for stage, (before, after) in enumerate(widths) if table.branches == 1 and before != after
    ]
    official = (
        (r"^stage0\.", "stem."),
        *((rf"^stage{stage + 1}\.", f"stages.{stage}.") for stage in range(4)),
        (r"\.rbr_conv\.", ".conv_kxk."),
        (r"\.rbr_scale\.", ".conv_scale."),
        (r"\.rbr_skip\.", ".identity."),
        (r"\.se\.reduce\.", ".attn.fc1."),
        (r"\.se\.expand\.", ".attn.fc2."),
        (r"^linear\.", "head.fc."),
    )
    timm = (
        (r"\.conv_kxk\.", ".conv.branches."),
        (r"^stem\.conv_scale\.", "stem.conv.branches.1."),
        (r"\.conv_scale\.", f".conv.branches.{table.branches}."),
        (r"\.identity\.", ".conv.skip."),
        *(
            (rf"^stages\.{stage}\.1\.reparam_conv\.", f"stages.{stage}.1.conv.branches.0.conv.")
            for stage in single
        ),
        (r"\.reparam_conv\.", ".conv."),
        (r"\.attn\.", ".se."),
    )
    return CheckpointLayout("timm MobileOne", timm), CheckpointLayout(
        "official MobileOne", (*official, *timm)
    )
