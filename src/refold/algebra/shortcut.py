"""Dirac extension: a shortcut around convolutions becomes extra channels of them (RepNeXt, eq. 5 to 8)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import gcd

import torch

from refold.algebra.convolution import Convolution, identity, with_groups
from refold.algebra.operations import align, require_chained, sum_branches
from refold.errors import NotFoldable


def fold_shortcut(
    chain: Sequence[Convolution], shortcut: Convolution | None = None
) -> tuple[Convolution, ...]:
    """A plain chain that computes what `chain` with a shortcut around it computes, whatever the activations.

    With elementwise activations `a1 ... an-1` between the convolutions `c1 ... cn`, the result `r1 ... rn`
    satisfies `rn(an-1(... a1(r1(x)))) = cn(an-1(... a1(c1(x)))) + shortcut(an-1(... a1(x)))`: as in the
    paper, the shortcut passes through the same activations (RepNeXt, section 3.2). `shortcut` is a
    convolution, by default the identity; channels may be unequal and convolutions grouped. A grouped
    convolution keeps its groups where the groups before it allow, the carried channels of a group following
    its own (instruction 1 of the paper); the last convolution becomes one group.

    Raises NotFoldable where a convolution but the last does not keep the size of the map, channels do not
    match, or the chain is shorter than two.
    """
    if len(chain) < 2:
        raise NotFoldable("a shortcut around one convolution is a sum of branches; use sum_branches")
    for before, after in pairwise(chain):
        require_chained(before, after)
    carried = chain[0].in_channels
    extended = []
    layout = _Layout(0, carried, chain[0].groups)
    for convolution in chain[:-1]:
        wider, layout = _carry(convolution, layout)
        extended.append(wider)
    last = chain[-1]
    if shortcut is None:
        shortcut = identity(carried, last.spatial_axes, last.weight)
    if (shortcut.in_channels, shortcut.out_channels) != (carried, last.out_channels):
        raise NotFoldable(
            f"the shortcut takes {shortcut.in_channels} channels to {shortcut.out_channels}, the chain "
            f"{carried} to {last.out_channels}; pass a convolution of these channels as shortcut"
        )
    main = _read(with_groups(last, 1), layout, layout.main)
    return (*extended, sum_branches([main, _read(with_groups(shortcut, 1), layout, layout.carried)]))


@dataclass(frozen=True)
class _Layout:
    """An extended map: in each of `groups` equal groups the channels of the main branch, then the carried."""

    main_channels: int
    carried_channels: int
    groups: int

    @property
    def main(self) -> slice:
        """Where the main branch reads in a group; of the chain's input, that is the carried channels."""
        return slice(0, self.main_channels // self.groups) if self.main_channels else self.carried

    @property
    def carried(self) -> slice:
        return slice(self.main_channels // self.groups, None)


def _carry(convolution: Convolution, layout: _Layout) -> tuple[Convolution, _Layout]:
    """Extend one convolution so that its output also holds the carried channels of its input."""
    if any(s != 1 for s in convolution.stride):
        raise NotFoldable(f"the shortcut cannot pass a convolution with stride {convolution.stride}")
    groups = gcd(convolution.groups, layout.groups)
    copy = identity(layout.carried_channels, convolution.spatial_axes, convolution.weight)
    main, copy = align([with_groups(convolution, groups), with_groups(copy, groups)])
    parts = [_read(main, layout, layout.main), _read(copy, layout, layout.carried)]
    weight = torch.cat([part.weight.unflatten(0, (groups, -1)) for part in parts], 1).flatten(0, 1)
    bias = main.bias
    if bias is not None:
        bias = torch.cat(
            [bias.reshape(groups, -1), bias.new_zeros(groups, copy.out_channels // groups)], 1
        ).flatten()
    return replace(main, weight=weight, bias=bias), _Layout(main.out_channels, copy.out_channels, groups)


def _read(convolution: Convolution, layout: _Layout, part: slice) -> Convolution:
    """The same function of an extended map, of which it reads `part` of each group."""
    merged = layout.groups // convolution.groups
    blocks = convolution.weight.unflatten(1, (merged, -1))
    in_each = (layout.main_channels + layout.carried_channels) // layout.groups
    weight = blocks.new_zeros(*blocks.shape[:2], in_each, *convolution.kernel_size)
    weight[:, :, part] = blocks
    return replace(convolution, weight=weight.flatten(1, 2))
