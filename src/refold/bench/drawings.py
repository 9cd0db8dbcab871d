"""The drawings of a benchmark: accuracy against latency, latency, throughput, time by operator, and the roofline."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from refold.bench.breakdown import KINDS
from refold.bench.labels import label_points
from refold.bench.results import Benchmark, Measurement
from refold.bench.subjects import FORMS

_FORM_COLOURS = dict(zip(FORMS, ("#7a8ca3", "#2a78b8", "#e08a2e"), strict=True))
_MARKERS = "osD^vP*XdhH"
_KIND_COLOURS = dict(
    zip(
        KINDS,
        [
            "#1f4e79",
            "#2a78b8",
            "#8fc1e3",
            "#3d9a8b",
            "#c0392b",
            "#e6a09a",
            "#e08a2e",
            "#f3c14b",
            "#a05195",
            "#d45087",
            "#7f9c3b",
            "#5b4b8a",
            "#9aa5b1",
            "#d5dae0",
        ],
        strict=True,
    )
)
# As wide as a phone's page, so that the text keeps its size there; a desktop shows several beside each other.
_WIDTH = 4.8
STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "Liberation Sans", "DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
}


def pareto_front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (latency, accuracy) that no other beats in both, fastest first."""
    front: list[tuple[float, float]] = []
    for latency, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or accuracy > front[-1][1]:
            front.append((latency, accuracy))
    return front


Drawn = tuple[Figure, str] | None


def _accuracy(benchmark: Benchmark, rows: Sequence[Measurement]) -> Drawn:
    known = [(row, accuracy) for row in rows if (accuracy := benchmark.accuracy(row)) is not None]
    if not known:
        return None
    figure, axes = new_figure(3.8)
    points = [(row.latency.median, accuracy) for row, accuracy in known]
    front = pareto_front(points)
    axes.step(*zip(*front, strict=True), where="post", color="#444444", linewidth=1, linestyle="--", zorder=1)
    for model in dict.fromkeys(row.configuration.model for row, _ in known):
        mine = [(row.latency.median, accuracy) for row, accuracy in known if row.configuration.model == model]
        axes.plot(*zip(*mine, strict=True), color="#cccccc", linewidth=0.8, zorder=0)
    for form in _forms(rows):
        mine = [(row.latency.median, accuracy) for row, accuracy in known if row.configuration.form == form]
        if mine:
            latencies, values = zip(*mine, strict=True)
            axes.scatter(latencies, values, s=26, color=_FORM_COLOURS.get(form, "#333333"), label=form)
    fastest = {
        row.configuration.model: (row.latency.median, value)
        for row, value in sorted(known, key=lambda pair: -pair[0].latency.median)
    }
    axes.set(xlabel="latency (ms, median)", ylabel="top-1 accuracy")
    axes.margins(0.14)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    _legend_above(axes, len(_forms(rows)))
    label_points(axes, fastest, points)
    on_front = [row.configuration.model for row, value in known if (row.latency.median, value) in front]
    return figure, f"on the Pareto front are {', '.join(dict.fromkeys(on_front))}"


def _latency(benchmark: Benchmark, rows: Sequence[Measurement]) -> Drawn:
    models = list(dict.fromkeys(row.configuration.model for row in rows))
    forms = _forms(rows)
    figure, axes = new_figure(0.9 + len(models) * (0.16 + 0.2 * len(forms)))
    height = 0.82 / len(forms)
    for place, form in enumerate(forms):
        mine = {row.configuration.model: row for row in rows if row.configuration.form == form}
        at = [index + (place - (len(forms) - 1) / 2) * height for index, m in enumerate(models) if m in mine]
        shown = [mine[model] for model in models if model in mine]
        medians = [row.latency.median for row in shown]
        quartiles = [row.latency.quartiles for row in shown]
        spread = [
            [median - first for median, (first, _) in zip(medians, quartiles, strict=True)],
            [third - median for median, (_, third) in zip(medians, quartiles, strict=True)],
        ]
        axes.barh(at, medians, height * 0.92, color=_FORM_COLOURS.get(form, "#333333"), label=form)
        axes.errorbar(medians, at, xerr=spread, fmt="none", ecolor="#222222", elinewidth=0.8, capsize=2)
        for y, median, (_, third) in zip(at, medians, quartiles, strict=True):
            axes.annotate(
                _short(median),
                (third, y),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
    axes.set_yticks(range(len(models)), models)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.set_xlabel("latency (ms, median; line: middle half)")
    _legend_above(axes, len(forms))
    best = min(rows, key=lambda row: row.latency.median)
    return (
        figure,
        f"{best.configuration.model} ({best.configuration.form}) is fastest, {_short(best.latency.median)} ms",
    )


def _breakdown(benchmark: Benchmark, rows: Sequence[Measurement]) -> Drawn:
    known = [(row, row.breakdown) for row in rows if row.breakdown]
    if not known:
        return None
    figure, axes = new_figure(1.7 + 0.27 * len(known))
    left = [0.0] * len(known)
    totals = [sum(times.values()) for _, times in known]
    for kind in KINDS:
        shares = [100 * times.get(kind, 0.0) / total for (_, times), total in zip(known, totals, strict=True)]
        if max(shares) == 0:
            continue
        axes.barh(range(len(known)), shares, 0.78, left=left, color=_KIND_COLOURS[kind], label=kind)
        left = [start + share for start, share in zip(left, shares, strict=True)]
    for y, total in enumerate(totals):
        axes.annotate(f"{_short(total)} ms", (101, y), va="center", fontsize=7.5)
    names = [f"{row.configuration.model}, {row.configuration.form}" for row, _ in known]
    axes.set_yticks(range(len(known)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 116)
    axes.set_xticks(range(0, 101, 25))
    axes.set_xlabel("share of the time in operators (%)")
    _legend_above(axes, 3)
    most = max(known[-1][1], key=lambda kind: known[-1][1][kind])
    return figure, f"most time of {names[-1]} goes into {most}"


def _roofline(benchmark: Benchmark, rows: Sequence[Measurement]) -> Drawn:
    known = [(row, row.work) for row in rows if row.work is not None and row.work.floor is not None]
    if not known:
        return None
    first = known[0][0]
    roof = benchmark.machines[first.machine].roofs.get(first.configuration.threads)
    if roof is None:
        return None
    figure, axes = new_figure(4.0)
    intensities = [work.flops / work.bytes for _, work in known]
    low, high = min(*intensities, 0.5) / 2, max(*intensities, roof.flops / roof.memory_bandwidth) * 3
    cache_size, cache = max(roof.bandwidth, key=lambda pair: pair[1])
    for rate, name, style in (
        (roof.memory_bandwidth, f"memory {roof.memory_bandwidth / 1e9:.3g} GB/s", "-"),
        (cache, f"copies of {cache_size / 2**20:.3g} MiB {cache / 1e9:.3g} GB/s", ":"),
    ):
        ridge = roof.flops / rate
        axes.plot(
            [low, ridge],
            [low * rate / 1e9, roof.flops / 1e9],
            style,
            color="#444444",
            linewidth=1.1,
            label=name,
        )
    axes.plot(
        [roof.flops / cache, high],
        [roof.flops / 1e9] * 2,
        color="#c0392b",
        linewidth=1.1,
        label=f"matrix product {roof.flops / 1e9:.3g} GFLOP/s",
    )
    models = list(dict.fromkeys(row.configuration.model for row, _ in known))
    for row, work in known:
        configuration = row.configuration
        axes.scatter(
            work.flops / work.bytes,
            work.flops / row.latency.median / 1e6,
            s=28,
            marker=_MARKERS[models.index(configuration.model) % len(_MARKERS)],
            color=_FORM_COLOURS.get(configuration.form, "#333333"),
            zorder=3,
        )
    for model in models:
        axes.scatter(
            [], [], s=22, color="#888888", marker=_MARKERS[models.index(model) % len(_MARKERS)], label=model
        )
    for form in _forms(rows):
        axes.scatter([], [], s=22, color=_FORM_COLOURS.get(form, "#333333"), marker="s", label=form)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set(xlabel="operations a byte moved", ylabel="reached (GFLOP/s)")
    axes.grid(alpha=0.2, which="both")
    _legend_above(axes, 2)
    best = max((row for row, _ in known), key=lambda row: row.of_roof or 0)
    return (
        figure,
        f"{best.configuration.model} ({best.configuration.form}) comes nearest, {best.of_roof:.0%} of its roof",
    )


def draw_throughput(rows: Sequence[Measurement]) -> Figure | None:
    """Images a second against the batch size; None where the rows have one batch size only."""
    sizes = sorted({row.configuration.batch_size for row in rows})
    if len(sizes) < 2:
        return None
    figure, axes = new_figure(3.8)
    models = list(dict.fromkeys(row.configuration.model for row in rows))
    for model in models:
        for form in _forms(rows):
            mine = sorted(
                (row.configuration.batch_size, row.throughput)
                for row in rows
                if (row.configuration.model, row.configuration.form) == (model, form)
            )
            if mine:
                axes.plot(
                    *zip(*mine, strict=True),
                    marker=_MARKERS[models.index(model) % len(_MARKERS)],
                    markersize=4,
                    linewidth=1.1,
                    color=_FORM_COLOURS.get(form, "#333333"),
                    label=f"{model}, {form}",
                )
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_ylim(bottom=0)
    axes.set(xlabel="batch size", ylabel="images a second")
    axes.grid(alpha=0.25)
    _legend_above(axes, 2)
    return figure


SECTIONS: dict[str, Callable[[Benchmark, Sequence[Measurement]], Drawn]] = {
    "Accuracy against latency": _accuracy,
    "Latency": _latency,
    "Time by kind of operator": _breakdown,
    "Roofline": _roofline,
}


def new_figure(height: float) -> tuple[Figure, Axes]:
    """An empty drawing of the usual width, `height` in inches."""
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _legend_above(axes: Axes, columns: int) -> None:
    axes.figure.legend(
        loc="outside upper left",
        ncols=columns,
        fontsize=7.5,
        frameon=False,
        columnspacing=1.0,
        handlelength=1.2,
    )


def _forms(rows: Sequence[Measurement]) -> list[str]:
    present = {row.configuration.form for row in rows}
    return [form for form in FORMS if form in present] + sorted(present - set(FORMS))


def _short(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
