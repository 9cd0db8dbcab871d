"""What an export tells of the file that it wrote."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from refold.export.engines import Contents
from refold.export.request import FLOAT16, Precision

if TYPE_CHECKING:
    from refold.export.comparing import Trial


@dataclass(frozen=True)
class ExportReport:
    """What was written and how far its outputs are from PyTorch's.

    ``trials`` has one line for each call that was compared, none where the engine cannot run here; ``spread``
    is the largest minus the smallest value of PyTorch's outputs, ``tolerance`` the part of it that was allowed
    as a difference. ``notes`` are sentences to know about the file.
    """

    path: str
    engine: str
    form: str
    precision: Precision
    bytes: int
    contents: Contents
    trials: list[Trial]
    spread: float
    tolerance: float
    notes: list[str]

    @property
    def half(self) -> bool:
        """Whether the file holds float16."""
        return self.precision == FLOAT16

    @property
    def checked(self) -> bool:
        """Whether the file was run and compared."""
        return bool(self.trials)

    @property
    def batch_sizes(self) -> list[int]:
        """The batch sizes that were compared."""
        return sorted({trial.batch_size for trial in self.trials})

    @property
    def max_difference(self) -> float:
        """The largest |Δ| of all trials; NaN where nothing was compared."""
        return _largest([trial.max_difference for trial in self.trials])

    @property
    def relative_difference(self) -> float:
        """The largest |Δ| of all trials in parts of its output's spread; NaN where nothing was compared."""
        return _largest([trial.relative_difference for trial in self.trials])

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON-able values; the differences are None where nothing was compared."""
        names = ("max_difference", "relative_difference")
        differences = {name: getattr(self, name) if self.checked else None for name in names}
        facts = {"half": self.half, "checked": self.checked, "batch_sizes": self.batch_sizes}
        return dataclasses.asdict(self) | facts | differences


def _largest(values: list[float]) -> float:
    return float("nan") if not values or any(value != value for value in values) else max(values)
