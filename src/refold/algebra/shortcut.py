"""Dirac extension: a shortcut around a chain of convolutions becomes extra channels of it (RepNeXt, eq. 5 to 8)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import gcd

import torch
from torch import Tensor

from refold.algebra.convolution import Convolution, identity, with_groups
from refold.algebra.operations import align, sum_branches
from refold.errors import NotFoldable


def fold_shortcut(chain: Sequence[Convolution], shortcut: Convolution | None = None) -> tuple[Convolution, ...]:
    """A plain chain that computes what `chain` with a shortcut around it computes, whatever the activations.

    With elementwise activations `a1 ... an-1` between the convolutions `c1 ... cn`, the result `r1 ... rn` satisfies
    `rn(an-1(... a1(r1(x)))) = cn(an-1(... a1(c1(x)))) + shortcut(an-1(... a1(x)))`: as in the paper, the shortcut
    passes through the same activations (RepNeXt, section 3.2). `shortcut` is a convolution, by default the identity;
    channels may be unequal and convolutions grouped. A grouped convolution keeps its groups, the copied channels of a
    group following its own (instruction 1 of the paper).

    Raises NotFoldable where a convolution but the last does not keep the size of the map, or the chain is shorter
    than two.
    """
    if len(chain) < 2:
        raise NotFoldable("a shortcut around one convolution is a sum of branches; use sum_branches")
    carried = chain[0].in_channels
    copied_in = _Layout(torch.arange(0), torch.arange(carried), chain[0].groups)
    extended = []
    for convolution in chain[:-1]:
        wider, copied_in = _carry(convolution, copied_in, carried)
        extended.append(wider)
    return (*extended, _absorb(chain[-1], copied_in, shortcut))


class _Layout:
    """Where a map keeps the channels of the main branch and the carried ones, and in how many equal groups."""

    def __init__(self, main: Tensor, carried: Tensor, groups: int) -> None:
        self.main = main
        self.carried = carried
        self.groups = groups

    @property
    def channels(self) -> int:
        return self.main.numel() + self.carried.numel()


def _carry(convolution: Convolution, layout: _Layout, carried: int) -> tuple[Convolution, _Layout]:
    """Extend one convolution so that its output also holds the carried channels of its input."""
    axes = convolution.spatial_axes
    if any(s != 1 for s in convolution.stride):
        raise NotFoldable(f"the shortcut cannot pass a convolution with stride {convolution.stride}")
    reads_carried = layout.main.numel() == 0
    groups = gcd(convolution.groups, layout.groups, carried)
    main, copy = align([with_groups(convolution, groups), identity(carried, axes, convolution.weight)])
    copy = with_groups(copy, groups)
    main_each, copy_each = main.out_channels // groups, carried // groups
    block = torch.arange(main.out_channels + carried).reshape(groups, main_each + copy_each)
    rows_main, rows_carried = block[:, :main_each].flatten(), block[:, main_each:].flatten()
    in_each = layout.channels // groups
    weight = main.weight.new_zeros(block.numel(), in_each, *main.kernel_size)
    columns_carried = (layout.carried % in_each).reshape(groups, -1)
    columns_main = columns_carried if reads_carried else (layout.main % in_each).reshape(groups, -1)
    for rows, columns, source in ((rows_main, columns_main, main), (rows_carried, columns_carried, copy)):
        blocks = source.weight.reshape(groups, -1, *source.weight.shape[1:])
        for group, group_rows in enumerate(rows.reshape(groups, -1)):
            weight[group_rows[:, None], columns[group][None, :]] = blocks[group]
    bias = None
    if main.bias is not None:
        bias = main.bias.new_zeros(block.numel())
        bias[rows_main] = main.bias
    return replace(main, weight=weight, bias=bias), _Layout(rows_main, rows_carried, groups)


def _absorb(convolution: Convolution, layout: _Layout, shortcut: Convolution | None) -> Convolution:
    """The last convolution, extended to add the shortcut of the carried channels to its own output."""
    if shortcut is None:
        shortcut = identity(layout.carried.numel(), convolution.spatial_axes, convolution.weight)
    if shortcut.out_channels != convolution.out_channels:
        raise NotFoldable(
            f"the shortcut gives {shortcut.out_channels} channels, the chain {convolution.out_channels}; "
            "pass a convolution of matching channels as shortcut"
        )
    main = _spread_inputs(convolution, layout.main, layout.channels)
    return sum_branches([main, _spread_inputs(shortcut, layout.carried, layout.channels)])


def _spread_inputs(convolution: Convolution, positions: Tensor, total: int) -> Convolution:
    """The same function of an input with `total` channels, of which it reads those at `positions`."""
    dense = with_groups(convolution, 1)
    weight = dense.weight.new_zeros(dense.out_channels, total, *dense.kernel_size)
    weight[:, positions] = dense.weight
    return replace(dense, weight=weight)
