"""Latencies are measured in turn, and compared pair by pair."""

import time

import pytest
import torch

from refold.bench import Timing, measure_latency
from refold.errors import InputError


def test_calls_take_turns_and_threads_are_put_back() -> None:
    order: list[tuple[str, int]] = []
    before = torch.get_num_threads()
    calls = {name: lambda name=name: order.append((name, torch.get_num_threads())) for name in "AB"}
    latencies = measure_latency(calls, rounds=3, warm_up=2, threads=before + 1)
    assert order == [("A", before + 1), ("B", before + 1)] * 5
    assert torch.get_num_threads() == before
    assert [len(latency.samples) for latency in latencies.values()] == [3, 3]


def test_a_longer_call_takes_longer() -> None:
    latencies = measure_latency(
        {"short": lambda: time.sleep(0.002), "long": lambda: time.sleep(0.02)}, rounds=5, warm_up=0
    )
    assert latencies["short"].median >= 2
    assert latencies["long"].median >= 20
    assert latencies["long"].ratio_to(latencies["short"]) > 2


def test_median_spread_and_paired_ratio() -> None:
    calm, busy = Timing((1.0, 1.0, 1.0, 10.0)), Timing((2.0, 2.0, 2.0, 20.0))
    assert busy.ratio_to(calm) == 2
    assert Timing((3.0, 1.0, 2.0)).median == 2
    assert Timing(tuple(float(i) for i in range(11))).spread == (1.0, 9.0)
    assert Timing((4.0,)).spread == (4.0, 4.0)
    with pytest.raises(InputError, match="one call of measure_latency"):
        calm.ratio_to(Timing((1.0,)))


@pytest.mark.parametrize("setting", [{"rounds": 0}, {"warm_up": -1}, {"threads": 0}])
def test_senseless_counts(setting: dict[str, int]) -> None:
    with pytest.raises(InputError, match="give at least"):
        measure_latency({"A": lambda: None}, **setting)
