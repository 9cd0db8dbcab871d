"""A published table with our side of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from refold.bench.papers.published import Exhibit, PaperRow
from refold.bench.results import Benchmark, Measurement
from refold.bench.timing import Timing
from refold.bench.ways import Way
from refold.folding import Cost


@dataclass(frozen=True)
class TimingSetup:
    """How a time is measured here: the way to run a network, its threads, and the images of a call."""

    way: Way
    threads: int
    batch_size: int


@dataclass(frozen=True)
class PaperTable:
    """A published table or figure with our side of it.

    `sizes` has the cost of one image by form for each row that is a network, under its `model`. `benchmark` holds the
    measured times (empty without), `setups` how they were measured. `accuracies` are those of networks trained here,
    by network.
    """

    exhibit: Exhibit
    sizes: Mapping[str, Mapping[str, Cost]]
    benchmark: Benchmark = field(default_factory=Benchmark)
    setups: tuple[TimingSetup, ...] = ()
    accuracies: Mapping[str, float] = field(default_factory=dict)

    def measurement(self, row: PaperRow, setup: TimingSetup) -> Measurement | None:
        """What was measured of a row, on the machine that was added last; None where nothing was."""
        found = [
            measured
            for measured in self.benchmark.measured
            if (key := measured.configuration).model == row.subject
            and (key.form, key.way, key.threads) == (row.timed, setup.way, setup.threads)
            and key.batch_size == setup.batch_size
            and row.pixels in (None, key.input_size[-1])
        ]
        machines = list(self.benchmark.machines)
        return max(found, key=lambda measured: machines.index(measured.machine), default=None)

    def timing(self, row: PaperRow, setup: TimingSetup) -> Timing | None:
        """The time of a row, of one with `minus` less that row's; None where it was not measured."""
        own = self.measurement(row, setup)
        if own is None or row.minus is None:
            return own.latency if own else None
        other = self.measurement(self.exhibit.row(row.minus), setup)
        if other is None:
            return None
        if other.run == own.run and len(other.samples) == len(own.samples):
            return own.latency.less(other.latency)
        return Timing((own.latency.median - other.latency.median,))

    def ratio(self, row: PaperRow, setup: TimingSetup) -> float | None:
        """The time of a row relative to that of the row it is compared with; None without one."""
        if row.against is None:
            return None
        reference = self.exhibit.row(row.against)
        own, its = self.measurement(row, setup), self.measurement(reference, setup)
        if own is None or its is None:
            return None
        if row.minus is None and own.run == its.run and len(own.samples) == len(its.samples):
            return own.latency.ratio_to(its.latency)
        mine, other = self.timing(row, setup), self.timing(reference, setup)
        return mine.ratio_of_medians(other) if mine and other and other.median > 0 else None
