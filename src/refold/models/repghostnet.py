"""RepGhostNet: GhostNet whose concatenations became sums of branches."""

from functools import partial

from refold.blocks import RepGhostModule
from refold.models.ghostnet import GHOST_RENAMES, GHOST_ROWS, GhostNet
from refold.models.ghostnetv2 import with_attention
from refold.models.layouts import CheckpointLayout

# The width of each network.
NETWORKS = {
    "repghostnet_050": 0.5,
    "repghostnet_058": 0.58,
    "repghostnet_080": 0.8,
    "repghostnet_100": 1.0,
    "repghostnet_111": 1.11,
    "repghostnet_130": 1.3,
    "repghostnet_150": 1.5,
    "repghostnet_200": 2.0,
}
ATTENTION_NETWORKS = {"repghostnet_dfc_100": 1.0, "repghostnet_dfc_130": 1.3, "repghostnet_dfc_160": 1.6}

# Without a concatenation half of GhostNet's channels do between the modules, except in two blocks.
_MID_CHANNELS = (8, 24, 36, 36, 60, 120, 100, 120, 120, 240, 336, 336, 480, 480, 480, 480)

_LAYOUT = CheckpointLayout(
    "official RepGhostNet",
    (
        *GHOST_RENAMES,
        (r"\.cheap_operation\.0\.", ".cheap.branches.0.conv."),
        (r"\.cheap_operation\.1\.", ".cheap.branches.0.bn."),
        (r"\.cheap_operation\.", ".cheap."),
        (r"\.fusion_bn\.0\.", ".cheap.skip."),
    ),
)


class RepGhostNet(GhostNet):
    """GhostNet's plan with ``RepGhostModule`` in place of the ghost module.

    ``reparameterization`` chooses the branches that are summed with each module's depthwise convolution (table 7),
    ``identity_shortcuts=False`` leaves out the eleven shortcuts that compute nothing (table 8).
    Images ``(batch, in_chans, height, width)`` of any height and width to logits ``(batch, num_classes)``.
    Raises ``InputError`` where an argument cannot be used.

    Source: RepGhost, table 2.
    """

    layouts: tuple[CheckpointLayout, ...] = (_LAYOUT,)
    rows = tuple(
        row._replace(mid_channels=mid_channels)
        for row, mid_channels in zip(GHOST_ROWS, _MID_CHANNELS, strict=True)
    )

    def __init__(
        self,
        width: float,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.2,
        global_pool: str = "avg",
        *,
        reparameterization: str = "batch_norm",
        identity_shortcuts: bool = True,
    ) -> None:
        super().__init__(
            width,
            num_classes,
            in_chans,
            drop_rate,
            global_pool,
            identity_shortcuts=identity_shortcuts,
            module=partial(RepGhostModule, reparameterization=reparameterization),
        )


class RepGhostNetDFC(RepGhostNet):
    """RepGhostNet with GhostNetV2's attention on the first module of every block from the third on.

    Images ``(batch, in_chans, height, width)`` of any height and width to logits ``(batch, num_classes)``.
    Raises ``InputError`` where an argument cannot be used.

    Source: RepGhost, appendix B.3 and table 11.
    """

    layouts = ()
    rows = with_attention(RepGhostNet.rows)
