"""GhostNetV3: GhostNetV2 whose modules and strided convolutions are sums of branches in training."""

from functools import partial

from refold.blocks import GhostModule, RepeatedConvNorm
from refold.errors import InputError
from refold.models.ghostnet import CONCATENATED_RENAMES
from refold.models.ghostnetv2 import ATTENTION_RENAMES, GhostNetV2
from refold.models.layouts import CheckpointLayout

# The width of each network.
NETWORKS = {"ghostnetv3_050": 0.5, "ghostnetv3_100": 1.0, "ghostnetv3_130": 1.3, "ghostnetv3_160": 1.6}

# What the official code calls the three places with branches, and their names here.
_PLACES = {"primary": "primary", "cheap": "cheap", "dw": "depthwise"}


class GhostNetV3(GhostNetV2):
    """GhostNetV2's plan with ``RepeatedConvNorm`` for every module's convolutions and the strided ones.

    ``branches`` is the paper's N, the repeated convolutions with batch norm; ``pointwise`` adds a 1x1 depthwise
    branch beside the larger depthwise kernels, ``identity`` a batch norm where channels and stride allow it. One
    branch without the others is GhostNetV2.
    Images ``(batch, in_chans, height, width)`` of any height and width to logits ``(batch, num_classes)``.
    Raises ``InputError`` where an argument cannot be used.

    Source: GhostNetV3, section 4.1, figure 2b, tables 2 and 5.
    """

    def __init__(
        self,
        width: float,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.2,
        global_pool: str = "avg",
        *,
        branches: int = 3,
        pointwise: bool = True,
        identity: bool = True,
    ) -> None:
        if branches < 1:
            raise InputError(f"branches is {branches}; give the number of repeated convolutions, 1 or more.")
        conv = partial(RepeatedConvNorm, repeats=branches, pointwise=pointwise, skip=identity)
        super().__init__(
            width,
            num_classes,
            in_chans,
            drop_rate,
            global_pool,
            module=partial(GhostModule, conv=conv),
            conv=conv,
        )
        self.layouts = _layouts(branches)


def _layouts(branches: int) -> tuple[CheckpointLayout, ...]:
    """The names of both sources, which differ in the norms of branches; the 1x1 branch is the last one here."""
    renames = (
        *CONCATENATED_RENAMES,
        *ATTENTION_RENAMES,
        *(
            rename
            for place, name in _PLACES.items()
            for rename in (
                (rf"\.{place}_rpr_conv\.", f".{name}.conv.branches."),
                (rf"\.{place}_rpr_scale\.", f".{name}.conv.branches.{branches}."),
                (rf"\.{place}_rpr_skip\.", f".{name}.conv.skip."),
            )
        ),
    )
    timm_norm = (r"(\.conv\.branches\.\d+)\.bn1\.", r"\1.bn.")
    return CheckpointLayout("official GhostNetV3", renames), CheckpointLayout(
        "timm GhostNetV3", (*renames, timm_norm)
    )
