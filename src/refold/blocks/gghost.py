"""The G-Ghost stage: most blocks of a stage narrowed, the missing channels made from its first block."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from refold.blocks.branches import ConvNorm
from refold.errors import InputError

Cheap = Literal["1x1", "3x3", "5x5", "identity", "none"]
"""What makes the ghost channels from the first block: a convolution, nothing, or not even that."""

_KERNELS = {"1x1": 1, "3x3": 3, "5x5": 5}
_CHEAP = (*_KERNELS, "identity", "none")


class GGhostStage(nn.Module):
    """A first block, narrow blocks beside a cheap operation that both read it, and a last block on both.

    The blocks are given: ``base`` has ``channels`` output channels, each block of ``thin`` has
    ``thin_channels``, and ``end``, if there is one, reads the concatenation of the thin path and of the ghost
    channels that make up the difference. With ``split`` the thin path reads the first ``thin_channels`` channels
    of the first block and the cheap operation reads the others; without it both read them all.

    ``cheap`` is a convolution with batch norm, ``identity`` for the last channels of the first block as they are, or
    ``none``: then the last thin block gives all ``channels`` itself. ``mix`` adds a vector to the
    ghost channels, computed by ``GGhostMix`` from the outputs of all blocks before the last: 0 for none, or its number
    of layers. ReLU activates the ghost channels.
    Maps ``base``'s input to ``(batch, channels, height, width)`` of ``base``'s or ``end``'s output.
    Raises ``InputError`` for another ``cheap`` or ``mix``, or where no thin or no ghost channel is left.

    Source: GhostNets on Heterogeneous Devices, sections 4.1 and 4.2, eq. 8 to 12, table 13.
    """

    def __init__(
        self,
        base: nn.Module,
        thin: Sequence[nn.Module],
        end: nn.Module | None = None,
        *,
        channels: int,
        thin_channels: int,
        cheap: Cheap = "1x1",
        mix: int = 1,
        split: bool = False,
    ) -> None:
        super().__init__()
        check_cheap(cheap)
        if not 0 < thin_channels < channels:
            raise InputError(
                f"thin_channels is {thin_channels} of {channels} channels; "
                "give at least one less than all of them, and at least one."
            )
        ghost_channels = channels - thin_channels
        self.thin_channels, self.ghost_channels, self.split = thin_channels, ghost_channels, split
        self.base = base
        self.thin = nn.ModuleList(thin)
        self.cheap: nn.Module | None = nn.Identity() if cheap == "identity" else None
        if cheap in _KERNELS:
            self.cheap = ConvNorm(ghost_channels if split else channels, ghost_channels, _KERNELS[cheap])
        # Without a convolution only as many channels as are missing can be taken over.
        self.cheap_reads_last = split or cheap == "identity"
        self.mix: nn.Module | None = None
        if mix:
            mixed_channels = channels + thin_channels * len(thin) + (ghost_channels if cheap == "none" else 0)
            self.mix = GGhostMix(mixed_channels, ghost_channels, layers=mix)
        self.act = nn.ReLU()
        self.end = nn.Identity() if end is None else end

    def forward(self, x: Tensor) -> Tensor:
        base = self.base(x)
        outputs = [base]
        narrow = base[:, : self.thin_channels] if self.split else base
        for block in self.thin:
            narrow = block(narrow)
            outputs.append(narrow)
        if self.cheap is not None:
            ghost = self.cheap(base[:, -self.ghost_channels :] if self.cheap_reads_last else base)
        else:
            narrow, ghost = narrow[:, : self.thin_channels], narrow[:, self.thin_channels :]
        if self.mix is not None:
            ghost = ghost + self.mix(outputs)
        out: Tensor = self.end(torch.cat([narrow, self.act(ghost)], dim=1))
        return out


class GGhostMix(nn.Module):
    """Global averages of several maps, together, and fully connected layers on them.

    One layer is an affine map; two have batch norms and a ReLU in between, and need more than one image a batch in
    training.
    Maps a list of ``(batch, any channels, height, width)``, ``in_channels`` in all, to ``(batch, out_channels, 1,
    1)``. Raises ``InputError`` for another number of layers.

    Source: GhostNets on Heterogeneous Devices, eq. 12, for one layer; the official code of G-Ghost-RegNetX for two.
    """

    def __init__(self, in_channels: int, out_channels: int, *, layers: int = 1) -> None:
        super().__init__()
        if layers not in (1, 2):
            raise InputError(
                f"mix has {layers} layers; give 1 for the paper's, 2 for the official code's, or 0 to leave it out."
            )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.layers: nn.Module = nn.Conv2d(in_channels, out_channels, 1)
        if layers == 2:
            self.layers = nn.Sequential(
                ConvNorm(in_channels, out_channels, activation=True), ConvNorm(out_channels, out_channels)
            )

    def forward(self, maps: list[Tensor]) -> Tensor:
        # Averages first: the maps themselves need not be copied together.
        out: Tensor = self.layers(torch.cat([self.pool(x) for x in maps], dim=1))
        return out


class BlockFactory(Protocol):
    """Whatever builds a block from its channels and its stride."""

    def __call__(self, in_channels: int, out_channels: int, *, stride: int = 1) -> nn.Module: ...


def gghost_stage(
    block: BlockFactory,
    in_channels: int,
    channels: int,
    depth: int,
    *,
    stride: int,
    thin_channels: int,
    thin_block: BlockFactory | None = None,
    end: bool = True,
    cheap: Cheap = "1x1",
    mix: int = 1,
    split: bool = False,
) -> nn.Sequential:
    """A stage of ``depth`` blocks as a ``GGhostStage``, or as it is where it has no thin block or no ghost channels.

    ``block`` builds the first block and, with ``end``, the last one; ``thin_block`` those between, of
    ``thin_channels``.
    Maps ``(batch, in_channels, height, width)`` to ``(batch, channels, height / stride, width / stride)``, rounded up.
    Raises ``InputError`` as ``GGhostStage`` does.
    """
    check_cheap(cheap)
    thin_depth = depth - 1 - end
    base = block(in_channels, channels, stride=stride)
    if thin_depth < 1 or thin_channels == channels:
        return nn.Sequential(base, *(block(channels, channels) for _ in range(depth - 1)))
    widths = [thin_channels if split else channels, *[thin_channels] * thin_depth]
    if cheap == "none":
        widths[-1] = channels
    build = thin_block or block
    thin = [build(width, following) for width, following in pairwise(widths)]
    return nn.Sequential(
        GGhostStage(
            base,
            thin,
            block(channels, channels) if end else None,
            channels=channels,
            thin_channels=thin_channels,
            cheap=cheap,
            mix=mix,
            split=split,
        )
    )


def gghost_speed_up(block_macs: Sequence[float], ghost_ratio: float, cheap_macs: float = 0) -> float:
    """The multiply-accumulates of a stage of blocks divided by those of the G-Ghost stage in its place, in theory.

    ``block_macs`` are those of each block, in order, ``cheap_macs`` those of the cheap operation, and ``ghost_ratio``
    is the share of channels that it makes. All blocks but the first are thin, and the mix is not counted.
    Raises ``InputError`` for a ratio below 0 or from 1 on, or without blocks.

    Source: GhostNets on Heterogeneous Devices, eq. 13.
    """
    return _reduction(block_macs, ghost_ratio, cheap_macs)


def gghost_compression(
    block_parameters: Sequence[float], ghost_ratio: float, cheap_parameters: float = 0
) -> float:
    """The parameters of a stage of blocks divided by those of the G-Ghost stage in its place, in theory.

    The arguments are those of ``gghost_speed_up``, in parameters.

    Source: GhostNets on Heterogeneous Devices, eq. 14.
    """
    return _reduction(block_parameters, ghost_ratio, cheap_parameters)


def _reduction(block_costs: Sequence[float], ghost_ratio: float, cheap_cost: float) -> float:
    check_ghost_ratio(ghost_ratio)
    if not block_costs:
        raise InputError("There are no blocks; give the cost of every block of the stage.")
    kept = 1 - ghost_ratio
    first, *thin = block_costs
    return sum(block_costs) / (first + kept * sum(thin[:1]) + kept**2 * sum(thin[1:]) + cheap_cost)


def thin_width(channels: int, ghost_ratio: float) -> int:
    """How many of a stage's channels the thin path keeps: the nearest to its share, but at least one.

    Raises ``InputError`` where ``ghost_ratio``, the share that it does not keep, leaves nothing.
    """
    check_ghost_ratio(ghost_ratio)
    return max(1, round((1 - ghost_ratio) * channels))


def check_ghost_ratio(ghost_ratio: float) -> None:
    """Raise ``InputError`` for what is no share of channels that leaves some."""
    if not 0 <= ghost_ratio < 1:
        raise InputError(
            f"ghost_ratio is {ghost_ratio}; give the share of cheap channels, from 0 up to, but not including, 1."
        )


def check_cheap(cheap: str) -> None:
    """Raise ``InputError`` for what is no cheap operation."""
    if cheap not in _CHEAP:
        raise InputError(f"cheap is {cheap!r}; choose one of {', '.join(map(repr, _CHEAP))}.")
