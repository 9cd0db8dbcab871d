"""Latency of callables, measured in turn so that a slow moment of the machine hits all of them alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median, quantiles

import torch

from refold.errors import InputError


@dataclass(frozen=True)
class Latency:
    """Milliseconds a call, every sample in the order measured."""

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
        """The first and the third quartile, in milliseconds: the middle half of the calls lies between them."""
        if len(self.samples) < 2:
            return self.samples[0], self.samples[0]
        first, _, third = quantiles(self.samples, n=4, method="inclusive")
        return first, third

    def ratio_to(self, reference: Latency) -> float:
        """Median of the ratios of neighbouring samples: steadier than the ratio of medians on a busy machine.

        Raises `InputError` where the two were not measured together.
        """
        if len(self.samples) != len(reference.samples):
            raise InputError(
                "Two latencies can be compared only if they come from one call of measure_latency."
            )
        return median(a / b for a, b in zip(self.samples, reference.samples, strict=True))


def measure_latency(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 30,
    warm_up: int = 5,
    threads: int = 1,
) -> dict[str, Latency]:
    """Time callables in turn (A B C, A B C, …), each called once a round after ``warm_up`` rounds.

    PyTorch runs with ``threads`` threads meanwhile; an engine's session must be opened with the same number.
    Raises `InputError` where a count is below its least useful value.
    """
    for name, value, least in (("rounds", rounds, 1), ("warm_up", warm_up, 0), ("threads", threads, 1)):
        if value < least:
            raise InputError(f"{name} is {value}; give at least {least}.")
    samples: dict[str, list[float]] = {name: [] for name in calls}
    with torch_threads(threads), _no_garbage_collection(), torch.inference_mode():
        for turn in range(warm_up + rounds):
            for name, call in calls.items():
                start = time.perf_counter_ns()
                call()
                if turn >= warm_up:
                    samples[name].append((time.perf_counter_ns() - start) / 1e6)
    return {name: Latency(tuple(values)) for name, values in samples.items()}


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let PyTorch run with this many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
