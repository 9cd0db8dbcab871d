"""Latency of callables, measured in turn so that a slow moment of the machine hits all of them alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from refold.bench.timing import Timing
from refold.errors import InputError


def measure_latency(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 30,
    warm_up: int = 5,
    threads: int = 1,
) -> dict[str, Timing]:
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
    return {name: Timing(tuple(values)) for name, values in samples.items()}


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
