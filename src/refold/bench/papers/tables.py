"""A paper's table with our side of it: on the terminal, as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict
from statistics import median
from typing import Any

from rich.console import Group

from refold.bench.breakdown import KINDS
from refold.bench.papers.grids import Grid, markdown_page, rich_page
from refold.bench.papers.published import QUOTED, SIZES, TIMES, PaperColumn, PaperRow
from refold.bench.papers.results import PaperTable, TimingSetup
from refold.bench.papers.values import PaperValue, deviation, published_ratio, values
from refold.bench.tables import check_suffix, describe, failures
from refold.bench.ways import Way
from refold.files import PathLike, write_text

FORMAT = "refold paper 1"
_TITLES = {
    "parameters": "params",
    "macs": "MACs",
    "macs_and_norms": "MACs + 4 × elements of batch norms,",
    "activations": "activations",
    "winograd_multiplications": "Winograd multiplications",
}


def grids(table: PaperTable) -> list[Grid]:
    """The tables to show: sizes with quoted accuracies, times, and time by kind of operator."""
    found = []
    exhibit = table.exhibit
    if table.sizes or exhibit.columns_of(*QUOTED):
        found.append(_size_grid(table))
    if exhibit.columns_of(*TIMES):
        found.append(_time_grid(table))
    if any(row.breakdown for row in table.benchmark.measured):
        found.append(_operator_grid(table))
    return found


def _size_grid(table: PaperTable) -> Grid:
    exhibit = table.exhibit
    columns = exhibit.columns_of(*SIZES)
    if not columns and table.sizes:  # nothing printed, but ours is worth knowing
        columns = [(-1, PaperColumn("parameters", "M")), (-1, PaperColumn("macs", "M"))]
    quoted = exhibit.columns_of(*QUOTED)
    trained = any(row.training for row in exhibit.rows)
    headings = ["model", "network here", *(["training"] if trained else [])]
    for place, column in columns:
        title = f"{_TITLES[column.quantity]} {'×' if column.unit == '10M' else ''}{column.unit}"
        headings += [f"{title}: paper", "here", "Δ"] if place >= 0 else [f"{title}: here"]
    headings += [f"{column.quantity} {column.unit}: quoted" for _, column in quoted]
    if table.accuracies:
        headings.append("top-1 %: here")
    rows = []
    for row in exhibit.rows:
        if row.network and not row.has_size:
            continue
        cells = [row.model, row.subject if row.network else "", *([row.training] if trained else [])]
        for place, column in columns:
            cells += _size_cells(table, row, place, column)
        cells += [row.values[place] for place, _ in quoted]
        if table.accuracies:
            here = table.accuracies.get(row.network or "")
            cells.append("" if here is None else f"{here:g}")
        rows.append(cells)
    return Grid(
        _size_title(table),
        headings,
        rows,
        2 + trained,
    )


def _size_title(table: PaperTable) -> str:
    if not table.sizes:
        return "As published"
    return "Sizes and costs of one image" + (
        "; accuracies as published" if table.exhibit.columns_of(*QUOTED) else ""
    )


def _size_cells(table: PaperTable, row: PaperRow, place: int, column: PaperColumn) -> list[str]:
    sizes = table.sizes.get(row.model, {})
    text = row.values[place] if place >= 0 else ""
    digits = max(
        len(text.partition(".")[2]) + 1, 2 if column.unit != "M" or column.quantity == "parameters" else 1
    )
    shown = [f"{column.scaled(getattr(cost, column.quantity)):.{digits}f}" for cost in sizes.values()]
    here = " → ".join(shown if len(set(shown)) > 1 else shown[:1])
    if place < 0:
        return [here]
    difference = ""
    if text and row.form in sizes:
        count = getattr(sizes[row.form], column.quantity)
        mark = "" if column.is_printed_as(count, text) else " ≠"
        difference = f"{deviation(column, text, count):+.1f}%{mark}"
    return [text, here, difference]


def _time_grid(table: PaperTable) -> Grid:
    exhibit = table.exhibit
    columns = exhibit.columns_of(*TIMES)
    devices = list(dict.fromkeys((column.on, column.quantity, column.unit) for _, column in columns))
    runs = list(dict.fromkeys((setup.way, setup.threads) for setup in table.setups))
    batches = list(dict.fromkeys(column.batch_size for _, column in columns))
    several = len({threads for _, threads in runs}) > 1
    is_rate = any(column.quantity == "throughput" for _, column in columns)
    headings = ["model", "form", "batch", *(f"{on}, {unit}: paper" for on, _, unit in devices)]
    for way, threads in runs:
        name = f"{way}, {threads} threads" if several else str(way)
        headings += [f"{name}, ms: here", *([f"{name}, images/s: here"] if is_rate else [])]
    rows = []
    for row in exhibit.rows:
        shown: set[int] = set()
        for batch in batches:
            at = {(c.on, c.quantity): place for place, c in columns if c.batch_size == batch}
            printed = [_printed_time(table, row, at.get((on, quantity))) for on, quantity, _ in devices]
            used = _used_batch(table, batch)
            # Where the paper's batch is too large, a smaller one stands for it, once.
            here = (
                [""] * (len(runs) * (1 + is_rate))
                if used in shown
                else _here(table, row, used, runs, is_rate)
            )
            if not any(printed) and not any(here):
                continue
            shown.add(used)
            size = f"{used} (paper: {batch})" if any(here) and used != batch else str(batch)
            rows.append([row.model, row.timed if row.network else "", size, *printed, *here])
    return Grid("Times", headings, rows, 2)


def _used_batch(table: PaperTable, batch: int) -> int:
    return max((s.batch_size for s in table.setups if s.batch_size <= batch), default=batch)


def _printed_time(table: PaperTable, row: PaperRow, place: int | None) -> str:
    if place is None or not row.values[place]:
        return ""
    ratio = published_ratio(table, row, place)
    return row.values[place] + ("" if ratio is None else f" ({ratio:.2f})")


def _here(
    table: PaperTable, row: PaperRow, batch: int, runs: list[tuple[Way, int]], is_rate: bool
) -> list[str]:
    cells: list[str] = []
    for way, threads in runs:
        setup = TimingSetup(way, threads, batch)
        timing = table.timing(row, setup)
        if timing is None:
            cells += [""] * (1 + is_rate)
            continue
        ratio = table.ratio(row, setup)
        cells.append(f"{timing.median:.2f}" + ("" if ratio is None else f" ({ratio:.2f})"))
        if is_rate:
            rate = 1000 * batch / timing.median
            cells.append(f"{rate:.1f}" + ("" if ratio is None else f" ({1 / ratio:.2f})"))
    return cells


def _operator_grid(table: PaperTable) -> Grid:
    found = []
    for row in table.exhibit.rows:
        for setup in table.setups:
            measured = table.measurement(row, setup)
            if measured is not None and measured.breakdown:
                found.append((row, setup, measured.breakdown))
    kinds = [kind for kind in KINDS if any(times.get(kind) for *_, times in found)]
    rows = []
    for row, setup, times in found:
        total = sum(times.values())
        shares = [f"{times.get(kind, 0.0) / total:.1%}" for kind in kinds]
        rows.append([row.model, str(setup.way), str(setup.batch_size), f"{total:.2f}", *shares])
    return Grid(
        "Share of the time in operators, from the engine's own profile",
        ["model", "engine", "batch", "ms", *kinds],
        rows,
        2,
    )


def remarks(table: PaperTable) -> list[str]:
    """What stands below the tables: conditions, comparisons, notes, machines, failures and the spread."""
    exhibit = table.exhibit
    lines = []
    if exhibit.settings:
        lines.append(f"published: {exhibit.settings}")
    if exhibit.command:
        lines.append(f"measured with: {exhibit.command}")
    if exhibit.recipe:
        command = "distill" if any(row.teacher for row in exhibit.rows) else "train"
        own = ", and the options of the row's training" if any(row.training for row in exhibit.rows) else ""
        lines.append(
            f"trained with: refold {command} --recipe {exhibit.recipe} --network NETWORK --data FOLDER{own}"
        )
    if any(len(sizes) > 1 for sizes in table.sizes.values()):
        lines.append("here: the training form → the plain form where they differ (→ shortcuts folded too)")
    if table.sizes and exhibit.columns_of(*SIZES):
        lines.append("Δ: ours to the printed value; ≠: ours, rounded or cut off, has other digits")
    if exhibit.columns_of(*TIMES):
        for reference in dict.fromkeys(row.against for row in exhibit.rows if row.against):
            compared = ", ".join(row.model for row in exhibit.rows if row.against == reference)
            lines.append(f"in brackets relative to {reference}: {compared}")
    subtracted = [f"{row.model} less {row.minus}" for row in exhibit.rows if row.minus]
    if subtracted:
        lines.append(f"differences, round by round: {'; '.join(subtracted)}")
    lines += [f"{row.model}: {row.note}" for row in exhibit.rows if row.note]
    if foreign := [row.model for row in exhibit.rows if not row.note and _is_other(table, row)]:
        lines.append(f"as timm or torchvision has them and by our counting: {', '.join(foreign)}")
    if table.setups:
        lines.append(_spread(table))
        lines += [describe(name, machine) for name, machine in table.benchmark.machines.items()]
    lines += [f"not measured: {name}: {reason}" for name, reason in failures(table.benchmark)]
    return [line for line in lines if line]


def _is_other(table: PaperTable, row: PaperRow) -> bool:
    """Whether some printed size of a row is not ours, rounded or cut off."""
    size = table.sizes.get(row.model, {}).get(row.form)
    columns = table.exhibit.columns_of(*SIZES)
    printed = [(column, row.values[place]) for place, column in columns if row.values[place]]
    return size is not None and any(
        not column.is_printed_as(getattr(size, column.quantity), text) for column, text in printed
    )


def _spread(table: PaperTable) -> str:
    widths, rounds = [], set()
    for row in table.exhibit.rows:
        for setup in table.setups:
            timing = table.timing(row, setup)
            if timing is not None and len(timing.samples) > 1:
                first, third = timing.quartiles
                widths.append((third - first) / abs(timing.median))
                rounds.add(len(timing.samples))
    if not widths:
        return ""
    return (
        f"times here: medians of {'/'.join(map(str, sorted(rounds)))} rounds taken in turn; their interquartile range "
        "spans "
        f"{median(widths):.0%} of the median as a rule, {max(widths):.0%} at most"
    )


def to_rich(table: PaperTable) -> Group:
    """The tables for the terminal, with the remarks below the last."""
    return rich_page(table.exhibit, grids(table), remarks(table))


def to_markdown(table: PaperTable) -> str:
    """The tables and the remarks."""
    return markdown_page(table.exhibit, grids(table), remarks(table))


def to_csv(table: PaperTable) -> str:
    """Every value in a line of its own."""
    text = io.StringIO()
    source = {"exhibit": table.exhibit.name, "source": table.exhibit.source}
    writer = csv.DictWriter(text, [*source, *PaperValue.__dataclass_fields__], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**source, **asdict(value)} for value in values(table))
    return text.getvalue()


def to_dict(table: PaperTable) -> dict[str, Any]:
    """All of it as plain JSON-able values, with the measurements as `refold bench` keeps them."""
    exhibit = table.exhibit
    return {
        "format": FORMAT,
        "name": exhibit.name,
        "source": exhibit.source,
        "paper": asdict(exhibit.paper),
        "title": exhibit.title,
        "settings": exhibit.settings,
        "values": [asdict(value) for value in values(table)],
        "benchmark": table.benchmark.to_dict() if table.setups else None,
    }


def save_paper_table(table: PaperTable, path: PathLike) -> None:
    """Write the table by its file's suffix: .json, .csv or .md. Raises `InputError` for another."""
    suffix = check_suffix(path)
    if suffix == ".json":
        write_text(path, json.dumps(to_dict(table), indent=1))
    else:
        write_text(path, to_csv(table) if suffix == ".csv" else to_markdown(table))
