"""Networks take turns, and a process that breaks costs nothing but itself."""

import os
import signal
from pathlib import Path

import pytest
import torch
from fakes import FakeNetwork
from torch import nn

from refold.bench.turns import TimingFailed, WorkerProcess, interleave, open_worker


def test_turns_are_interleaved() -> None:
    journal: list[str] = []
    networks = {name: FakeNetwork(name, [1.0, 2.0], journal) for name in "AB"}
    samples: dict[str, list[float]] = {"A": [], "B": []}
    rounds: list[int] = []
    interleave(
        networks,
        rounds=2,
        warm_up=2,
        samples=samples,
        failures={},
        on_round=lambda: rounds.append(len(journal)),
    )
    assert journal == ["warm A", "warm B"] * 2 + ["A", "B"] * 2
    assert rounds == [2, 4, 6, 8]
    assert samples == {"A": [1.0, 2.0], "B": [1.0, 2.0]}


def test_one_that_fails_leaves_the_others() -> None:
    journal: list[str] = []
    bad = FakeNetwork("B", [5.0] * 3, journal, fails_at=1)
    networks = {
        "A": FakeNetwork("A", [1.0] * 3, journal),
        "B": bad,
        "C": FakeNetwork("C", [2.0] * 3, journal),
    }
    samples: dict[str, list[float]] = {name: [] for name in networks}
    failures: dict[str, str] = {}
    interleave(networks, rounds=3, warm_up=0, samples=samples, failures=failures)
    assert failures == {"B": "it broke"}
    assert bad.closed
    assert samples == {"A": [1.0] * 3, "B": [], "C": [2.0] * 3}
    assert journal == ["A", "B", "C", "A", "B", "C", "A", "C"]


def test_an_interruption_leaves_whole_rounds() -> None:
    journal: list[str] = []
    networks = {
        "A": FakeNetwork("A", [1.0] * 9, journal),
        "B": FakeNetwork("B", [2.0, 2.0, -1.0], journal),
    }
    samples = {"A": [7.0], "B": [8.0]}  # of a run before
    with pytest.raises(KeyboardInterrupt):
        interleave(networks, rounds=9, warm_up=0, samples=samples, failures={})
    assert samples == {"A": [7.0, 1.0, 1.0], "B": [8.0, 2.0, 2.0]}


class Odd(nn.Module):
    """A network that does what its process cannot survive."""

    def __init__(self, deed: str) -> None:
        super().__init__()
        self.deed = deed

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        if self.deed == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.deed == "raise":
            raise RuntimeError("too large\nfor the memory")
        print("engines may print what they like")
        return image * 2


def _saved(tmp_path: Path, deed: str) -> Path:
    path = tmp_path / "net.pt"
    torch.save(Odd(deed), path)
    return path


def test_a_process_answers_until_it_is_closed(tmp_path: Path) -> None:
    path = _saved(tmp_path, "run")
    worker = open_worker("pytorch", path, threads=1, shape=(1, 3, 8, 8), dtype="float32", time_limit=60)
    worker.warm_up()
    assert worker.sample() > 0
    assert worker.ask("memory") is None or worker.ask("memory") >= 0
    assert set(worker.ask("breakdown")) == {"multiply"}
    with pytest.raises(TimingFailed, match="nonsense"):
        worker.ask("nonsense")
    with pytest.raises(TimingFailed, match="cannot load"):
        worker.ask("open", engine="onnxruntime", path="no.onnx", threads=1, shape=[1], dtype="float32")
    worker.close()
    worker.close()


def test_crash_and_error_are_told_apart(tmp_path: Path) -> None:
    opened = [
        open_worker("pytorch", _saved(tmp_path, deed), threads=1, shape=(1,), dtype="float32", time_limit=60)
        for deed in ("raise", "crash")
    ]
    for worker, reason in zip(
        opened, ("RuntimeError: too large for the memory", "its process ended with SIGSEGV"), strict=True
    ):
        with pytest.raises(TimingFailed, match=reason):
            worker.warm_up()
        worker.close()


def test_silence_has_a_limit() -> None:
    worker = WorkerProcess(threads=1, time_limit=0.01)  # PyTorch alone takes longer to import
    with pytest.raises(TimingFailed, match=r"no answer within 0\.01 s"):
        worker.ask("memory")
    worker.close()
