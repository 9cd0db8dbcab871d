"""A benchmark from end to end, with fake processes and once with real ones."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import FakeNetwork
from torch import Tensor, nn

import refold
from refold import cli
from refold.bench import Benchmark, BenchmarkInterrupted, subjects
from refold.bench import runner as runner_module
from refold.bench.subjects import Files, Subject
from refold.bench.turns import TimingFailed
from refold.errors import InputError
from refold.export.request import PRECISIONS


def small_net() -> nn.Module:
    """A convolution and a batch norm, which fold to one."""
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()


class FakeWorker(FakeNetwork):
    """A process that answers from a list."""

    def ask(self, do: str, **_: Any) -> Any:
        return {"memory": 1000, "breakdown": {"add": 1.0}}[do]


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every turn that is taken; a batch size of 13 breaks, the turn numbered by `STOP` is Ctrl-C."""
    turns: list[str] = []

    def open_fake(engine: str, path: Path, *, shape: tuple[int, ...], **_: Any) -> FakeWorker:
        if shape[0] == 13:
            raise TimingFailed("its process ended with SIGSEGV")
        return FakeWorker(f"{engine} {shape[0]}", [float(turn + 1) for turn in range(50)], turns)

    monkeypatch.setattr(runner_module, "open_worker", open_fake)
    monkeypatch.setattr(runner_module.Files, "path", lambda *_: Path("net"))
    return turns


def measure(**arguments: Any) -> Benchmark:
    settings: dict[str, Any] = {
        "forms": ["training", "plain"],
        "rounds": 3,
        "warm_up": 1,
        "input_size": (3, 8, 8),
    }
    models = arguments.pop("models", {"net": small_net()})
    return refold.benchmark(models, **{**settings, **arguments})


def test_every_combination_has_a_row_and_takes_turns(journal: list[str]) -> None:
    shares: list[float] = []
    result = measure(
        engine=["pytorch", "onnxruntime"],
        batch_sizes=[1, 2],
        threads=[1],
        breakdown=True,
        on_progress=lambda _, share: shares.append(share),
    )
    assert len(result.rows) == 2 * 2 * 2
    turn = ["pytorch 1"] * 2 + ["onnxruntime 1"] * 2
    assert journal[:16] == [f"warm {name}" for name in turn] + turn * 3
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    training, plain = result.rows[:2]
    assert (training.configuration.form, plain.configuration.form) == ("training", "plain")
    assert (training.operators, plain.operators) == (2, 1)
    assert training.samples == (1.0, 2.0, 3.0)
    assert plain.peak_memory == 1000
    assert plain.breakdown == {"add": 1.0}
    assert result.baseline == "training"
    assert len({row.run for row in result.rows}) == 2  # one for each batch size


def test_a_failure_is_a_row_and_the_rest_goes_on(journal: list[str]) -> None:
    result = measure(batch_sizes=[13, 2])
    assert [row.error for row in result.rows] == ["its process ended with SIGSEGV"] * 2 + [None] * 2
    assert [len(row.samples) for row in result.rows] == [0, 0, 3, 3]


def test_precisions_are_rows_of_their_own(journal: list[str]) -> None:
    result = measure(forms=["plain"], precisions=["float32", "float16"], baseline="float32")
    assert [row.configuration.precision for row in result.rows] == ["float32", "float16"]
    assert result.reference(result.rows[1]) == result.rows[0]
    assert "onnxruntime, float16, batch 1" in str(result.rows[1].configuration)


@pytest.mark.parametrize("engine", ["onnxruntime", "pytorch"])
def test_the_half_file_of_a_model_is_half(engine: str) -> None:
    images, subject = torch.randn(1, 3, 16, 16), Subject("net", nn.Conv2d(3, 400, 9), ("training",))
    with Files() as files:
        full, half = (files.path(subject, "training", engine, images, name) for name in PRECISIONS)
        assert half.stat().st_size < 0.6 * full.stat().st_size


class Vast(nn.Module):
    """A network of which no machine can hold the forward pass."""

    def forward(self, image: Tensor) -> Tensor:
        return image.new_empty(2**60).sum() + image


def test_what_does_not_fit_into_memory_is_a_row(journal: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    build = subjects.create_model

    def build_or_fail(name: str) -> nn.Module:
        if name == "vast":
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 2 EiB. More.")
        return build(name)

    monkeypatch.setattr(subjects, "create_model", build_or_fail)
    models = {"vast": "vast", "wide": Vast(), "net": small_net()}
    result = measure(models=models, forms=["training"])
    errors = {row.configuration.model: row.error for row in result.rows}
    assert "you tried to allocate 2 EiB" in str(errors["vast"])
    assert str(errors["wide"]).startswith("it cannot be prepared: Vast cannot run")
    assert "you tried to allocate" in str(errors["wide"])
    assert errors["net"] is None


def test_interrupted_and_resumed(journal: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    sample = FakeWorker.sample

    def stop_at_the_tenth_turn(worker: FakeWorker) -> float:
        if len(journal) == 10:
            raise KeyboardInterrupt
        return sample(worker)

    monkeypatch.setattr(FakeWorker, "sample", stop_at_the_tenth_turn)
    with pytest.raises(BenchmarkInterrupted) as stopped:
        measure(batch_sizes=[1, 2], output=path)
    # Batch 1: two warm-up turns and six; batch 2: two warm-up turns, then Ctrl-C.
    assert [len(row.samples) for row in Benchmark.load(path).rows] == [3, 3]
    assert stopped.value.result == Benchmark.load(path)
    monkeypatch.setattr(FakeWorker, "sample", sample)
    del journal[:]
    result = measure(batch_sizes=[1, 2], output=path, resume=True)
    assert journal == ["warm onnxruntime 2"] * 2 + ["onnxruntime 2"] * 6
    assert Benchmark.load(path) == result
    # More rounds: they are added to those there are, and count as the same run.
    del journal[:]
    runs = [row.run for row in result.rows]
    result = measure(batch_sizes=[1, 2], output=path, resume=True, rounds=5)
    assert [row.samples for row in result.rows] == [(1.0, 2.0, 3.0, 1.0, 2.0)] * 4
    assert [row.run for row in result.rows] == runs
    # Another model beside them is a run of its own.
    result = measure(models={"other": small_net()}, batch_sizes=[1], output=path, resume=True, rounds=5)
    assert len(result.rows) == 6
    assert result.rows[-1].run not in runs


def test_an_engine_that_fails_is_tried_again(journal: list[str], tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    measure(batch_sizes=[13], output=path)
    document = json.loads(path.read_text())
    for row in document["rows"]:
        row["configuration"]["batch_size"] = 2
    path.write_text(json.dumps(document))
    result = measure(batch_sizes=[2], output=path, resume=True)
    assert [row.error for row in result.rows] == [None, None]


def test_names_and_forms_of_models(journal: list[str]) -> None:
    net = small_net()
    plain = refold.fold(net, torch.randn(1, 3, 8, 8))
    rows = measure(models=[net, plain], forms=None).rows
    assert [(row.configuration.model, row.configuration.form) for row in rows] == [
        ("Sequential", "training"),
        ("Sequential", "plain"),
    ]
    # A folded model has no training form.
    assert [row.configuration.form for row in measure(models={"plain": plain}).rows] == ["plain"]
    with pytest.raises(InputError, match="Two models are named Sequential"):
        measure(models=[net, net], forms=None)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"rounds": 0}, "rounds is 0"),
        ({"batch_sizes": []}, "batch_sizes"),
        ({"threads": [0]}, "threads"),
        ({"engine": "steam"}, "no engine 'steam'"),
        ({"forms": ["round"]}, "no form 'round'"),
        ({"precisions": ["float8"]}, "no precision 'float8'"),
        ({"baseline": "nobody"}, "'nobody' was not measured"),
        ({"output": "results.txt"}, r"\.json"),
        ({"resume": True}, "nothing to resume"),
        ({"models": []}, "no model"),
    ],
)
def test_senseless_arguments(arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        measure(**arguments)


def test_a_real_run_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.console, "width", 120)
    Path("accuracies.csv").write_text("test_resnet,66.8\n")
    arguments = "bench test_resnet --form plain --input-size 32 --rounds 2 --warm-up 1 --breakdown"
    outputs = "-o r.json -o r.md -o r.csv --accuracies accuracies.csv --note tiny"
    monkeypatch.setattr(sys, "argv", ["refold", *arguments.split(), *outputs.split()])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert "test_resnet" in shown
    assert "66.8" in shown
    (row,) = Benchmark.load("r.json").rows
    assert len(row.samples) == 2
    assert min(row.samples) > 0
    assert row.breakdown is not None
    assert "k x k convolution" in row.breakdown
    assert next(iter(Benchmark.load("r.json").machines.values())).note == "tiny"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["accuracies.csv", "r.csv", "r.json", "r.md"]


def test_command_line_mistakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments, reason in (
        ("bench", "name a model"),
        ("bench --merge no.json", "'no.json' cannot be read"),
        ("bench repvgg_a0 -o result.txt", "ends in '.txt'"),
        ("bench repvgg_a0 --accuracies no.csv", "'no.csv' cannot be read"),
    ):
        monkeypatch.setattr(sys, "argv", ["refold", *arguments.split()])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == 2
        assert reason in capsys.readouterr().err


def test_results_are_merged_from_the_command_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    journal: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    measure(output="here.json", machine="here")
    measure(output="there.json", machine="there")
    monkeypatch.setattr(
        sys,
        "argv",
        ["refold", *["bench", "--merge", "here.json", "--merge", "there.json", "-o", "both.json"]],
    )
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 0
    assert list(Benchmark.load("both.json").machines) == ["here", "there"]
    assert len(Benchmark.load("both.json").rows) == 4


@pytest.mark.slow
def test_int8_files_are_rows_of_their_own():
    result = refold.benchmark(
        "repghostnet_050",
        precisions=("float32", "int8"),
        input_size=(3, 64, 64),
        rounds=3,
        warm_up=1,
    )
    rows = {(row.configuration.form, row.configuration.precision): row for row in result.rows}
    assert rows["plain", "int8"].error is None
    assert rows["plain", "int8"].samples
    assert "made of the plain form" in rows["training", "int8"].error
