"""G-GhostNet: the plan of GhostNet with G-Ghost stages of ordinary convolutions, for GPUs."""

from typing import ClassVar, NamedTuple

from timm.layers import make_divisible
from torch import nn

from refold.blocks import ConvNorm, ResidualBottleneck, gghost_stage
from refold.models.classifier import ExpandedHead, ImageClassifier, check_arguments


class GGhostRow(NamedTuple):
    """A stage at width 1: its channels and the blocks of its thin path."""

    channels: int
    thin_depth: int


GGHOST_ROWS = (GGhostRow(24, 1), GGhostRow(40, 1), GGhostRow(80, 5), GGhostRow(160, 5))
_STEM_CHANNELS, _FINAL_CHANNELS, _HEAD_CHANNELS = 16, 960, 1280
_GHOST_RATIO, _EXPANSION, _SQUEEZE = 0.4, 3, 0.25

# The width of each network.
NETWORKS = {
    "gghostnet_050": 0.5,
    "gghostnet_075": 0.75,
    "gghostnet_100": 1.0,
    "gghostnet_125": 1.25,
    "gghostnet_150": 1.5,
}


class GGhostNet(ImageClassifier):
    """A stem, four G-Ghost stages of bottlenecks that expand three times, a 1x1 convolution, then ``ExpandedHead``.

    ``width`` scales the channels, rounded to multiples of four, as those of the thin paths are. ``mix=False`` leaves
    out what the averages of the blocks add to the ghost channels.
    Images ``(batch, in_chans, height, width)`` of any height and width to logits ``(batch, num_classes)``.
    Raises ``InputError`` where an argument cannot be used.

    Source: GhostNets on Heterogeneous Devices, section 4.4 and table 2.
    """

    first_convs: ClassVar[tuple[str, ...]] = ("stem.conv",)

    def __init__(
        self,
        width: float,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.2,
        global_pool: str = "avg",
        *,
        mix: bool = True,
    ) -> None:
        check_arguments(num_classes, in_chans, drop_rate, global_pool)
        stem_channels = channels = _rounded(_STEM_CHANNELS * width)
        stages, features = [], {"stem": channels}
        for stage, row in enumerate(GGHOST_ROWS):
            out_channels = _rounded(row.channels * width)
            stages.append(
                gghost_stage(
                    _block,
                    channels,
                    out_channels,
                    1 + row.thin_depth,
                    stride=2,
                    thin_channels=_rounded(out_channels * (1 - _GHOST_RATIO)),
                    end=False,
                    mix=int(mix),
                )
            )
            channels = out_channels
            features[f"stages.{stage}"] = channels
        final_channels = _rounded(_FINAL_CHANNELS * width)
        super().__init__(
            stem=ConvNorm(in_chans, stem_channels, 3, stride=2, activation=True),
            stages=stages,
            final_conv=ConvNorm(channels, final_channels, activation=True),
            head=ExpandedHead(
                final_channels, _HEAD_CHANNELS, num_classes, pool_type=global_pool, drop_rate=drop_rate
            ),
            feature_channels=features,
            num_features=final_channels,
            head_hidden_size=_HEAD_CHANNELS,
            num_classes=num_classes,
            in_chans=in_chans,
            drop_rate=drop_rate,
            global_pool=global_pool,
        )


def _block(in_channels: int, out_channels: int, *, stride: int = 1) -> nn.Module:
    mid_channels = _EXPANSION * in_channels
    return ResidualBottleneck(
        in_channels,
        out_channels,
        stride=stride,
        mid_channels=mid_channels,
        squeeze_channels=_rounded(mid_channels * _SQUEEZE),
        activation=False,
    )


def _rounded(channels: float) -> int:
    rounded: int = make_divisible(channels, 4)
    return rounded
