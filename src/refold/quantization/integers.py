"""Weights as integers: which products a processor adds in 16 bits, and scales and rounding that cannot saturate them.

Processors without a dot product of bytes (x86 before VNNI) multiply bytes of activations, 0 to 255, with signed bytes
of weights and add two neighbouring products in 16 bits, where anything beyond 32,767 is cut off. Two weights of one
sign whose sizes add up to at most 128 cannot get there, whatever the activations are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# 255 * 128 = 32,640 fits into 16 bits, 255 * 129 does not; below zero the same holds.
PAIR_LIMIT = 128
_SMALLEST = 1e-12


@dataclass(frozen=True)
class Pairs:
    """The neighbours of each weight of a row, ``[columns]`` each: whose product is added to its own in 16 bits.

    Columns are ordered as the engines' kernels go through them: positions of the kernel outside, channels inside.
    A column without a neighbour names itself.
    """

    partners: tuple[Tensor, ...]

    @staticmethod
    def of(columns: int, channels: int) -> Pairs:
        """The pairs of rows with ``columns`` weights, ``channels`` of them at each position of the kernel.

        MLAS (ONNX Runtime) pairs along the whole row, oneDNN (OpenVINO) along the channels of one position. For an
        even number of channels the two are one.
        """
        along = torch.arange(columns)
        row = (along ^ 1).where((along ^ 1) < columns, along)
        within = along % channels
        position = (along - within + (within ^ 1)).where((within ^ 1) < channels, along)
        return Pairs((row,) if torch.equal(row, position) else (row, position))

    def largest(self, rows: Tensor) -> Tensor:
        """The largest size of a pair in each row of ``[rows, columns]``: both weights where they have one sign."""
        found = rows.abs().amax(dim=1)
        for partner in self.partners:
            for sign in (1, -1):
                side = (sign * rows).clamp_min(0)
                both = side + torch.where(partner == torch.arange(len(partner)), 0, side[:, partner])
                found = torch.maximum(found, both.amax(dim=1))
        return found

    def room(self, chosen: Tensor, column: int, largest: int) -> tuple[Tensor, Tensor]:
        """The least and the greatest integer that a column may take beside those ``chosen`` already, per row."""
        low = torch.full_like(chosen[:, column], -largest)
        high = torch.full_like(low, largest)
        for partner in self.partners:
            other = int(partner[column])
            if other != column:
                low = torch.maximum(low, -PAIR_LIMIT - chosen[:, other].clamp_max(0))
                high = torch.minimum(high, PAIR_LIMIT - chosen[:, other].clamp_min(0))
        return low, high


def scales_of(rows: Tensor, pairs: Pairs | None, bits: int, *, per_channel: bool) -> Tensor:
    """The scale of each row of ``[rows, columns]`` with which integers fit into ``bits`` bits and pairs into 16."""
    largest = 2 ** (bits - 1) - 1
    scale: Tensor = rows.abs().amax(dim=1) / largest
    if pairs is not None:
        # One less than the limit, for rounding can add one half to each of the two.
        scale = torch.maximum(scale, pairs.largest(rows) / (PAIR_LIMIT - 1))
    scale = scale.clamp_min(_SMALLEST)
    if not per_channel:
        scale = torch.full_like(scale, float(scale.max()))
    return scale


def nearest(rows: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The nearest integers of rows ``[rows, columns]``."""
    largest = 2 ** (bits - 1) - 1
    found: Tensor = (rows / scale[:, None]).round().clamp(-largest, largest)
    return found


def rounded_together(
    rows: Tensor, scale: Tensor, products: Tensor, pairs: Pairs | None, bits: int, *, damping: float = 0.01
) -> Tensor:
    """Integers of rows ``[groups, rows, columns]`` whose layer answers as nearly as possible as before (GPTQ).

    ``products`` are the mean products of the columns' inputs, ``[groups, columns, columns]``, ``scale`` is
    ``[groups, rows]``. Each column is rounded in turn, and what that costs is made good by those that are left. Where
    ``pairs`` are given, no pair leaves 16 bits.
    """
    groups, _, columns = rows.shape
    largest = 2 ** (bits - 1) - 1
    left, chosen = rows.double().clone(), torch.zeros_like(rows, dtype=torch.float64)
    step = scale.double()
    inverse = torch.linalg.cholesky(torch.linalg.inv(damped(products, damping)), upper=True)
    for column in range(columns):
        integers = (left[:, :, column] / step).round()
        if pairs is None:
            integers = integers.clamp(-largest, largest)
        else:
            low, high = pairs.room(chosen.flatten(0, 1), column, largest)
            integers = integers.flatten().clamp(low, high).view(groups, -1)
        chosen[:, :, column] = integers
        missed = (left[:, :, column] - integers * step) / inverse[:, column, column, None]
        left[:, :, column + 1 :] -= missed[:, :, None] * inverse[:, None, column, column + 1 :]
    return chosen


def damped(products: Tensor, damping: float) -> Tensor:
    """Products of inputs with a part of their mean added to the diagonal, so that they can be inverted."""
    columns = products.shape[-1]
    mean = products.diagonal(dim1=1, dim2=2).mean(dim=1).clamp_min(_SMALLEST)
    return products.double() + damping * mean[:, None, None] * torch.eye(columns, dtype=torch.float64)
