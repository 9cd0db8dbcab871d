"""Networks run on a card, compiled, as graphs, with channels last: the CPU's part for real, the card's with fakes."""

import dataclasses
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fakes import FakeNetwork
from torch import nn
from typer.testing import CliRunner

import refold
from refold.bench import Benchmark, execution, machine
from refold.bench import runner as runner_module
from refold.bench.papers import find_exhibit, paper, to_markdown
from refold.bench.results import Configuration, Measurement
from refold.bench.tables import describe, to_csv
from refold.bench.turns import open_worker
from refold.bench.ways import Way, ways
from refold.cli import app
from refold.errors import InputError

LAYOUTS = ("channels_first", "channels_last")


def net() -> nn.Module:
    """Small enough to be compiled in seconds."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A card that PyTorch finds and nvidia-smi answers for; gives the commands that were run."""
    facts = SimpleNamespace(name="a card", total_memory=16 * 2**30, major=9, minor=0, uuid="12-34")
    answers = {
        "driver_version": "570.1\n",
        "clocks.sm,clocks.max.sm,clocks.mem": "1500 MHz, 1980 MHz, 2619 MHz\n",
    }
    asked: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        asked.append(command)
        return SimpleNamespace(stdout=answers[command[2].removeprefix("--query-gpu=")])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: facts)
    monkeypatch.setattr(machine.subprocess, "run", run)
    return asked


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each worker was opened with."""
    given: list[dict[str, Any]] = []

    class Worker(FakeNetwork):
        def ask(self, do: str, **_: Any) -> Any:
            return {"memory": 1000, "breakdown": None}[do]

    def open_fake(engine: str, path: Path, **arguments: Any) -> Worker:
        given.append({"engine": engine, "path": path, **arguments})
        return Worker(engine, [2.0 * len(given)] * 9, [])

    monkeypatch.setattr(runner_module, "open_worker", open_fake)
    return given


def test_every_combination_of_ways_is_taken_once() -> None:
    found = ways("pytorch", ["float32", "float16"], "cpu", ["eager", "compiled", "eager"], LAYOUTS)
    assert len(found) == len(set(found)) == 8
    assert [str(way) for way in found[:4]] == [
        "pytorch",
        "pytorch, compiled",
        "pytorch, channels_last",
        "pytorch, compiled, channels_last",
    ]
    assert str(found[-1]) == "pytorch, float16, compiled, channels_last"
    assert Way("pytorch", "tf32").stored == "float32"
    assert ways(["onnxruntime", "pytorch"]) == (Way("onnxruntime"), Way("pytorch"))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"device": "tpu"}, "no device 'tpu'; choose among: cpu, cuda"),
        ({"device": "cuda"}, "finds no CUDA device here"),
        ({"executions": ["fast"]}, "no execution 'fast'; choose among: eager, compiled, graphs"),
        ({"executions": []}, "no execution ''"),
        ({"executions": ["graphs"]}, "no CUDA graphs on the cpu"),
        ({"precisions": ["tf32"]}, "TF32 is arithmetic of NVIDIA cards"),
        ({"memory_formats": ["nhwc"]}, "no memory format 'nhwc'"),
        (
            {"engine": ["pytorch", "onnxruntime"], "executions": ["compiled"]},
            "PyTorch's, and onnxruntime has none",
        ),
    ],
)
def test_what_cannot_be_is_one_sentence(
    arguments: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=reason):
        ways(**{"engine": "pytorch", **arguments})


@pytest.mark.parametrize("command", [["bench", "test_resnet"], ["paper", "repvgg/figure-6"]])
def test_no_card_is_an_error_of_the_command(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    left = CliRunner().invoke(app, [*command, "--engine", "pytorch", "--device", "cuda"])
    assert isinstance(left.exception, InputError)
    assert "finds no CUDA device here" in str(left.exception)


@pytest.mark.slow
def test_compiled_and_channels_last_run_here(tmp_path: Path) -> None:
    kept = tmp_path / "r.json"
    arguments: dict[str, Any] = {
        "engine": "pytorch",
        "executions": ["eager", "compiled"],
        "memory_formats": ["channels_last"],
        "baseline": "eager",
        "input_size": (3, 8, 8),
        "rounds": 2,
        "warm_up": 0,
        "breakdown": True,
        "output": kept,
    }
    result = refold.benchmark({"net": net()}, **arguments)
    assert [row.error for row in result.rows] == [None] * 2
    eager, compiled = result.rows
    assert eager.configuration.way.variant == "channels_last"
    assert compiled.configuration.way.variant == "compiled, channels_last"
    assert (eager.breakdown is None, compiled.breakdown is None) == (False, True)
    assert result.reference(compiled) == eager
    assert all(min(row.samples) > 0 for row in result.rows)
    # What was measured is known again, and what tells rows apart is a column.
    assert refold.benchmark({"net": net()}, **arguments, resume=True) == result
    assert "pytorch,float32,cpu,compiled,channels_last," in to_csv(result)


@pytest.mark.slow
def test_a_compiled_network_is_compiled_and_answers_as_before() -> None:
    image, given = torch.randn(2, 3, 8, 8), net()
    with torch.inference_mode():
        expected = given(image)
        model, laid_out = execution.in_memory_format(given, image, "channels_last")
        assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
        assert laid_out.is_contiguous(memory_format=torch.channels_last)
        found: Any = execution.call_of(model, laid_out, "compiled")()
    torch.testing.assert_close(found, expected)
    assert model._compiled_call_impl is not None


def test_a_worker_says_why_a_graph_cannot_be(tmp_path: Path) -> None:
    torch.save(net(), tmp_path / "net.pt")
    with pytest.raises(refold.errors.RefoldError, match="CUDA"):
        open_worker(
            "pytorch",
            tmp_path / "net.pt",
            threads=1,
            shape=(1, 3, 8, 8),
            dtype="float32",
            time_limit=60,
            execution="graphs",
        )


def test_events_stand_around_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    journal: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            journal.append("record")

        def synchronize(self) -> None:
            journal.append("wait for the event")

        def elapsed_time(self, _: Any) -> float:
            return 12.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: journal.append("wait"))
    assert execution.milliseconds(lambda: journal.append("call"), 3, "cuda") == 4.0
    assert journal == ["wait", "record", *["call"] * 3, "record", "wait for the event"]


def test_a_graph_is_captured_behind_a_warm_up_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    journal: list[str] = []

    @contextmanager
    def within(thing: Any) -> Iterator[None]:
        journal.append(f"in {thing}")
        yield
        journal.append(f"out of {thing}")

    class Stream:
        def __str__(self) -> str:
            return "the stream"

        def wait_stream(self, _: Any) -> None:
            journal.append("wait")

    class Graph:
        def __str__(self) -> str:
            return "the graph"

        def replay(self) -> None:
            journal.append("replay")

    for name, fake in (
        ("Stream", Stream),
        ("current_stream", Stream),
        ("CUDAGraph", Graph),
        ("stream", within),
        ("graph", within),
    ):
        monkeypatch.setattr(torch.cuda, name, fake)

    def model(image: torch.Tensor) -> torch.Tensor:
        journal.append("call" if torch.is_inference_mode_enabled() else "call with gradients")
        return image + 1

    call = execution.call_of(model, torch.zeros(1), "graphs")  # type: ignore[arg-type]  # it is only called
    captured = ["in the graph", "call", "out of the graph"]
    assert journal == ["wait", "in the stream", *["call"] * 3, "out of the stream", "wait", *captured]
    assert call() == torch.ones(1)
    assert journal[-1] == "replay"


@pytest.mark.parametrize("tf32", [False, True])
def test_float32_is_not_tf32(tf32: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32, convolutions.benchmark
    try:
        execution.set_up_cuda(tf32)
        assert (products.allow_tf32, convolutions.allow_tf32) == (tf32, tf32)
    finally:
        products.allow_tf32, convolutions.allow_tf32, convolutions.benchmark = before


def test_on_a_card_its_facts_and_clocks_are_kept(
    card: list[list[str]], opened: list[dict[str, Any]], tmp_path: Path
) -> None:
    kept = tmp_path / "r.json"
    result = refold.benchmark(
        {"net": net()},
        engine="pytorch",
        device="cuda",
        precisions=["float32", "tf32", "float16"],
        executions=["graphs"],
        batch_sizes=[64],
        input_size=(3, 8, 8),
        rounds=2,
        warm_up=0,
        output=kept,
    )
    assert [(o["precision"], o["device"], o["execution"], o["shape"][0]) for o in opened] == [
        (name, "cuda", "graphs", 64) for name in ("float32", "tf32", "float16")
    ]
    ((name, facts),) = result.machines.items()
    assert name == "a card"
    assert facts.gpu is not None
    assert str(facts.gpu).startswith("a card, 16 GiB, CUDA")
    assert str(facts.gpu).endswith("driver 570.1, SM at 1500 MHz of at most 1980 MHz, memory at 2619 MHz")
    assert describe(name, facts).startswith("a card, 16 GiB")
    assert all(command[:2] == ["nvidia-smi", "--id=GPU-12-34"] for command in card)
    assert Benchmark.load(kept) == result
    # Other clocks are no other machine.
    slower = dataclasses.replace(facts, gpu=dataclasses.replace(facts.gpu, clocks="slow"))
    assert result.add_machine(name, slower) == name


def test_without_nvidia_smi_the_rest_is_kept(card: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise subprocess.CalledProcessError(9, "nvidia-smi")

    monkeypatch.setattr(machine.subprocess, "run", fail)
    gpu = machine.this_machine(device="cuda").gpu
    assert gpu is not None
    assert (gpu.name, gpu.compute_capability, gpu.driver) == ("a card", "9.0", "")
    assert machine.clocks_now() == ""
    assert machine.this_machine().gpu is None


def test_the_roofline_is_the_processors(card: list[list[str]]) -> None:
    with pytest.raises(InputError, match="roofline is that of the processor"):
        refold.benchmark({"net": net()}, engine="pytorch", device="cuda", roofline=True)


def test_a_papers_table_has_a_column_for_each_way(
    card: list[list[str]], opened: list[dict[str, Any]]
) -> None:
    table = paper(
        "repghost/table-1",
        engine="pytorch",
        device="cuda",
        precisions=["tf32"],
        executions=["eager", "graphs"],
        largest_batch=2,
        rounds=2,
        warm_up=0,
    )
    text = to_markdown(table)
    assert "| pytorch, tf32, cuda, ms: here | pytorch, tf32, cuda, graphs, ms: here |" in text
    assert "a card, 16 GiB" in text
    assert {o["execution"] for o in opened} == {"eager", "graphs"}
    assert len(opened) == 2 * 2 * len(find_exhibit("repghost/table-1").rows)


def test_rows_of_before_ran_in_the_usual_way() -> None:
    old = {
        "model": "net",
        "form": "plain",
        "engine": "pytorch",
        "batch_size": 1,
        "threads": 1,
        "input_size": [3, 8, 8],
    }
    row = Measurement.from_dict({"machine": "m", "configuration": old, "run": "1", "samples": [1.0]})
    assert row.configuration == Configuration("net", "plain", "pytorch", 1, 1, (3, 8, 8))
    assert row.configuration.way == Way("pytorch")
