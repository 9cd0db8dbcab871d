"""A benchmark as one HTML page that needs nothing else: plots inside, tables that sort, fit for phone and paper."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from refold.bench import tables
from refold.bench.breakdown import KINDS
from refold.bench.colours import themed, variables
from refold.bench.drawings import SECTIONS
from refold.bench.plots import Plot, plots
from refold.bench.results import Benchmark
from refold.files import PathLike, write_text
from refold.templates import template

_EXPLAINED = {
    "Accuracy against latency": "Left and up is better. The dashed line is the Pareto front: no other point is both "
    "faster and more accurate than one on it. Grey lines join the forms of a network, small grey points are the "
    "networks of the other parts.",
    "Latency": "Bars are medians, the thin lines span the interquartile range.",
    "Throughput": "Images a second at the median latency.",
    "Time by kind of operator": "From a separate, profiled run of each network: the profiler itself costs time, so "
    "compare the shares; the milliseconds behind each bar are their sum. What an engine fuses counts as the "
    "operator it was fused into.",
    "Roofline": "The lines are what this machine reached in matrix products and in copies of data in memory and in "
    "cache. A point is a network: what it computes for each byte that its convolutions and matrix products must "
    "move, and the rate it reached. The floor in the table adds up, layer by layer, the longer of computing and "
    "moving; a 3x3 convolution computed in fewer multiplications (Winograd) can come below it.",
}


@dataclass(frozen=True)
class PageCell:
    """A table cell: what is shown, and what it is sorted by."""

    text: str
    key: str
    number: bool


@dataclass(frozen=True)
class PageTable:
    """A table of the page; `numbers` tells which columns sort as numbers."""

    title: str
    headings: list[str]
    numbers: list[bool]
    rows: list[list[PageCell]]


def to_html(benchmark: Benchmark, title: str = "Benchmark") -> str:
    """The whole page."""
    drawn = plots(benchmark)
    sections = {
        name: [(plot, Markup(_labelled(plot))) for plot in drawn if plot.section == name] for name in SECTIONS
    }
    return template("refold.bench", "page.html.jinja").render(
        title=title,
        common=tables.common(benchmark),
        machines=[tables.describe(name, machine) for name, machine in benchmark.machines.items()],
        sections={name: found for name, found in sections.items() if found},
        explained=_EXPLAINED,
        colours={"light": variables(dark=False), "dark": variables(dark=True)},
        tables=[
            table for table in (_results(benchmark), _breakdown(benchmark), _roofs(benchmark)) if table.rows
        ],
        failures=tables.failures(benchmark),
    )


def write_page(benchmark: Benchmark, path: PathLike, title: str = "Benchmark") -> None:
    """Write the page; raises `InputError` where ``path`` cannot be written."""
    write_text(path, to_html(benchmark, title))


def _labelled(plot: Plot) -> str:
    """The SVG with its summary for screen readers, its size left to the page; the text of `plot` is escaped."""
    head, body = plot.svg().split(">", 1)
    attributes = " ".join(part for part in head.split() if not part.startswith(("width=", "height=")))
    return f'{attributes} role="img" aria-label="{Markup.escape(plot.summary)}">{themed(body)}'


def _results(benchmark: Benchmark) -> PageTable:
    chosen = tables.columns(benchmark)
    rows = [
        [_cell(tables.cell(benchmark, row, column), column.number) for column in chosen]
        for row in benchmark.measured
    ]
    return PageTable("All results", [c.heading for c in chosen], [c.number for c in chosen], rows)


def _breakdown(benchmark: Benchmark) -> PageTable:
    known = [(row, row.breakdown) for row in benchmark.measured if row.breakdown]
    kinds = [kind for kind in KINDS if any(kind in times for _, times in known)]
    identity = [c for c in tables.columns(benchmark) if c in tables.IDENTITY]
    rows = []
    for row, times in known:
        cells = [_cell(tables.cell(benchmark, row, column), column.number) for column in identity]
        rows.append(cells + [_cell(f"{times[kind]:.3f}" if kind in times else "", True) for kind in kinds])
    headings = [column.heading for column in identity] + kinds
    return PageTable(
        "Milliseconds by kind of operator", headings, [c.number for c in identity] + [True] * len(kinds), rows
    )


def _roofs(benchmark: Benchmark) -> PageTable:
    rows = []
    for name, machine in benchmark.machines.items():
        for threads, roof in sorted(machine.roofs.items()):
            for size, rate in roof.bandwidth:
                figures = (str(threads), f"{roof.flops / 1e9:.1f}", f"{size / 2**20:g}", f"{rate / 1e9:.1f}")
                rows.append([_cell(name, False), *(_cell(figure, True) for figure in figures)])
    headings = ["machine", "threads", "matrix product GFLOP/s", "copy MiB", "copy GB/s"]
    return PageTable("Roofs of the machine", headings, [False, True, True, True, True], rows)


def _cell(text: str, number: bool) -> PageCell:
    first = text.split()[0] if text.split() else ""
    return PageCell(text, first.rstrip("%") if number else text, number)
