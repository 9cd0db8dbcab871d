"""Measuring our side of a table: sizes by counting, times by `refold.benchmark`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from refold.bench.papers.networks import YOLOV5, build
from refold.bench.papers.published import TIMES, Exhibit, PaperRow, find_exhibit
from refold.bench.papers.results import PaperTable, TimingSetup
from refold.bench.results import Benchmark
from refold.bench.runner import BenchmarkProgress, benchmark
from refold.bench.subjects import PLAIN, SHORTCUT_FOLDED, TRAINING
from refold.bench.ways import CHANNELS_FIRST, CPU, EAGER, ways
from refold.checkpoints import example_input
from refold.errors import InputError
from refold.export.request import FLOAT32
from refold.files import PathLike
from refold.folding import Cost, count, fold
from refold.models import list_models

_FOLDED_PIXELS = 64


def paper(
    name: str,
    *,
    latency: bool = True,
    engine: str | Sequence[str] = "onnxruntime",
    precisions: Sequence[str] = (FLOAT32,),
    device: str = CPU,
    executions: Sequence[str] = (EAGER,),
    memory_formats: Sequence[str] = (CHANNELS_FIRST,),
    threads: Sequence[int] = (1,),
    largest_batch: int | None = None,
    rounds: int = 30,
    warm_up: int = 5,
    only: Sequence[str] = (),
    results: PathLike | None = None,
    accuracies: Mapping[str, float] | None = None,
    machine: str | None = None,
    note: str = "",
    time_limit: float = 120.0,
    on_progress: BenchmarkProgress | None = None,
) -> PaperTable:
    """Measure our side of a published table or figure, such as "repghost/table-4" (`list_papers` names them).

    Sizes are counted for the training form and the plain form. Times are measured as `benchmark` does, in the form
    that the paper timed and with its batch sizes, of which `largest_batch` is the largest; `latency=False` leaves them
    out. `only` are patterns of rows or networks to measure, by default all. `results` is a .json file of `benchmark`
    that is written as the run goes; what it holds already is not measured again. `accuracies` by network, in percent,
    of what was trained here stand beside the quoted ones. The other arguments are those of `benchmark`.

    Raises `InputError` for an unknown name or pattern, with the nearest, and `BenchmarkInterrupted` on Ctrl-C.
    """
    exhibit = find_exhibit(name)
    if only:
        exhibit = exhibit.only(tuple(only))
    if largest_batch is not None and largest_batch < 1:
        raise InputError(f"largest_batch is {largest_batch}; give at least 1.")
    report = on_progress or (lambda text, share: None)
    chosen = ways(engine, precisions, device, executions, memory_formats)
    timed = latency and bool(exhibit.columns_of(*TIMES))
    sizes = _sizes(exhibit, lambda text, share: report(text, share * (0.1 if timed else 1.0)))
    if not timed:
        return PaperTable(exhibit, sizes, accuracies=accuracies or {})
    printed = {column.batch_size for _, column in exhibit.columns_of(*TIMES)}
    batch_sizes = sorted({min(size, largest_batch or size) for size in printed})
    measured = _times(
        exhibit,
        engine=engine,
        precisions=precisions,
        device=device,
        executions=executions,
        memory_formats=memory_formats,
        batch_sizes=batch_sizes,
        threads=threads,
        rounds=rounds,
        warm_up=warm_up,
        breakdown=exhibit.breakdown,
        output=results,
        machine=machine,
        note=note,
        time_limit=time_limit,
        on_progress=lambda text, share: report(text, 0.1 + 0.9 * share),
    )
    setups = [TimingSetup(w, t, b) for b in batch_sizes for t in threads for w in chosen]
    return PaperTable(exhibit, sizes, measured, tuple(setups), accuracies or {})


def _times(exhibit: Exhibit, *, output: PathLike | None, **arguments: Any) -> Benchmark:
    """The rows that are measured at the same image size take turns; the result holds none but theirs."""
    groups: dict[int | None, dict[str, PaperRow]] = {}
    forms: dict[str, list[str]] = {}
    for row in exhibit.rows:
        if row.network is not None:
            groups.setdefault(row.pixels, {})[row.subject] = row
            forms.setdefault(row.subject, []).append(row.timed)
    measured = Benchmark()
    for pixels, rows in groups.items():
        part = benchmark(
            {name: build(row) for name, row in rows.items()},
            forms=forms,
            input_size=None if pixels is None else (3, pixels, pixels),
            output=output,
            resume=output is not None and Path(output).exists(),
            **arguments,
        )
        part.rows = [row for row in part.rows if row.configuration.model in rows]
        measured = measured.merged(part)
    return measured


def _sizes(exhibit: Exhibit, report: BenchmarkProgress) -> dict[str, dict[str, Cost]]:
    rows = [row for row in exhibit.rows if row.has_size]
    own = set(list_models())
    known: dict[tuple[str, int | None, str], Cost] = {}
    sizes: dict[str, dict[str, Cost]] = {}
    for done, row in enumerate(rows):
        report(f"counting {row.subject}", done / len(rows))
        forms = (TRAINING, PLAIN, row.form) if row.network in own and not row.linear else (row.form,)
        sizes[row.model] = {}
        for form in dict.fromkeys(forms):
            key = (row.subject, row.pixels, form)
            if key not in known:
                known[key] = count_size(row, form)
            sizes[row.model][form] = known[key]
    return sizes


def count_size(row: PaperRow, form: str) -> Cost:
    """The cost of one image of a row's network in a form."""
    size = None if row.pixels is None else (3, row.pixels, row.pixels)
    if form == TRAINING:
        network = build(row, device="meta")
        return count(network, example_input(network, size))
    network = build(row)
    image = example_input(network, size)
    if not row.linear:
        # Folding needs an image, but a small one does where the network takes any.
        takes_any = row.network in list_models() or row.network == YOLOV5
        small = takes_any and min(image.shape[2:]) > _FOLDED_PIXELS
        network = folded(network, image[..., :_FOLDED_PIXELS, :_FOLDED_PIXELS] if small else image, form)
    return count(network.to("meta"), image.to("meta"))


def folded(network: nn.Module, image: Tensor, form: str) -> nn.Module:
    """The plain or the shortcut-folded form, for its size: without the proof."""
    if form == SHORTCUT_FOLDED:
        # The paper's form has one kernel in each unit, which for RepUnit1 takes more multiplications.
        return fold(network, image, prove=False, shortcuts="fold", objective="operators")
    return fold(network, image, prove=False)
