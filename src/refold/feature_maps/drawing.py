"""Drawings of maps: a grid of all of a layer, its parts and pairs marked, and all its pairs by how alike they are."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from refold.bench.drawings import STYLE
from refold.feature_maps.capture import Maps
from refold.feature_maps.pairs import Pair, Similarity

# More maps than these are too small to see.
MOST_MAPS = 256
PAIR_COLOURS = ("#d62728", "#2ca02c", "#1f77b4", "#ff7f0e", "#9467bd", "#8c564b")
_TILE = 0.62


def draw_maps(maps: Maps, pairs: Sequence[Pair] = ()) -> Figure:
    """A grid of the maps of each part, each map from its least to its largest value; pairs have boxes of one colour.

    Of more than `MOST_MAPS` maps the first of each part are shown.
    """
    parts = list(shown_parts(maps))
    across = max(
        4, min(16, math.ceil(math.sqrt(2 * sum(len(channels) for _, channels in parts) / len(parts))))
    )
    rows = [math.ceil(len(channels) / across) for _, channels in parts]
    with matplotlib.rc_context(STYLE):
        figure = Figure((across * _TILE, sum(rows) * _TILE + 0.4 * len(parts)), layout="constrained")
        grid = figure.add_gridspec(len(parts), 1, height_ratios=rows)
        for place, (title, channels) in enumerate(parts):
            axes = figure.add_subplot(grid[place])
            axes.set_title(title, loc="left", fontsize=11)
            _draw_part(axes, maps, channels, across, rows[place], pairs)
    return figure


def shown_parts(maps: Maps) -> Iterator[tuple[str, range]]:
    """The title of each part and the channels of it that are drawn."""
    begin = 0
    for name, count in maps.parts or (("", maps.channels),):
        shown = min(count, MOST_MAPS // max(1, len(maps.parts)))
        title = f"{maps.layer}{f': {name}' if name else ''}, {count} maps"
        if shown < count:
            title += f", the first {shown}"
        yield title, range(begin, begin + shown)
        begin += count


def _draw_part(
    axes: Axes, maps: Maps, channels: range, across: int, rows: int, pairs: Sequence[Pair]
) -> None:
    height, width = maps.values.shape[1:]
    canvas = torch.full((rows * (height + 1), across * (width + 1)), float("nan"))
    places = {}
    for index, channel in enumerate(channels):
        top, left = (index // across) * (height + 1), (index % across) * (width + 1)
        values = maps.values[channel].float()
        spread = (values.max() - values.min()).clamp_min(1e-12)
        canvas[top : top + height, left : left + width] = (values - values.min()) / spread
        places[channel] = (left, top)
    axes.imshow(canvas.numpy(), cmap="viridis", interpolation="nearest", aspect="equal", vmin=0, vmax=1)
    axes.axis("off")
    for pair, colour in zip(pairs, PAIR_COLOURS, strict=False):
        for channel in {pair.source, pair.target} & places.keys():
            left, top = places[channel]
            box = Rectangle((left - 1, top - 1), width + 1, height + 1, fill=False, color=colour, linewidth=2)
            box.set_clip_on(False)
            axes.add_patch(box)


def draw_similarity(similar: Similarity, layer: str) -> Figure:
    """All ordered pairs: what share of the target's mean square the best kernel leaves, by how alike they are."""
    away = ~torch.eye(len(similar.variances), dtype=torch.bool) & (similar.variances > 0)[None, :]
    alike = similar.correlations[away]
    order = alike.argsort()
    with matplotlib.rc_context(STYLE):
        figure = Figure((7.2, 4.2), layout="constrained")
        axes: Any = figure.add_subplot()
        for (size, errors), colour in zip(similar.errors.items(), PAIR_COLOURS, strict=False):
            left = (errors / similar.squares.clamp_min(1e-300)[None, :])[away]
            axes.scatter(alike, left, s=3, alpha=0.25, color=colour, linewidths=0, rasterized=True)
            means = [(float(alike[part].mean()), float(left[part].median())) for part in order.chunk(12)]
            axes.plot(*zip(*means, strict=True), color=colour, label=f"{size}x{size}", linewidth=2)
        axes.set(
            xlabel="correlation of the two maps",
            ylabel="error / mean square of the target",
            title=layer,
            xlim=(-1, 1),
            xticks=(-1, -0.5, 0, 0.5, 1),
            ylim=(0, 1),
        )
        figure.legend(title="kernel (median)", loc="outside right upper", frameon=False)
    return figure


def png(figure: Figure) -> bytes:
    """The drawing as the bytes of a PNG."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    return file.getvalue()
