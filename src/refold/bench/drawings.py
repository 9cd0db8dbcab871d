"""The drawings of a benchmark: accuracy against latency, latency, throughput, time by operator, and the roofline."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from refold.bench.breakdown import KINDS
from refold.bench.colours import BY_FORM, BY_KIND, FAINT, INK, LINE, OTHER, ROOF
from refold.bench.labels import label_points
from refold.bench.results import Benchmark, Measurement
from refold.bench.subjects import FORMS

_FORM_COLOURS = dict(zip(FORMS, BY_FORM, strict=True))
_MARKERS = "osD^vP*X"
_KIND_COLOURS = dict(zip(KINDS, BY_KIND, strict=True))
# More bars, lines or networks than these make a drawing that nobody reads on a phone.
MOST = len(_MARKERS)
_WIDTH = 4.5
# On a phone's page, about as many pixels wide as the drawing has points, no text is below 14 pixels.
TEXT = 13.3
# In inches, those of a line of text, of a bar, and between what belongs to two networks.
_LINE, _BAR, _GAP = 0.25, 0.24, 0.1
_CHARACTERS = 40
STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "Liberation Sans", "DejaVu Sans"],
    **dict.fromkeys(
        ("font.size", "xtick.labelsize", "ytick.labelsize", "axes.labelsize", "legend.fontsize"), TEXT
    ),
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "grid.color": FAINT,
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


def _accuracy(benchmark: Benchmark, rows: Sequence[Measurement], among: Sequence[Measurement]) -> Drawn:
    known = _with_accuracy(benchmark, rows)
    if not known:
        return None
    figure, axes = new_figure(3.6)
    everywhere = [(row.latency.median, accuracy) for row, accuracy in _with_accuracy(benchmark, among)]
    front = pareto_front(everywhere)
    axes.step(*zip(*front, strict=True), where="post", color=LINE, linewidth=1, linestyle="--", zorder=1)
    all_latencies, all_values = zip(*everywhere, strict=True)
    axes.scatter(all_latencies, all_values, s=12, color=FAINT, zorder=0)
    models = _models([row for row, _ in known])
    for model in models:
        mine = [(row.latency.median, accuracy) for row, accuracy in known if row.configuration.model == model]
        axes.plot(*zip(*mine, strict=True), color=FAINT, linewidth=0.8, zorder=0)
    for form in _forms(rows):
        mine = [(row.latency.median, accuracy) for row, accuracy in known if row.configuration.form == form]
        if mine:
            latencies, values = zip(*mine, strict=True)
            axes.scatter(latencies, values, s=32, color=_FORM_COLOURS.get(form, OTHER), label=form)
    fastest = {
        row.configuration.model: (row.latency.median, value)
        for row, value in sorted(known, key=lambda pair: -pair[0].latency.median)
    }
    axes.set(xlabel="latency (ms, median)", ylabel="top-1 accuracy")
    axes.margins(0.14)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(alpha=0.5)
    numbers = {model: str(number) for number, model in enumerate(models, start=1)}
    for model, number in numbers.items():
        axes.plot([], [], linestyle="none", color=INK, label=f"{number}  {model}")
    _legend_above(axes)
    # Names would cover each other where networks are alike.
    points = [(row.latency.median, accuracy) for row, accuracy in known]
    label_points(axes, {numbers[model]: point for model, point in fastest.items()}, points, size=TEXT)
    on_front = [row.configuration.model for row, value in known if (row.latency.median, value) in front]
    return figure, f"on the Pareto front are {', '.join(dict.fromkeys(on_front)) or 'none of these'}"


def _with_accuracy(benchmark: Benchmark, rows: Sequence[Measurement]) -> list[tuple[Measurement, float]]:
    return [(row, accuracy) for row in rows if (accuracy := benchmark.accuracy(row)) is not None]


def _latency(benchmark: Benchmark, rows: Sequence[Measurement], among: Sequence[Measurement]) -> Drawn:
    models, forms = _models(rows), _forms(rows)
    groups = [
        (model, [(form, row) for form in forms for row in rows if _is(row, model, form)]) for model in models
    ]
    figure, axes, places = _rows_of_bars([(model, len(bars)) for model, bars in groups])
    for form in forms:
        mine = [
            (place, row.latency)
            for (_, bars), ys in zip(groups, places, strict=True)
            for (own, row), place in zip(bars, ys, strict=True)
            if own == form
        ]
        at = [place for place, _ in mine]
        medians = [latency.median for _, latency in mine]
        spread = [
            [latency.median - latency.quartiles[0] for _, latency in mine],
            [latency.quartiles[1] - latency.median for _, latency in mine],
        ]
        axes.barh(at, medians, 0.92 * _BAR, color=_FORM_COLOURS.get(form, OTHER), label=form)
        axes.errorbar(medians, at, xerr=spread, fmt="none", ecolor=INK, elinewidth=1.2)
        for place, latency in mine:
            _after(axes, latency.quartiles[1], place, _short(latency.median))
    axes.margins(x=0.2)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("latency (ms)")
    _legend_above(axes)
    best = min(rows, key=lambda row: row.latency.median)
    return (
        figure,
        f"{best.configuration.model} ({best.configuration.form}) is fastest, {_short(best.latency.median)} ms",
    )


def _is(row: Measurement, model: str, form: str) -> bool:
    return (row.configuration.model, row.configuration.form) == (model, form)


def _rows_of_bars(groups: Sequence[tuple[str, int]]) -> tuple[Figure, Axes, list[list[float]]]:
    """A drawing for groups of bars with the name of each above it, which takes no width, and where each bar goes."""
    texts = [_wrapped(name, _CHARACTERS) for name, _ in groups]
    heights = [_LINE * (1 + text.count("\n")) for text in texts]
    total = sum(heights) + sum(_BAR * count + _GAP for _, count in groups)
    figure, axes = new_figure(total + 0.7)
    places, y = [], 0.0
    for (_, count), text, height in zip(groups, texts, heights, strict=True):
        axes.annotate(text, (0, y + height), xytext=(2, 2), textcoords="offset points", va="bottom")
        places.append([y + height + _BAR * (index + 0.5) for index in range(count)])
        y += height + _BAR * count + _GAP
    axes.set_ylim(total, 0)
    axes.set_yticks([])
    return figure, axes, places


def _after(axes: Axes, x: float, y: float, text: str) -> None:
    axes.annotate(text, (x, y), xytext=(4, 0), textcoords="offset points", va="center")


def _breakdown(benchmark: Benchmark, rows: Sequence[Measurement], among: Sequence[Measurement]) -> Drawn:
    known = [(row, row.breakdown) for row in rows if row.breakdown]
    if not known:
        return None
    names = [f"{row.configuration.model}, {row.configuration.form}" for row, _ in known]
    figure, axes, places = _rows_of_bars([(name, 1) for name in names])
    at = [place for (place,) in places]
    left = [0.0] * len(known)
    totals = [sum(times.values()) for _, times in known]
    for kind, colour, times in _largest_kinds([times for _, times in known]):
        shares = [100 * time / total for time, total in zip(times, totals, strict=True)]
        axes.barh(at, shares, 0.92 * _BAR, left=left, color=colour, label=kind)
        left = [start + share for start, share in zip(left, shares, strict=True)]
    for place, total in zip(at, totals, strict=True):
        _after(axes, 100, place, f"{_short(total)} ms")
    axes.set_xlim(0, 132)
    axes.set_xticks(range(0, 101, 25))
    axes.set_xlabel("share of the time in operators (%)")
    _legend_above(axes)
    most = max(known[-1][1], key=lambda kind: known[-1][1][kind])
    return figure, f"most time of {names[-1]} goes into {most}"


def _largest_kinds(breakdowns: Sequence[Mapping[str, float]]) -> list[tuple[str, str, list[float]]]:
    """Kinds with colours and times, those that take little as one; the table has them all."""
    times = {kind: [breakdown.get(kind, 0.0) for breakdown in breakdowns] for kind in KINDS}
    present = [kind for kind in KINDS if any(times[kind])]
    largest = sorted(present, key=lambda kind: -sum(times[kind]))
    kept = set(present if len(present) <= MOST else largest[: MOST - 1])
    found = [(kind, _KIND_COLOURS[kind], times[kind]) for kind in present if kind in kept]
    rest = [times[kind] for kind in present if kind not in kept]
    if rest:
        found.append((f"{len(rest)} other kinds", FAINT, [sum(values) for values in zip(*rest, strict=True)]))
    return found


def _roofline(benchmark: Benchmark, rows: Sequence[Measurement], among: Sequence[Measurement]) -> Drawn:
    known = [(row, row.work) for row in rows if row.work is not None and row.work.floor is not None]
    if not known:
        return None
    first = known[0][0]
    roof = benchmark.machines[first.machine].roofs.get(first.configuration.threads)
    if roof is None:
        return None
    figure, axes = new_figure(3.6)
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
            color=LINE,
            linewidth=1.1,
            label=name,
        )
    axes.plot(
        [roof.flops / cache, high],
        [roof.flops / 1e9] * 2,
        color=ROOF,
        linewidth=1.1,
        label=f"matrix product {roof.flops / 1e9:.3g} GFLOP/s",
    )
    models = _models([row for row, _ in known])
    for row, work in known:
        configuration = row.configuration
        axes.scatter(
            work.flops / work.bytes,
            work.flops / row.latency.median / 1e6,
            s=28,
            marker=_MARKERS[models.index(configuration.model) % len(_MARKERS)],
            color=_FORM_COLOURS.get(configuration.form, OTHER),
            zorder=3,
        )
    for model in models:
        axes.scatter(
            [], [], s=22, color=OTHER, marker=_MARKERS[models.index(model) % len(_MARKERS)], label=model
        )
    for form in _forms(rows):
        axes.scatter([], [], s=22, color=_FORM_COLOURS.get(form, OTHER), marker="s", label=form)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="operations a byte moved", ylabel="reached (GFLOP/s)")
    axes.grid(alpha=0.5)
    _legend_above(axes)
    best = max((row for row, _ in known), key=lambda row: row.of_roof or 0)
    return (
        figure,
        f"{best.configuration.model} ({best.configuration.form}) comes nearest, {best.of_roof:.0%} of its roof",
    )


def _throughput(benchmark: Benchmark, rows: Sequence[Measurement], among: Sequence[Measurement]) -> Drawn:
    """Images a second against the batch size; None where the rows have one batch size only."""
    sizes = sorted({row.configuration.batch_size for row in rows})
    if len(sizes) < 2:
        return None
    figure, axes = new_figure(3.6)
    models = _models(rows)
    for model in models:
        for form in _forms(rows):
            mine = sorted(
                (row.configuration.batch_size, row.throughput) for row in rows if _is(row, model, form)
            )
            if mine:
                axes.plot(
                    *zip(*mine, strict=True),
                    marker=_MARKERS[models.index(model) % len(_MARKERS)],
                    markersize=4,
                    linewidth=1.1,
                    color=_FORM_COLOURS.get(form, OTHER),
                    label=f"{model}, {form}",
                )
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_ylim(bottom=0)
    axes.set(xlabel="batch size", ylabel="images a second")
    axes.grid(alpha=0.5)
    _legend_above(axes)
    best = max(rows, key=lambda row: row.throughput)
    key = best.configuration
    return (
        figure,
        f"{key.model} ({key.form}) has most, {_short(best.throughput)} images a second at batch {key.batch_size}",
    )


def _by_model(benchmark: Benchmark, rows: Sequence[Measurement], most: int = MOST) -> list[list[Measurement]]:
    """The rows in parts of so many networks."""
    models = _models(rows)
    return [
        [row for row in rows if row.configuration.model in models[start : start + most]]
        for start in range(0, len(models), most)
    ]


def _by_front(benchmark: Benchmark, rows: Sequence[Measurement]) -> list[list[Measurement]]:
    """Networks on the Pareto front come first: they are what the drawing is for."""
    known = _with_accuracy(benchmark, rows)
    front = pareto_front((row.latency.median, value) for row, value in known)
    leading = {row.configuration.model for row, value in known if (row.latency.median, value) in front}
    return _by_model(
        benchmark, sorted((row for row, _ in known), key=lambda row: row.configuration.model not in leading)
    )


def _by_bars(benchmark: Benchmark, rows: Sequence[Measurement]) -> list[list[Measurement]]:
    return _by_model(benchmark, rows, max(1, MOST // max(1, len(_forms(rows)))))


def _by_row(benchmark: Benchmark, rows: Sequence[Measurement]) -> list[list[Measurement]]:
    known = [row for row in rows if row.breakdown]
    return [known[start : start + MOST] for start in range(0, len(known), MOST)]


@dataclass(frozen=True)
class Section:
    """How measurements are split into drawings of at most `MOST` each, and how one is drawn of a part among all."""

    split: Callable[[Benchmark, Sequence[Measurement]], list[list[Measurement]]]
    draw: Callable[[Benchmark, Sequence[Measurement], Sequence[Measurement]], Drawn]


SECTIONS = {
    "Accuracy against latency": Section(_by_front, _accuracy),
    "Latency": Section(_by_bars, _latency),
    "Time by kind of operator": Section(_by_row, _breakdown),
    "Roofline": Section(_by_model, _roofline),
    "Throughput": Section(_by_bars, _throughput),
}


def new_figure(height: float) -> tuple[Figure, Axes]:
    """An empty drawing of the usual width, `height` in inches."""
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _legend_above(axes: Axes) -> None:
    """Put the legend over the axes, in as many columns as its words leave, the drawing higher by its lines."""
    handles, labels = axes.get_legend_handles_labels()
    labels = [_wrapped(label, _CHARACTERS - 5) for label in labels]
    longest = max((len(line) for label in labels for line in label.splitlines()), default=1)
    columns = max(1, _CHARACTERS // (longest + 5))
    lines = sum(1 + label.count("\n") for label in labels)
    figure: Any = axes.get_figure()
    figure.set_figheight(figure.get_figheight() + _LINE * -(-lines // columns))
    figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=columns,
        frameon=False,
        columnspacing=1.0,
        handlelength=1.0,
        labelspacing=0.25,
    )


def _wrapped(text: str, characters: int) -> str:
    return "\n".join(textwrap.wrap(text, characters)) or text


def _models(rows: Iterable[Measurement]) -> list[str]:
    return list(dict.fromkeys(row.configuration.model for row in rows))


def _forms(rows: Sequence[Measurement]) -> list[str]:
    present = {row.configuration.form for row in rows}
    return [form for form in FORMS if form in present] + sorted(present - set(FORMS))


def _short(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
