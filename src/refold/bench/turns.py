"""What takes turns in a benchmark: a model in one form, opened in one engine in a worker process."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from refold.errors import RefoldError
from refold.export.apart import Apart, ProcessFailed

# A turn of a fast model is several calls, so that it lasts about this long.
_TURN_MILLISECONDS = 10.0
_MOST_CALLS = 100

Name = TypeVar("Name")


class TimingFailed(RefoldError):
    """A model could not be prepared, opened or run; the message is the reason."""


class TimedNetwork(Protocol):
    """Something that can be timed in turn with others."""

    def warm_up(self) -> None:
        """Run once, untimed; raises `TimingFailed` where that fails."""

    def sample(self) -> float:
        """Milliseconds of one call; raises `TimingFailed` where it fails."""

    def close(self) -> None:
        """Free what it holds; harmless when called again."""


class WorkerProcess(Apart):
    """A running `refold.bench.worker` with a number of threads."""

    def __init__(self, threads: int, time_limit: float) -> None:
        names = (
            "OMP_NUM_THREADS",
            "MKL_NUM_THREADS",
            "OPENBLAS_NUM_THREADS",
            "TORCHINDUCTOR_COMPILE_THREADS",
        )
        super().__init__("refold.bench.worker", time_limit, dict.fromkeys(names, str(threads)))
        self._calls = 1

    def ask(self, do: str, **arguments: Any) -> Any:
        """The answer to one request; raises `TimingFailed` for an error, a crash or silence."""
        try:
            return super().ask(do, **arguments)
        except ProcessFailed as error:
            raise TimingFailed(str(error)) from None

    def warm_up(self) -> None:
        """Run once, and choose how many calls make up a turn."""
        milliseconds = self.ask("time", calls=1)
        self._calls = min(_MOST_CALLS, max(1, math.ceil(_TURN_MILLISECONDS / max(milliseconds, 1e-3))))

    def sample(self) -> float:
        """Milliseconds a call, over the calls of one turn."""
        return float(self.ask("time", calls=self._calls))


def open_worker(
    engine: str,
    path: Path,
    *,
    threads: int,
    shape: tuple[int, ...],
    dtype: str,
    time_limit: float,
    **pytorch: str,
) -> WorkerProcess:
    """Open a model's file in a worker process, with how PyTorch runs it; raises `TimingFailed` where that fails."""
    worker = WorkerProcess(threads, time_limit)
    try:
        given = {"path": str(path), "threads": threads, "shape": list(shape), "dtype": dtype, **pytorch}
        worker.ask("open", engine=engine, **given)
    except BaseException:
        worker.close()
        raise
    return worker


def interleave(
    networks: Mapping[Name, TimedNetwork],
    *,
    rounds: int,
    warm_up: int,
    samples: dict[Name, list[float]],
    failures: dict[Name, str],
    on_round: Callable[[], None] = lambda: None,
) -> None:
    """Let networks take turns (A B C, A B C, …): `warm_up` rounds untimed, then `rounds` rounds into `samples`.

    `samples` may hold rounds of before, the same number for all. A network that fails is closed, its samples go,
    and its reason stands in `failures`. However this ends, all have the same number of samples: those of whole
    rounds.
    """
    running = dict(networks)

    def turn(action: Callable[[Name, TimedNetwork], None]) -> None:
        for key, network in list(running.items()):
            try:
                action(key, network)
            except TimingFailed as error:
                failures[key] = str(error)
                samples[key].clear()
                running.pop(key).close()
        on_round()

    try:
        for _ in range(warm_up):
            turn(lambda _, network: network.warm_up())
        for _ in range(rounds):
            turn(lambda key, network: samples[key].append(network.sample()))
    finally:
        complete = min((len(samples[key]) for key in running), default=0)
        for key in running:
            del samples[key][complete:]
