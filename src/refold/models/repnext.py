"""RepNeXt: ConvNeXt's plan with re-parameterizable units and an activation on every shortcut."""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
from timm.layers import calculate_drop_path_rates, trunc_normal_
from torch import nn

from refold.blocks import ConvNorm, RepNeXtBlock, RepUnit1, RepUnit2, RepUnit3
from refold.errors import InputError
from refold.models.classifier import ImageClassifier, check_arguments
from refold.models.layouts import CheckpointLayout


class RepNeXtTable(NamedTuple):
    """A row of the family: the unit, and the blocks and channels of the four stages."""

    unit: Callable[[int], nn.Module]
    depths: tuple[int, ...]
    channels: tuple[int, ...]


_TINY = (3, 3, 9, 3), (96, 192, 384, 768)
_SMALL = (3, 3, 27, 3), (96, 192, 384, 768)
_BASE = (3, 3, 27, 3), (128, 256, 512, 1024)

# Three does not divide the channels of the base network, so that it has no RepUnit1.
NETWORKS = {
    "repnext_u1_t": RepNeXtTable(RepUnit1, *_TINY),
    "repnext_u1_s": RepNeXtTable(RepUnit1, *_SMALL),
    "repnext_u2_t": RepNeXtTable(RepUnit2, *_TINY),
    "repnext_u2_s": RepNeXtTable(RepUnit2, *_SMALL),
    "repnext_u2_b": RepNeXtTable(RepUnit2, *_BASE),
    "repnext_u3_t": RepNeXtTable(RepUnit3, *_TINY),
    "repnext_u3_s": RepNeXtTable(RepUnit3, *_SMALL),
    "repnext_u3_b": RepNeXtTable(RepUnit3, *_BASE),
}

Unit = Literal["u1", "u2", "u3", "single"]

# The single convolution is that of the ablation (table 5, Shortcut-act), with the epsilon of the units.
UNITS: Mapping[Unit, Callable[[int], nn.Module]] = {
    "u1": RepUnit1,
    "u2": RepUnit2,
    "u3": RepUnit3,
    "single": lambda channels: ConvNorm(channels, channels, 7, groups=channels, eps=1e-6),
}

_STAGES = 4
_DEEPEST = 27

_OFFICIAL = CheckpointLayout(
    "official RepNeXt",
    (
        # In plain form what lies between two stages is a convolution alone.
        (r"^downsample_layers\.([123])\.(?=weight|bias)", r"downsample_layers.\1.1."),
        (r"^downsample_layers\.0\.0\.", "stem.conv."),
        (r"^downsample_layers\.0\.1\.", "stem.bn."),
        # From the second stage on the downsampling counts here as the first block; from the last block down,
        # so that no name is moved twice.
        *(
            (rf"^stages\.{stage}\.{block}\.(?=feature|pwconv)", f"stages.{stage}.{block + 1}.")
            for stage in (1, 2, 3)
            for block in reversed(range(_DEEPEST))
        ),
        (r"^downsample_layers\.(\d)\.", r"stages.\1.0."),
        *(
            (rf"\.feature\.{name}{branch + 1}\.", f".unit.branches.{branch}.{part}.")
            for branch in range(3)
            for name, part in (("dwconv", "conv"), ("norm", "bn"))
        ),
        (r"\.feature\.conv_repara\.", ".unit."),
        (r"\.pwconv1\.", ".expand."),
        (r"\.pwconv2\.", ".project."),
        (r"^head\.2\.", "head.fc."),
    ),
    # What each unit will be folded into lies idle beside its branches.
    unused=(r"\.feature\.conv_repara\.", r"\.feature\.dwconv1\."),
)

# Where the batch norms between the stages are taken out of their containers and not replaced.
_OFFICIAL_PLAIN = CheckpointLayout(
    "official plain RepNeXt",
    ((r"^downsample_layers\.([123])\.0\.", r"downsample_layers.\1.1."), *_OFFICIAL.renames),
)


class RepNeXt(ImageClassifier):
    """A 4x4 stem of stride 4 and four stages of ``RepNeXtBlock``, between them a batch norm and a 2x2 convolution.

    ``drop_path_rate`` rises linearly from 0 in the first block to its value in the last. ``unit``, ``depths`` and
    ``channels``, of the four stages each, take the place of the table's: ``unit`` is "u1", "u2", "u3" or "single", one
    7x7 depthwise convolution.
    Images ``(batch, in_chans, height, width)`` of at least 32 pixels to logits ``(batch, num_classes)``; what
    exceeds a multiple of 32 is cut off by the strided convolutions.
    Raises ``InputError`` where an argument cannot be used.

    Source: RepNeXt, section 3.3 and table 1.
    """

    layouts = (_OFFICIAL, _OFFICIAL_PLAIN)
    first_convs: ClassVar[tuple[str, ...]] = ("stem.conv",)
    feature_strides: ClassVar[tuple[int, ...]] = (4, 8, 16, 32)

    def __init__(
        self,
        table: RepNeXtTable,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        drop_path_rate: float = 0.0,
        *,
        unit: Unit | None = None,
        depths: Sequence[int] | None = None,
        channels: Sequence[int] | None = None,
    ) -> None:
        check_arguments(num_classes, in_chans, drop_rate, global_pool, drop_path_rate)
        table = _table(table, unit, depths, channels)
        channels = table.channels
        stages = []
        for stage, rates in enumerate(
            calculate_drop_path_rates(drop_path_rate, table.depths, stagewise=True)
        ):
            blocks: list[nn.Module] = [
                RepNeXtBlock(channels[stage], table.unit, drop_path_rate=rate) for rate in rates
            ]
            if stage:
                blocks.insert(0, _downsampling(channels[stage - 1], channels[stage]))
            stages.append(nn.Sequential(*blocks))
        super().__init__(
            stem=ConvNorm(in_chans, channels[0], 4, stride=4, padding=0),
            stages=stages,
            feature_channels={f"stages.{stage}": width for stage, width in enumerate(channels)},
            num_classes=num_classes,
            in_chans=in_chans,
            drop_rate=drop_rate,
            global_pool=global_pool,
        )
        self.apply(_initialise)


def _table(
    table: RepNeXtTable, unit: Unit | None, depths: Sequence[int] | None, channels: Sequence[int] | None
) -> RepNeXtTable:
    """The table with what was given in place of its own."""
    if unit is not None and unit not in UNITS:
        raise InputError(f"The unit is {unit!r}; choose from {', '.join(map(repr, UNITS))}.")
    for name, given in (("depths", depths), ("channels", channels)):
        if given is not None and (
            len(given) != _STAGES or not all(isinstance(each, int) and each > 0 for each in given)
        ):
            raise InputError(f"The {name} are {given!r}; give four positive numbers, one for each stage.")
    return RepNeXtTable(
        table.unit if unit is None else UNITS[unit],
        tuple(depths or table.depths),
        tuple(channels or table.channels),
    )


def _downsampling(in_channels: int, out_channels: int) -> nn.Sequential:
    """Half the height and width; without padding, so that the batch norm in front folds exactly."""
    return nn.Sequential(nn.BatchNorm2d(in_channels), nn.Conv2d(in_channels, out_channels, 2, stride=2))


@torch.no_grad()
def _initialise(module: nn.Module) -> None:
    """As the official code: weights from a normal distribution of deviation 0.02, biases 0."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
