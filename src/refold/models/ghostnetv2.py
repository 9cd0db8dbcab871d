"""GhostNetV2: GhostNet with attention over long rows and columns in all blocks but the first two."""

from collections.abc import Sequence

from refold.models.ghostnet import CONCATENATED_RENAMES, GHOST_ROWS, GhostNet, GhostRow
from refold.models.layouts import CheckpointLayout

# The width of each network.
NETWORKS = {"ghostnetv2_050": 0.5, "ghostnetv2_100": 1.0, "ghostnetv2_130": 1.3, "ghostnetv2_160": 1.6}

ATTENTION_RENAMES = tuple(
    (rf"\.ghost1\.short_conv\.{2 * index + offset}\.", f".attention.{conv}.{part}.")
    for index, conv in enumerate(("pointwise", "horizontal", "vertical"))
    for offset, part in enumerate(("conv", "bn"))
)


def with_attention(rows: Sequence[GhostRow]) -> tuple[GhostRow, ...]:
    """The same bottlenecks, with attention in all but the first two."""
    return tuple(row._replace(attention=index >= 2) for index, row in enumerate(rows))


class GhostNetV2(GhostNet):
    """GhostNet's plan with ``DFCAttention`` on the first module of every block from the third on.

    Images ``(batch, in_chans, height, width)`` of any height and width to logits ``(batch, num_classes)``.
    Raises ``InputError`` where an argument cannot be used.

    Source: GhostNetV3, section 3 and figure 2a; the official code for the blocks with attention.
    """

    layouts: tuple[CheckpointLayout, ...] = (
        CheckpointLayout("official GhostNetV2", (*CONCATENATED_RENAMES, *ATTENTION_RENAMES)),
    )
    rows = with_attention(GHOST_ROWS)
