"""What runs of a table say of the relations that the paper prints: means, differences, and whether they can be told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from statistics import mean, stdev
from typing import Literal

Verdict = Literal["holds", "reversed", "cannot be told", "differs", "higher", "lower"]

RULE = (
    "A difference is taken seed by seed. It is told where its mean is further from zero than Student's t allows at 95% "
    "(t times the standard deviation by the root of the number of seeds): then the relation holds or is reversed, "
    "differs where the paper's values are equal, and is higher or lower where it prints none. Else it cannot be told."
)
# Of Student's distribution, two-sided, 95%, by degrees of freedom from 1; more seeds are held to the last.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Relation:
    """A row, trained here: its accuracies in percent by seed, and those of the row that it is compared with.

    ``trained`` is what stood for the row's network here, ``published`` and ``reference_published`` what the paper
    prints (None: nothing). A row without ``reference`` is compared with none.
    """

    model: str
    trained: str
    published: float | None
    accuracies: Mapping[int, float]
    reference: str | None = None
    reference_published: float | None = None
    reference_accuracies: Mapping[int, float] | None = None

    @property
    def differences(self) -> list[float]:
        """Points above the reference, of the seeds that both have."""
        other = self.reference_accuracies or {}
        return [value - other[seed] for seed, value in self.accuracies.items() if seed in other]

    @property
    def published_difference(self) -> float | None:
        """The same of the paper; None where it does not print both."""
        if self.published is None or self.reference_published is None:
            return None
        return round(self.published - self.reference_published, 6)

    @property
    def verdict(self) -> Verdict | None:
        """Whether the paper's relation holds here, by `RULE`; None without a reference."""
        if self.reference is None:
            return None
        if not is_told(self.differences):
            return "cannot be told"
        here, paper = mean(self.differences), self.published_difference
        if paper is None:
            return "higher" if here > 0 else "lower"
        if paper == 0:
            return "differs"
        return "holds" if (here > 0) == (paper > 0) else "reversed"


def is_told(differences: list[float]) -> bool:
    """Whether the mean of differences is further from zero than their spread explains, by `RULE`."""
    count = len(differences)
    if count < 2:
        return False
    allowed = _T[min(count - 1, len(_T)) - 1] * stdev(differences) / sqrt(count)
    return abs(mean(differences)) > allowed
