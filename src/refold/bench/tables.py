"""A benchmark as a table: on the terminal, as CSV and as Markdown, and its files."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from refold.bench.machine import Machine
from refold.bench.results import Benchmark, Measurement
from refold.bench.ways import CHANNELS_FIRST, CPU, EAGER
from refold.bench.worker import PYTORCH
from refold.errors import InputError
from refold.files import PathLike, write_text

CellValue = str | float | int | None


@dataclass(frozen=True)
class PrintedColumn:
    """One column: its heading, the value of a row (None: nothing), and how a value is shown.

    A value that is the `usual` one of all rows is not worth saying.
    """

    heading: str
    value: Callable[[Benchmark, Measurement], CellValue]
    show: Callable[[Any], str] = str
    number: bool = True
    usual: CellValue = None


def _ratio(benchmark: Benchmark, row: Measurement) -> str | None:
    ratio = benchmark.ratio(row)
    return None if ratio is None else f"{ratio.value:.2f}{'' if ratio.paired else ' *'}"


def _sampled(value: Callable[[Measurement], float]) -> Callable[[Benchmark, Measurement], float | None]:
    return lambda _, row: value(row) if row.samples else None


def _of_pytorch(name: str) -> Callable[[Benchmark, Measurement], str | None]:
    return lambda _, row: getattr(row.configuration, name) if row.configuration.engine == PYTORCH else None


# What tells rows apart; on the terminal and in Markdown one that is the same in all rows goes into the caption.
IDENTITY = (
    PrintedColumn("machine", lambda _, row: row.machine, number=False),
    PrintedColumn("model", lambda _, row: row.configuration.model, number=False),
    PrintedColumn("form", lambda _, row: row.configuration.form, number=False),
    PrintedColumn("engine", lambda _, row: row.configuration.engine, number=False),
    PrintedColumn("precision", lambda _, row: row.configuration.precision, number=False),
    PrintedColumn("device", _of_pytorch("device"), number=False, usual=CPU),
    PrintedColumn("execution", _of_pytorch("execution"), number=False, usual=EAGER),
    PrintedColumn("memory format", _of_pytorch("memory_format"), number=False, usual=CHANNELS_FIRST),
    PrintedColumn("batch", lambda _, row: row.configuration.batch_size),
    PrintedColumn("threads", lambda _, row: row.configuration.threads),
    PrintedColumn("image", lambda _, row: "x".join(map(str, row.configuration.input_size)), number=False),
)
_FIGURES = (
    PrintedColumn("ms", _sampled(lambda row: row.latency.median), lambda ms: f"{ms:.2f}"),
    PrintedColumn("interquartile range", lambda _, row: _quartiles(row)),
    PrintedColumn("ratio", _ratio),
    PrintedColumn("images/s", _sampled(lambda row: row.throughput), lambda rate: f"{rate:.1f}"),
    PrintedColumn("top-1", lambda benchmark, row: benchmark.accuracy(row), lambda value: f"{value:g}"),
    PrintedColumn("params M", lambda _, row: row.parameters, lambda n: f"{n / 1e6:.2f}"),
    PrintedColumn("MACs M", lambda _, row: row.macs, lambda n: f"{n / 1e6:.1f}"),
    PrintedColumn("operators", lambda _, row: row.operators),
    PrintedColumn("peak MB", lambda _, row: row.peak_memory, lambda n: f"{n / 1e6:.0f}"),
    PrintedColumn("floor ms", lambda _, row: row.floor, lambda ms: f"{ms:.2f}"),
    PrintedColumn("of roofline peak", lambda _, row: row.of_roof, lambda share: f"{share:.0%}"),
)


def _quartiles(row: Measurement) -> str | None:
    if not row.samples:
        return None
    first, third = row.latency.quartiles
    return f"{first:.2f} … {third:.2f}"


def columns(benchmark: Benchmark, *, all_identity: bool = False) -> list[PrintedColumn]:
    """The columns that say something: identities that differ (or all), figures that some row has."""
    chosen = [
        column
        for column in IDENTITY
        if all_identity or column.heading == "model" or len(_values(benchmark, column) - {None}) > 1
    ]
    return chosen + [column for column in _FIGURES if _values(benchmark, column) - {None}]


def cell(benchmark: Benchmark, row: Measurement, column: PrintedColumn) -> str:
    """What stands in one cell."""
    value = column.value(benchmark, row)
    return "" if value is None else column.show(value)


def common(benchmark: Benchmark) -> str:
    """What all rows have in common and no column shows, with the meaning of the ratio, as one line."""
    parts = [
        f"{column.heading} {column.show(next(iter(values)))}"
        for column in IDENTITY
        if column.heading != "model"
        and len(values := _values(benchmark, column) - {None}) == 1
        and values != {column.usual}
    ]
    counts = {len(row.samples) for row in benchmark.measured}
    if counts:
        parts.append(f"medians of {'/'.join(map(str, sorted(counts)))} rounds taken in turn")
    ratios = [ratio for row in benchmark.rows if (ratio := benchmark.ratio(row)) is not None]
    if ratios:
        parts.append(f"ratio to {benchmark.baseline}")
    if any(not ratio.paired for ratio in ratios):
        parts.append("* not measured in the same run")
    return ", ".join(parts)


def failures(benchmark: Benchmark) -> list[tuple[str, str]]:
    """Configuration and reason of every row that lacks its samples, or what was asked for besides them."""
    return [
        (
            str(row.configuration),
            f"memory or breakdown: {row.error}" if row.samples else row.error or "interrupted",
        )
        for row in benchmark.rows
        if row.error is not None or not row.samples
    ]


def describe(name: str, machine: Machine) -> str:
    """A machine's facts as one line."""
    memory = "" if machine.memory is None else f", {machine.memory / 2**30:.0f} GiB"
    note = f" ({machine.note})" if machine.note else ""
    own = "" if name in (machine.cpu, machine.name) else f"{name}: "
    gpu = "" if machine.gpu is None else f"{machine.gpu}; "
    versions = ", ".join(f"{package} {version}" for package, version in machine.versions.items())
    cores = f"{machine.cores} core{'s' if machine.cores != 1 else ''}"
    return (
        f"{own}{gpu}{machine.cpu}, {machine.architecture}, {cores}{memory}{note}; {machine.system}, "
        f"Python {machine.python}; {versions}"
    )


def to_rich(benchmark: Benchmark) -> Table:
    """The table for the terminal; what could not be measured stands below it."""
    chosen = columns(benchmark)
    caption = [common(benchmark)]
    caption += [f"not measured: {name}: {reason}" for name, reason in failures(benchmark)]
    table = Table(caption=escape("\n".join(caption)), caption_justify="left")
    for column in chosen:
        table.add_column(
            column.heading,
            justify="right" if column.number else "left",
            overflow="fold",
            no_wrap=column.number,
        )
    for row in benchmark.measured:
        table.add_row(*(escape(cell(benchmark, row, column)) for column in chosen))
    return table


def to_csv(benchmark: Benchmark) -> str:
    """Every row with plain numbers: milliseconds, bytes, images a second."""
    text = io.StringIO()
    identity = list(IDENTITY)
    writer = csv.writer(text, lineterminator="\n")
    figures = (
        *(
            "median_ms",
            "first_quartile_ms",
            "third_quartile_ms",
            "ratio",
            "ratio_paired",
            "images_per_second",
        ),
        *(
            "rounds",
            "accuracy",
            "parameters",
            "macs",
            "operators",
            "peak_memory_bytes",
            "floor_ms",
            "of_roof",
        ),
        "error",
    )
    writer.writerow([*(column.heading for column in identity), *figures])
    for row in benchmark.rows:
        writer.writerow([*(column.value(benchmark, row) for column in identity), *_plain(benchmark, row)])
    return text.getvalue()


def _plain(benchmark: Benchmark, row: Measurement) -> list[CellValue]:
    ratio = benchmark.ratio(row)
    measured: list[CellValue] = [None] * 3
    if row.samples:
        measured = [row.latency.median, *row.latency.quartiles]
    return [
        *measured,
        None if ratio is None else ratio.value,
        None if ratio is None else ("yes" if ratio.paired else "no"),
        row.throughput if row.samples else None,
        len(row.samples),
        benchmark.accuracy(row),
        row.parameters,
        row.macs,
        row.operators,
        row.peak_memory,
        row.floor,
        row.of_roof,
        row.error,
    ]


def to_markdown(benchmark: Benchmark) -> str:
    """The table, what its rows have in common, the machines, and what could not be measured."""
    chosen = columns(benchmark)
    lines = [
        "| " + " | ".join(column.heading for column in chosen) + " |",
        "|" + "|".join("--:" if column.number else "---" for column in chosen) + "|",
    ]
    for row in benchmark.measured:
        cells = (cell(benchmark, row, column).replace("|", "\\|") for column in chosen)
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"{common(benchmark)}."]
    lines += ["", *(f"- {describe(name, machine)}" for name, machine in benchmark.machines.items())]
    lines += [f"- not measured: {name}: {reason}" for name, reason in failures(benchmark)]
    return "\n".join(lines) + "\n"


def check_suffix(path: PathLike) -> str:
    """The suffix of a file that `save_benchmark` can write; raises `InputError` for any other."""
    suffix = Path(path).suffix.lower()
    if suffix not in (".json", ".csv", ".md"):
        raise InputError(f"'{path}' ends in '{suffix}'; give a name that ends in .json, .csv or .md.")
    return suffix


def save_benchmark(benchmark: Benchmark, path: PathLike) -> None:
    """Write a benchmark; the suffix says how: .json (all of it, for `Benchmark.load`), .csv or .md (the table).

    Raises `InputError` where the suffix is another or the file cannot be written.
    """
    suffix = check_suffix(path)
    if suffix == ".json":
        benchmark.save(path)
    else:
        write_text(path, to_csv(benchmark) if suffix == ".csv" else to_markdown(benchmark))


def _values(benchmark: Benchmark, column: PrintedColumn) -> set[CellValue]:
    return {column.value(benchmark, row) for row in benchmark.rows}
