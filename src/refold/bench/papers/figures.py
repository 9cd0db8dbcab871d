"""A paper's figures with our side: those of a benchmark, and accuracy against cost."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import matplotlib

from refold.bench.drawings import STYLE, new_figure, pareto_front
from refold.bench.labels import label_points
from refold.bench.papers.results import PaperTable
from refold.bench.plots import Plot, save_plots
from refold.files import PathLike, make_folder


def save_paper_plots(table: PaperTable, folder: PathLike) -> list[Path]:
    """Write every plot that the table allows as PNG and as SVG; returns the paths.

    Times and costs are those measured here, accuracies those published, or given as of what was trained here.
    Raises `InputError` where the folder cannot be made.
    """
    target = make_folder(folder)
    accuracies = _accuracies(table)
    paths = []
    if table.benchmark.measured:
        paths += save_plots(dataclasses.replace(table.benchmark, accuracies=accuracies), target)
    if (plot := _accuracy_against_cost(table, accuracies)) is not None:
        for suffix in (".png", ".svg"):
            paths.append(target / f"{plot.name}{suffix}")
            plot.save(paths[-1])
    return paths


def _accuracies(table: PaperTable) -> dict[str, float]:
    quoted = {
        row.subject: float(row.values[place])
        for place, column in table.exhibit.columns_of("top-1")
        for row in table.exhibit.rows
        if row.network and row.values[place]
    }
    return {**quoted, **table.accuracies}


def _accuracy_against_cost(table: PaperTable, accuracies: dict[str, float]) -> Plot | None:
    points = {
        row.subject: (sizes[row.form].macs / 1e6, accuracies[row.subject])
        for row in table.exhibit.rows
        if (sizes := table.sizes.get(row.model)) and row.subject in accuracies and row.form in sizes
    }
    if len({macs for macs, _ in points.values()}) < 2:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(3.8)
        front = pareto_front(points.values())
        axes.step(*zip(*front, strict=True), where="post", color="#444444", linewidth=1, linestyle="--")
        costs, values = zip(*points.values(), strict=True)
        axes.scatter(costs, values, s=26, color="#2a78b8", zorder=2)
        axes.set(xlabel="multiply-accumulates (M)", ylabel="top-1 accuracy (%)")
        axes.margins(0.14)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.25)
        label_points(axes, points, list(points.values()))
    best = [name for name, point in points.items() if point in front]
    return Plot(
        "accuracy-against-cost",
        "Accuracy against cost",
        table.exhibit.source,
        f"Accuracy against cost, {table.exhibit.source}: on the Pareto front are {', '.join(best)}",
        figure,
    )
