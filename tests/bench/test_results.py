"""Rows: ratios, merging, files and tables."""

import csv
import dataclasses
import io
import json
from pathlib import Path

import pytest
from fakes import a_benchmark, a_machine, configuration, row
from rich.console import Console

from refold.bench import Benchmark, Configuration, Timing, save_benchmark, to_rich
from refold.bench.results import parse_baseline, read_accuracies
from refold.bench.tables import failures
from refold.errors import InputError

PLAIN, TRAINING = configuration(), configuration(form="training")


def test_quartiles() -> None:
    assert Timing(tuple(float(i) for i in range(9))).quartiles == (2.0, 6.0)
    assert Timing((4.0,)).quartiles == (4.0, 4.0)


def test_figures_of_a_row() -> None:
    measured = row(configuration(batch_size=8), [4.0, 2.0, 3.0])
    assert measured.throughput == pytest.approx(8000 / 3)
    assert measured.of_roof == 0.5
    with pytest.raises(InputError, match="was not measured: it broke"):
        _ = row(PLAIN, [], error="it broke").latency


def test_ratio_of_pairs_and_of_medians() -> None:
    result = Benchmark({"a processor": a_machine()}, baseline="training")
    # A slow third round hits both: pairs do not see it.
    result.rows = [row(TRAINING, [2.0, 2.0, 30.0]), row(PLAIN, [1.0, 1.0, 15.0])]
    ratio = result.ratio(result.rows[1])
    assert ratio is not None
    assert (ratio.value, ratio.paired) == (0.5, True)
    result.rows[1] = row(PLAIN, [1.0, 4.0, 15.0], run="another")
    ratio = result.ratio(result.rows[1])
    assert ratio is not None
    assert (ratio.value, ratio.paired) == (2.0, False)


def test_baseline_fixes_some_and_keeps_the_rest() -> None:
    result = a_benchmark()
    last = next(row for row in result.rows if row.configuration == configuration("fast", "plain", "pytorch"))
    for baseline, expected in (
        ("training", configuration("fast", "training", "pytorch")),
        ("slow", configuration("slow", "plain", "pytorch")),
        ("onnxruntime", configuration("fast", "plain", "onnxruntime")),
        ("slow, training,onnxruntime", configuration("slow", "training", "onnxruntime")),
    ):
        result.baseline = baseline
        reference = result.reference(last)
        assert reference is not None
        assert reference.configuration == expected
    result.baseline = "broken"
    assert result.ratio(last) is None  # its row has no samples


@pytest.mark.parametrize(
    ("text", "reason"), [("fat", "was not measured"), ("training,plain", "two of one kind")]
)
def test_wrong_baselines(text: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        parse_baseline(text, [PLAIN, TRAINING])


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    result = a_benchmark()
    result.accuracies = {"fast": 70.5}
    result.save(tmp_path / "result.json")
    loaded = Benchmark.load(tmp_path / "result.json")
    assert loaded == result
    assert loaded.machines["a processor"].roofs == result.machines["a processor"].roofs
    for wrong in ("{}", "[1]", '{"format": "another"}', "no JSON"):
        (tmp_path / "wrong.json").write_text(wrong)
        with pytest.raises(InputError, match="holds no benchmark"):
            Benchmark.load(tmp_path / "wrong.json")
    with pytest.raises(InputError, match="cannot be read"):
        Benchmark.load(tmp_path / "no.json")
    with pytest.raises(InputError, match=r"ends in .json, .csv or .md"):
        save_benchmark(result, tmp_path / "result.txt")
    with pytest.raises(InputError, match=r"does not end in .json; refold.bench.save_benchmark"):
        result.save(tmp_path / "result.csv")
    save_benchmark(result, tmp_path / "again.json")
    assert Benchmark.load(tmp_path / "again.json") == result


def test_merging_machines() -> None:
    here, there = a_benchmark(), a_benchmark()
    there.machines = {"a processor": a_machine("another processor")}
    merged = here.merged(there)
    assert list(merged.machines) == ["a processor", "a processor (2)"]
    assert len(merged.rows) == 2 * len(here.rows)
    assert {row.machine for row in merged.rows} == set(merged.machines)
    # The same machine: rows of the later benchmark take their places, unless they have no samples.
    later = Benchmark({"a processor": a_machine()}, [row(PLAIN, [9.0]), row(TRAINING, [], error="it broke")])
    first = Benchmark({"a processor": a_machine()}, [row(PLAIN, [1.0]), row(TRAINING, [2.0])])
    assert [row.samples for row in first.merged(later).rows] == [(9.0,), (2.0,)]
    assert list(first.merged(later).machines) == ["a processor"]
    # An update of PyTorch makes another machine: old and new figures do not mix.
    updated = dataclasses.replace(a_machine(), versions={"torch": "2.16"})
    assert list(first.merged(Benchmark({"a processor": updated})).machines) == [
        "a processor",
        "a processor (2)",
    ]


def test_csv_holds_plain_numbers(tmp_path: Path) -> None:
    save_benchmark(a_benchmark(), tmp_path / "result.csv")
    lines = list(csv.DictReader((tmp_path / "result.csv").read_text().splitlines()))
    assert len(lines) == 9
    plain = next(line for line in lines if line["model"] == "slow" and line["form"] == "plain")
    assert float(plain["median_ms"]) == 6.0
    assert float(plain["ratio"]) == 0.5
    assert float(plain["images_per_second"]) == pytest.approx(1000 / 6)
    assert float(plain["of_roof"]) == 0.25
    assert plain["rounds"] == "4"
    assert lines[-1]["median_ms"] == ""
    assert "SIGSEGV" in lines[-1]["error"]


def test_markdown_and_terminal_say_the_same(tmp_path: Path) -> None:
    result = a_benchmark()
    save_benchmark(result, tmp_path / "result.md")
    text = (tmp_path / "result.md").read_text()
    assert "| fast | plain | onnxruntime | 3.00 | 3.00 … 3.00 | 0.50 | 333.3 |" in text
    assert "| slow | training | pytorch | 36.00 |" in text
    assert "batch 1, threads 1, image 3x224x224, medians of 4 rounds" in text
    assert "a processor, x86_64, 2 cores, 8 GiB; Linux 6, Python 3.11.7; torch 2.15" in text
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(to_rich(result))
    shown = console.export_text()
    for said in (
        "36.00",
        "batch 1, threads 1",
        "not measured: fast, plain, broken, batch 1, threads 1: its process",
    ):
        assert said in shown
        assert said in text


def test_unpaired_ratios_are_marked(tmp_path: Path) -> None:
    result = Benchmark(
        {"a processor": a_machine()}, [row(TRAINING, [2.0]), row(PLAIN, [1.0], run="2")], "training"
    )
    save_benchmark(result, tmp_path / "result.md")
    assert "0.50 *" in (tmp_path / "result.md").read_text()
    assert "* not measured in the same run" in (tmp_path / "result.md").read_text()


def test_accuracies(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"fast": 70, "slow,plain": 0.72}))
    (tmp_path / "a.csv").write_text("model,top-1\nfast,70\nslow,plain,0.72\n")
    expected = {"fast": 70.0, "slow,plain": 0.72}
    assert read_accuracies(tmp_path / "a.json") == expected
    assert read_accuracies(tmp_path / "a.csv") == expected
    result = a_benchmark()
    result.accuracies = expected
    shares = {(row.configuration.model, row.configuration.form): result.accuracy(row) for row in result.rows}
    assert shares == {
        ("slow", "training"): None,
        ("slow", "plain"): 0.72,
        ("fast", "training"): 70.0,
        ("fast", "plain"): 70.0,
    }
    for name, content in (("w.json", "[1]"), ("w.csv", "a,b\nc,d\n"), ("w.json", "{"), ("w.csv", "")):
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match="holds no accuracies"):
            read_accuracies(tmp_path / name)


def test_a_configuration_reads_well() -> None:
    assert (
        str(Configuration("net", "plain", "pytorch", 2, 1, (3, 8, 8)))
        == "net, plain, pytorch, batch 2, threads 1"
    )


def test_a_breakdown_that_failed_is_told_beside_the_latency() -> None:
    result = Benchmark({"a processor": a_machine()}, [row(PLAIN, [1.0], error="no answer within 120 s")])
    ((name, reason),) = failures(result)
    assert name == str(PLAIN)
    assert reason == "memory or breakdown: no answer within 120 s"
