"""How long the calls of one network took, and how that compares with another's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median, quantiles

from refold.errors import InputError


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call, every sample in the order measured; of networks that took turns, samples are pairs."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """Half of the calls took no longer, in milliseconds."""
        return median(self.samples)

    @property
    def spread(self) -> tuple[float, float]:
        """The first and the ninth decile, in milliseconds."""
        if len(self.samples) < 2:
            return self.samples[0], self.samples[0]
        deciles = quantiles(self.samples, n=10, method="inclusive")
        return deciles[0], deciles[-1]

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third quartile, in milliseconds: the interquartile range lies between them."""
        if len(self.samples) < 2:
            return self.samples[0], self.samples[0]
        first, _, third = quantiles(self.samples, n=4, method="inclusive")
        return first, third

    def ratio_to(self, reference: Timing) -> float:
        """Median of the ratios of neighbouring samples: steadier than the ratio of medians on a busy machine.

        Raises `InputError` where the two were not measured together.
        """
        return median(self._ratios_to(reference))

    def ratio_of_medians(self, reference: Timing) -> float:
        """The ratio to a timing of another run, whose samples are no pairs of these."""
        return self.median / reference.median

    def pays(self, reference: Timing, margin: float) -> bool:
        """Whether this is faster than the reference by more than noise and `margin`, a part of its time.

        Raises `InputError` where the two were not measured together.
        """
        ratios = self._ratios_to(reference)
        if len(ratios) < 2:
            return ratios[0] <= 1 - margin
        first, _, third = quantiles(ratios, n=4)
        # Of the median of as many normal numbers, whose interquartile range is this wide.
        standard_error = 1.25 * (third - first) / 1.35 / math.sqrt(len(ratios))
        return median(ratios) + 2 * standard_error <= 1 - margin

    def less(self, other: Timing) -> Timing:
        """What is left of each sample without the other's of the same round.

        Raises `InputError` where the two were not measured together.
        """
        return Timing(tuple(own - its for own, its in self._pairs(other)))

    def _ratios_to(self, reference: Timing) -> list[float]:
        return [own / its for own, its in self._pairs(reference)]

    def _pairs(self, other: Timing) -> list[tuple[float, float]]:
        if len(self.samples) != len(other.samples):
            raise InputError(
                "Two latencies can be compared only if they come from one call of measure_latency."
            )
        return list(zip(self.samples, other.samples, strict=True))
