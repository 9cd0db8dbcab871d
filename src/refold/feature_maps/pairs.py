"""How alike a layer's maps are, and how well a small depthwise kernel makes one of another (GhostNets, table 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import unfold

from refold.errors import InputError

KERNEL_SIZES = (1, 3, 5, 7)


@dataclass(frozen=True)
class Similarity:
    """What the maps of a layer have to do with each other, by ``(source, target)`` channel.

    ``correlations`` are those of the maps' values, ``errors`` by kernel size the mean squared error of the best kernel
    from the source to the target. ``variances`` and ``squares``, the mean squares, are those of each target, without
    which a small error says nothing: the error of a kernel of zeros is the mean square, that of the mean the variance.
    """

    correlations: Tensor
    errors: Mapping[int, Tensor]
    variances: Tensor
    squares: Tensor


@dataclass(frozen=True)
class Pair:
    """Two maps that are alike: variance and mean square of the target, and the best kernel's error for each size."""

    source: int
    target: int
    correlation: float
    variance: float
    square: float
    errors: Mapping[int, float]


def similarity(maps: Tensor, kernel_sizes: Sequence[int] = KERNEL_SIZES) -> Similarity:
    """Correlations and least-squares errors between all maps ``(channels, height, width)`` of a layer, in float64.

    A kernel is applied as the network would: with zeros around the map, and without a bias.
    Raises `InputError` for even kernel sizes, and for fewer than two maps.

    Source: GhostNets on Heterogeneous Devices, section 5.2.1 and table 3.
    """
    for size in kernel_sizes:
        if size < 1 or size % 2 == 0:
            raise InputError(f"The kernel size is {size}; give an odd number, so that it has a centre.")
    if len(maps) < 2:
        raise InputError("The layer has one map; name a layer with two or more to compare.")
    values = maps.double()
    flat = values.flatten(1)
    centred = flat - flat.mean(dim=1, keepdim=True)
    norms = centred.norm(dim=1)
    products = norms[:, None] * norms[None, :]
    correlations = torch.where(products > 0, centred @ centred.T / products.clamp_min(1e-300), 0.0)
    errors = {size: torch.stack([_errors(source, flat, size) for source in values]) for size in kernel_sizes}
    return Similarity(correlations, errors, centred.square().mean(dim=1), flat.square().mean(dim=1))


def _errors(source: Tensor, targets: Tensor, kernel_size: int) -> Tensor:
    """For each target the mean squared error of the best kernel from one map ``(height, width)``."""
    columns = unfold(source[None, None], kernel_size, padding=kernel_size // 2)[0].T
    # A map that is zero nearly everywhere has no unique kernel; the smallest will do.
    kernels = torch.linalg.lstsq(columns, targets.T, driver="gelsd").solution
    errors: Tensor = (columns @ kernels - targets.T).square().mean(dim=0)
    return errors


def similar_pairs(similar: Similarity, count: int = 3) -> list[Pair]:
    """The pairs of maps that are most alike, by their correlation, each map in one pair at most.

    Of each pair the map of lower number is the source. Maps that are the same everywhere are left out.
    """
    alike = similar.correlations.triu(diagonal=1)
    alike[similar.variances == 0] = 0
    alike[:, similar.variances == 0] = 0
    pairs: list[Pair] = []
    while len(pairs) < count and alike.max() > 0:
        source, target = divmod(int(alike.argmax()), len(alike))
        for channel in (source, target):
            alike[channel] = 0
            alike[:, channel] = 0
        pairs.append(
            Pair(
                source,
                target,
                float(similar.correlations[source, target]),
                float(similar.variances[target]),
                float(similar.squares[target]),
                {size: float(errors[source, target]) for size, errors in similar.errors.items()},
            )
        )
    return pairs
