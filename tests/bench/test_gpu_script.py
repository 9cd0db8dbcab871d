"""The script that fills the papers' columns of graphics cards, in a form that a processor can do."""

import subprocess
import sys
from pathlib import Path

import pytest

from refold.bench import Benchmark

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False
    )


def test_without_time_nothing_is_begun_and_all_is_named(tmp_path: Path) -> None:
    left = run("--minutes", "0", "--folder", str(tmp_path))
    assert left.returncode == 1
    tables = [line.partition(":")[0] for line in left.stdout.splitlines()]
    assert {"ghostnets/table-15", "ghostnets/table-17", "ghostnets/table-18"} <= set(tables)
    assert {"repvgg/figure-4", "repvgg/figure-6"} <= set(tables)
    assert {f"repnext/table-{number}" for number in (2, 3, 4, 5, 6)} <= set(tables)
    assert all(line.endswith(": not begun, 0 s left") for line in left.stdout.splitlines())
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_one_small_network_is_measured_and_kept(tmp_path: Path) -> None:
    small = ("--tables", "repghost/table-1", "--only", "neither", "--largest-batch", "1")
    arguments = ("--device", "cpu", "--folder", str(tmp_path), "--rounds", "2", *small)
    first = run(*arguments)
    assert (first.returncode, first.stdout[:24]) == (0, "repghost/table-1: done, "), first.stderr
    assert "| neither | training | 1 |" in (tmp_path / "repghost-table-1.md").read_text()
    (row,) = Benchmark.load(tmp_path / "results.json").rows
    assert len(row.samples) == 2
    assert run(*arguments).returncode == 0
    assert Benchmark.load(tmp_path / "results.json").rows == [row]  # nothing is measured again
    # Where the time ends, what runs is interrupted; what there was stays.
    late = run(*arguments[:-5], "repghost/figure-2", "--minutes", "0.02")
    assert (late.returncode, late.stdout) == (1, "repghost/figure-2: interrupted, 0 s left\n")
    assert Benchmark.load(tmp_path / "results.json").rows == [row]
