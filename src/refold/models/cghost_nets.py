"""Net-A to Net-D, with which the GhostNets paper compares: GhostNet's plan with inverted residual bottlenecks."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

from torch import nn

from refold.blocks import InvertedBottleneck
from refold.models.ghostnet import GHOST_ROWS, GhostNet, GhostRow, scaled
from refold.models.layouts import CheckpointLayout


class InvertedNetTable(NamedTuple):
    """A row of table 9: the width, what differs from GhostNet's plan, and the image size it is meant for.

    ``squeeze_ratio`` is that of squeeze-excite to the middle channels, and ``squeeze_everywhere`` puts it into every
    bottleneck; each resolution has ``extra_blocks`` more, of the shape of its first one.
    """

    width: float
    squeeze_ratio: float = 1 / 8
    squeeze_everywhere: bool = False
    extra_blocks: int = 0
    image_size: int = 224


# The paper says what distinguishes the four, and their size; widths and squeeze ratios are those that meet it.
NETWORKS = {
    "cghost_net_a": InvertedNetTable(0.371, squeeze_ratio=3 / 8, squeeze_everywhere=True),
    "cghost_net_b": InvertedNetTable(0.48, image_size=192),
    "cghost_net_c": InvertedNetTable(0.344, extra_blocks=1),
    "cghost_net_d": InvertedNetTable(0.304, extra_blocks=2),
}


class InvertedNet(GhostNet):
    """GhostNet's plan with MobileNetV3's bottlenecks, wider with more squeeze-excite or small images, or deeper.

    ``width`` scales the channels, rounded to multiples of four; the row has one that meets the paper's size.
    Images ``(batch, in_chans, height, width)`` of any height and width to logits ``(batch, num_classes)``.
    Raises ``InputError`` where an argument cannot be used.

    Source: GhostNets on Heterogeneous Devices, table 9.
    """

    layouts: tuple[CheckpointLayout, ...] = ()

    @classmethod
    def preprocessing(cls, row: InvertedNetTable) -> Mapping[str, Any]:
        """The image size of the row."""
        return {"input_size": (3, row.image_size, row.image_size)}

    def __init__(
        self,
        table: InvertedNetTable,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.2,
        global_pool: str = "avg",
        *,
        width: float | None = None,
    ) -> None:
        super().__init__(
            table.width if width is None else width,
            num_classes,
            in_chans,
            drop_rate,
            global_pool,
            rows=_rows(table),
            bottleneck=partial(_inverted, squeeze_ratio=table.squeeze_ratio),
        )


def _rows(table: InvertedNetTable) -> Sequence[GhostRow]:
    rows: list[GhostRow] = []
    for _, (first, *others) in groupby(GHOST_ROWS, key=lambda row: row.stage):
        rows += [first, *[first._replace(stride=1)] * table.extra_blocks, *others]
    return [row._replace(squeeze=row.squeeze or table.squeeze_everywhere) for row in rows]


def _inverted(in_channels: int, row: GhostRow, width: float, *, squeeze_ratio: float) -> nn.Module:
    mid_channels = scaled(row.mid_channels, width)
    return InvertedBottleneck(
        in_channels,
        mid_channels,
        scaled(row.out_channels, width),
        middle=row.kernel_size,
        stride=row.stride,
        squeeze_channels=scaled(mid_channels, squeeze_ratio) if row.squeeze else None,
        expand=mid_channels != in_channels,
    )
