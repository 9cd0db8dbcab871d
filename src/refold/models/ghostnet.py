"""GhostNet: bottlenecks of ghost modules on the plan of MobileNetV3-Large, shared by the whole family."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import ClassVar, NamedTuple

from timm.layers import make_divisible
from torch import nn

from refold.blocks import ConvFactory, ConvNorm, GhostBottleneck, GhostModule, GhostModuleFactory
from refold.models.classifier import ExpandedHead, ImageClassifier, check_arguments
from refold.models.layouts import CheckpointLayout


class GhostRow(NamedTuple):
    """A bottleneck at width 1; the kernel is that of its strided and its shortcut convolution.

    ``stage`` counts the resolutions; ``official`` is the place in the official code, which groups otherwise.
    """

    official: str
    stage: int
    kernel_size: int
    mid_channels: int
    out_channels: int
    squeeze: bool
    stride: int
    attention: bool = False


GHOST_ROWS = (
    GhostRow("0.0", 0, 3, 16, 16, False, 1),
    GhostRow("1.0", 1, 3, 48, 24, False, 2),
    GhostRow("2.0", 1, 3, 72, 24, False, 1),
    GhostRow("3.0", 2, 5, 72, 40, True, 2),
    GhostRow("4.0", 2, 5, 120, 40, True, 1),
    GhostRow("5.0", 3, 3, 240, 80, False, 2),
    GhostRow("6.0", 3, 3, 200, 80, False, 1),
    GhostRow("6.1", 3, 3, 184, 80, False, 1),
    GhostRow("6.2", 3, 3, 184, 80, False, 1),
    GhostRow("6.3", 3, 3, 480, 112, True, 1),
    GhostRow("6.4", 3, 3, 672, 112, True, 1),
    GhostRow("7.0", 4, 5, 672, 160, True, 2),
    GhostRow("8.0", 4, 5, 960, 160, False, 1),
    GhostRow("8.1", 4, 5, 960, 160, True, 1),
    GhostRow("8.2", 4, 5, 960, 160, False, 1),
    GhostRow("8.3", 4, 5, 960, 160, True, 1),
)

# The width of each network.
NETWORKS = {
    "ghostnet_050": 0.5,
    "ghostnet_100": 1.0,
    "ghostnet_110": 1.1,
    "ghostnet_130": 1.3,
    "ghostnet_170": 1.7,
}

GHOST_RENAMES = (
    (r"^conv_stem\.", "stem.conv."),
    (r"^bn1\.", "stem.bn."),
    *(
        (rf"^blocks\.{re.escape(row.official)}\.", f"stages.{stage}.{block}.")
        for stage, rows in groupby(GHOST_ROWS, key=lambda row: row.stage)
        for block, row in enumerate(rows)
    ),
    (r"^blocks\.9\.0\.conv\.", "final_conv.conv."),
    (r"^blocks\.9\.0\.bn1\.", "final_conv.bn."),
    (r"\.primary_conv\.0\.", ".primary.conv."),
    (r"\.primary_conv\.1\.", ".primary.bn."),
    (r"\.conv_dw\.", ".depthwise.conv."),
    (r"\.bn_dw\.", ".depthwise.bn."),
    (r"\.se\.conv_reduce\.", ".se.fc1."),
    (r"\.se\.conv_expand\.", ".se.fc2."),
    (r"\.shortcut\.0\.", ".shortcut.0.conv."),
    (r"\.shortcut\.1\.", ".shortcut.0.bn."),
    (r"\.shortcut\.2\.", ".shortcut.1.conv."),
    (r"\.shortcut\.3\.", ".shortcut.1.bn."),
    (r"^conv_head\.", "head.conv."),
    (r"^classifier\.", "head.fc."),
)

CONCATENATED_RENAMES = (
    *GHOST_RENAMES,
    (r"\.cheap_operation\.0\.", ".cheap.conv."),
    (r"\.cheap_operation\.1\.", ".cheap.bn."),
)


class GhostNet(ImageClassifier):
    """A stem, sixteen ``GhostBottleneck`` in five resolutions and a 1x1 convolution, then ``ExpandedHead``.

    ``width`` scales the channels, rounded to multiples of four. A family member changes ``rows``,
    ``module`` and the channels before and behind the rows; those given here go before, and ``conv`` builds the
    bottlenecks' strided convolutions.
    ``identity_shortcuts=False`` leaves out the shortcuts that compute nothing. ``bottleneck`` builds something else
    in the place of ``GhostBottleneck``, from its input channels, its row and the width.
    Images ``(batch, in_chans, height, width)`` of any height and width to logits ``(batch, num_classes)``.
    Raises ``InputError`` where an argument cannot be used.

    Source: GhostNets on Heterogeneous Devices, table 1.
    """

    layouts: tuple[CheckpointLayout, ...] = (CheckpointLayout("official GhostNet", CONCATENATED_RENAMES),)
    first_convs: ClassVar[tuple[str, ...]] = ("stem.conv",)
    rows: ClassVar[Sequence[GhostRow]] = GHOST_ROWS
    module: ClassVar[GhostModuleFactory] = GhostModule
    stem_channels: ClassVar[int] = 16
    final_channels: ClassVar[int] = 960
    head_channels: ClassVar[int] = 1280

    def __init__(
        self,
        width: float,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.2,
        global_pool: str = "avg",
        *,
        identity_shortcuts: bool = True,
        module: GhostModuleFactory | None = None,
        conv: ConvFactory = ConvNorm,
        rows: Sequence[GhostRow] | None = None,
        bottleneck: Callable[[int, GhostRow, float], nn.Module] | None = None,
    ) -> None:
        check_arguments(num_classes, in_chans, drop_rate, global_pool, width=width)
        build = bottleneck or partial(
            _bottleneck, module=module or self.module, conv=conv, identity_shortcut=identity_shortcuts
        )
        stem_channels = channels = scaled(self.stem_channels, width)
        stages, features = [], {}
        for stage, members in groupby(rows or self.rows, key=lambda row: row.stage):
            blocks = []
            for row in members:
                blocks.append(build(channels, row, width))
                channels = scaled(row.out_channels, width)
            stages.append(nn.Sequential(*blocks))
            features[f"stages.{stage}"] = channels
        final_channels = scaled(self.final_channels, width)
        super().__init__(
            stem=ConvNorm(in_chans, stem_channels, 3, stride=2, activation=True),
            stages=stages,
            final_conv=ConvNorm(channels, final_channels, activation=True),
            head=ExpandedHead(
                final_channels, self.head_channels, num_classes, pool_type=global_pool, drop_rate=drop_rate
            ),
            feature_channels=features,
            num_features=final_channels,
            head_hidden_size=self.head_channels,
            num_classes=num_classes,
            in_chans=in_chans,
            drop_rate=drop_rate,
            global_pool=global_pool,
        )


def _bottleneck(
    in_channels: int,
    row: GhostRow,
    width: float,
    *,
    module: GhostModuleFactory,
    conv: ConvFactory,
    identity_shortcut: bool,
) -> GhostBottleneck:
    mid_channels = scaled(row.mid_channels, width)
    return GhostBottleneck(
        in_channels,
        mid_channels,
        scaled(row.out_channels, width),
        row.kernel_size,
        stride=row.stride,
        squeeze_channels=scaled(mid_channels, 0.25) if row.squeeze else None,
        module=module,
        attention=row.attention,
        identity_shortcut=identity_shortcut,
        conv=conv,
    )


def scaled(channels: int, width: float) -> int:
    """The channels of a network of this width: rounded to a multiple of four, by less than a tenth downwards."""
    rounded: int = make_divisible(channels * width, 4)
    return rounded
