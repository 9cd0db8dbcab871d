"""How far two results are from each other, and what of that counts as rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from refold.errors import NotFoldable

TOLERANCE = 1e-9
"""In float64, the largest difference relative to the largest output that counts as rounding."""
LARGEST_RATIO = 4.0
"""In the model's own dtype: how much further from the float64 result than the original the folded model may be."""


def distance(expected: Tensor, found: Tensor) -> float:
    """The largest difference relative to the largest expected value, where that is finite; infinite where shapes, or
    the places and kinds of what is not finite, differ."""
    if expected.shape != found.shape:
        return float("inf")
    expected, found = expected.detach().double().cpu(), found.detach().double().cpu()
    finite = torch.isfinite(expected)
    if not finite.all():
        if not torch.allclose(expected[~finite], found[~finite], equal_nan=True):
            return float("inf")
        expected, found = expected[finite], found[finite]
    if expected.numel() == 0:
        return 0.0
    difference, scale = float((expected - found).abs().max()), float(expected.abs().max())
    if difference != difference:
        return float("inf")
    return difference / scale if scale else difference


def spread(truth: list[Tensor], found: list[Tensor]) -> float:
    """The relative root mean square of all differences, where both are finite."""
    if [t.shape for t in truth] != [f.shape for f in found]:
        return float("inf")
    difference = scale = 0.0
    for expected, value in zip(truth, found, strict=True):
        expected, value = expected.double().cpu(), value.double().cpu()
        finite = torch.isfinite(expected) & torch.isfinite(value)
        if not torch.allclose(expected[~finite], value[~finite], equal_nan=True):
            return float("inf")
        difference += float((expected - value)[finite].square().sum())
        scale += float(expected[finite].square().sum())
    return float((difference / scale) ** 0.5) if scale else float(difference**0.5)


def require_proved(worst: float, tolerance: float) -> None:
    """Raise NotFoldable where a distance in float64 is more than rounding."""
    if not worst <= tolerance:
        raise NotFoldable(f"the proof failed: the results differ by {worst:.1e}")
