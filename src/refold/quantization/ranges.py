"""Ranges of activations: which floats the 256 integers of a value stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from refold.quantization.skeleton import Array

STEPS = 255
_SAMPLES = 200_000
_SHRUNK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4)
_SMALLEST = 1e-8


@dataclass(frozen=True)
class Range:
    """Integers 0 to 255 for the values ``scale * (integer - zero_point)``."""

    scale: float
    zero_point: int

    @staticmethod
    def between(low: float, high: float) -> Range:
        """The range from ``low`` to ``high``, widened so that it holds zero, which borders are made of."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = float(np.float32(max((high - low) / STEPS, _SMALLEST)))
        return Range(scale, round(-low / scale))

    def integers(self, values: Array) -> Array:
        """The nearest integers, ties to even as the engines have it."""
        scaled = values / np.float32(self.scale)
        np.rint(scaled, out=scaled)
        scaled += self.zero_point
        found: Array = np.clip(scaled, 0, STEPS, out=scaled).astype(np.uint8)
        return found

    def floats(self, integers: Array) -> Array:
        """What the integers stand for, in float32."""
        found: Array = (integers.astype(np.float32) - np.float32(self.zero_point)) * np.float32(self.scale)
        return found


def chosen_range(rounded: Sequence[Array], wanted: Sequence[Array], *, clip: bool = True) -> Range:
    """The range in which ``rounded``, once it is integers, is nearest to what is ``wanted``: values of two streams.

    Without ``clip`` it is the whole range of both.
    """
    low = min(float(part.min()) for part in wanted)
    high = max(float(part.max()) for part in wanted)
    if not clip:
        return Range.between(low, high)
    given, target = _sample(rounded), _sample(wanted)
    best = None
    for factor in _SHRUNK:
        found = Range.between(low * factor, high * factor)
        missed = float(np.square(found.floats(found.integers(given)) - target).sum())
        if best is None or missed < best[0]:
            best = (missed, found)
    assert best is not None
    return best[1]


def _sample(parts: Sequence[Array]) -> Array:
    """The same places of values of one shape, evenly spread."""
    step = max(1, sum(part.size for part in parts) // _SAMPLES)
    step += step % 2 == 0  # sides of maps are even as a rule
    return np.concatenate([part.ravel()[::step] for part in parts])
