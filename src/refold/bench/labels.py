"""Labels of points in a drawing, placed where they hide nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from refold.bench.colours import PAPER

# Keeps a label readable across a line.
_HALO = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.7, "pad": 0.6}
# Offsets in points from what is labelled, and the alignments that go with them, the best first.
_PLACES = (
    (6, 0, "left", "center"),
    (-6, 0, "right", "center"),
    (0, 6, "center", "bottom"),
    (0, -6, "center", "top"),
    (5, 5, "left", "bottom"),
    (-5, 5, "right", "bottom"),
    (5, -5, "left", "top"),
    (-5, -5, "right", "top"),
    (0, 15, "center", "bottom"),
)


def label_points(
    axes: Axes,
    labels: Mapping[str, tuple[float, float]],
    points: Sequence[tuple[float, float]],
    size: float = 8,
) -> None:
    """Write each label beside its point, where it covers neither a point nor another label if there is room.

    ``size`` is that of the text in points.
    """
    figure: Any = axes.get_figure()
    figure.draw_without_rendering()
    taken = [axes.transData.transform(point) for point in points]
    boxes: list[Any] = []
    for name, point in labels.items():
        boxes.append(_label(axes, name, point, taken, boxes, size))


def _label(
    axes: Axes, name: str, point: tuple[float, float], taken: Sequence[Any], boxes: Sequence[Any], size: float
) -> Any:
    """Write one label at the best place, and return its box."""
    best: tuple[int, Any, Any] | None = None
    for x, y, horizontal, vertical in _PLACES:
        text = axes.annotate(
            name,
            point,
            xytext=(x, y),
            textcoords="offset points",
            ha=horizontal,
            va=vertical,
            fontsize=size,
            bbox=_HALO,
        )
        box = text.get_window_extent()
        outside = not (axes.bbox.x0 <= box.x0 and box.x1 <= axes.figure.bbox.x1)
        hits = sum(box.overlaps(other) for other in boxes) + sum(box.contains(*place) for place in taken)
        if best is None or hits + 2 * outside < best[0]:
            if best is not None:
                best[1].remove()
            best = (hits + 2 * outside, text, box)
        else:
            text.remove()
        if best[0] == 0:
            break
    assert best is not None
    return best[2]
