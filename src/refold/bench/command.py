"""What `refold bench` does: measure with a progress bar, add other results, write the files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import nn

from refold.bench.page import write_page
from refold.bench.plots import save_plots
from refold.bench.results import Benchmark, parse_baseline, read_accuracies
from refold.bench.runner import BenchmarkInterrupted, benchmark
from refold.bench.tables import check_suffix, save_benchmark
from refold.errors import InputError
from refold.files import check_writable


@dataclass(frozen=True)
class BenchmarkOptions:
    """What a run may be told besides what is measured: files to read, and files to write by their suffix."""

    outputs: Sequence[Path] = ()
    merge: Sequence[Path] = ()
    accuracies: Path | None = None
    baseline: str | None = None
    resume: bool = False
    html: Path | None = None
    plots: Path | None = None
    measuring: Mapping[str, Any] = field(default_factory=dict)


def run(models: Mapping[str, nn.Module], options: BenchmarkOptions, console: Console) -> Benchmark:
    """Measure `models`, merge in earlier results, write everything, and return all of it.

    Without models the earlier results alone are merged and written. Raises `InputError` before anything is
    measured where a file cannot be used, and `BenchmarkInterrupted` on Ctrl-C after writing what there is.
    """
    for path in options.outputs:
        check_suffix(check_writable(path))
    if options.html is not None:
        check_writable(options.html)
    earlier = [Benchmark.load(path) for path in options.merge]
    accuracies = {} if options.accuracies is None else read_accuracies(options.accuracies)
    if not models and not earlier:
        raise InputError("There is nothing to show; name a model to measure or a result to --merge.")
    kept = next((path for path in options.outputs if path.suffix.lower() == ".json"), None)
    interrupted = False
    result = Benchmark()
    if models:
        try:
            with progress(console) as on_progress:
                result = benchmark(
                    models,
                    baseline=options.baseline,
                    output=kept,
                    resume=options.resume,
                    on_progress=on_progress,
                    **options.measuring,
                )
        except BenchmarkInterrupted as stopped:
            result, interrupted = stopped.result, True
    result = result.merged(*earlier)
    result.accuracies |= accuracies
    if options.baseline is not None:
        parse_baseline(options.baseline, [row.configuration for row in result.rows])
        result.baseline = options.baseline
    for path in options.outputs:
        save_benchmark(result, path)
    if options.html is not None:
        write_page(result, options.html)
    if options.plots is not None:
        save_plots(result, options.plots)
    if interrupted:
        raise BenchmarkInterrupted(result)
    return result


@contextmanager
def progress(console: Console) -> Any:
    """A progress bar that goes when the block ends; gives the function to report to."""
    columns = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda text, share: bar.update(task, description=text, completed=share)
