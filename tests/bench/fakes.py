"""Benchmarks made of chosen numbers, and networks whose clock is a list."""

from collections.abc import Sequence

from refold.bench.machine import Machine, Roof
from refold.bench.results import Benchmark, Configuration, Measurement, Work
from refold.bench.turns import TimingFailed

ROOF = Roof(1e11, ((1000, 4e10), (1_000_000, 1e10)))


def a_machine(cpu: str = "a processor", **facts: object) -> Machine:
    """A machine with roofs for one thread."""
    return Machine(
        cpu, "x86_64", 2, 8 * 2**30, "Linux 6", "3.11.7", {"torch": "2.15"}, "", {1: ROOF}, **facts
    )  # type: ignore[arg-type]


def configuration(
    model: str = "net",
    form: str = "plain",
    engine: str = "onnxruntime",
    batch_size: int = 1,
    threads: int = 1,
) -> Configuration:
    """A configuration on images of 3 x 224 x 224."""
    return Configuration(model, form, engine, batch_size, threads, (3, 224, 224))


def row(
    key: Configuration,
    samples: Sequence[float],
    *,
    machine: str = "a processor",
    run: str = "1",
    error: str | None = None,
) -> Measurement:
    """A row with a little of everything."""
    return Measurement(
        machine,
        key,
        run,
        tuple(samples),
        parameters=5_000_000,
        macs=150_000_000,
        operators=100,
        peak_memory=40_000_000,
        breakdown={"1x1 convolution": 2.0, "depthwise convolution": 1.0, "add": 0.5},
        work=Work(300_000_000, 20_000_000, 1.5),
        error=error,
    )


def a_benchmark() -> Benchmark:
    """Two networks in two forms and two engines, one row without samples."""
    rows = []
    for model, factor in (("slow", 2.0), ("fast", 1.0)):
        for engine, base in (("onnxruntime", 3.0), ("pytorch", 9.0)):
            rows.append(row(configuration(model, "training", engine), [base * factor * 2] * 4))
            rows.append(row(configuration(model, "plain", engine), [base * factor] * 4))
    rows.append(row(configuration("fast", "plain", "broken"), [], error="its process ended with SIGSEGV"))
    return Benchmark({"a processor": a_machine()}, rows, "training")


class FakeNetwork:
    """Takes the next number of a list for every turn; writes what it does into a journal."""

    def __init__(
        self, name: str, times: Sequence[float], journal: list[str], fails_at: int | None = None
    ) -> None:
        self.name, self.times, self.journal, self.fails_at = name, list(times), journal, fails_at
        self.turns = 0
        self.closed = False

    def warm_up(self) -> None:
        self.journal.append(f"warm {self.name}")

    def sample(self) -> float:
        self.journal.append(self.name)
        if self.turns == self.fails_at:
            raise TimingFailed("it broke")
        self.turns += 1
        time = self.times.pop(0)
        if time < 0:
            raise KeyboardInterrupt
        return time

    def close(self) -> None:
        self.closed = True
