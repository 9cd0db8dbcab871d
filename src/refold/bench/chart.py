"""Charts of a run as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from refold.files import PathLike, written_aside

_COLOURS = ("#7a8ca3", "#2a78b8", "#e08a2e", "#4f9d69", "#a05195")


def training_and_comparison_chart(
    path: PathLike,
    *,
    title: str,
    losses: Sequence[float],
    scores: Sequence[float],
    score_title: str,
    comparison: Mapping[str, Mapping[str, float | None]],
) -> None:
    """Draw the training curve beside bars that compare forms of one network, and write it as PNG.

    ``losses`` and ``scores`` (shares, called ``score_title``) have one value an epoch. ``comparison`` maps a quantity,
    with its unit, to the value of each form, None where it is not known; every quantity is drawn relative to its first
    form.
    Raises `InputError` where ``path`` cannot be written.
    """
    figure = Figure(figsize=(13, 5), layout="constrained")
    FigureCanvasAgg(figure)
    curve, bars = figure.subplots(1, 2, width_ratios=(1, 1.6))
    figure.suptitle(title, fontsize=13)
    _draw_curve(curve, losses, scores, f"held-out {score_title}")
    _draw_bars(bars, comparison)
    with written_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=150)


def _draw_curve(axes: Axes, losses: Sequence[float], scores: Sequence[float], title: str) -> None:
    epochs = range(1, len(losses) + 1)
    (score_line,) = axes.plot(
        epochs, [100 * share for share in scores], color=_COLOURS[1], marker="o", markersize=3
    )
    axes.set(xlabel="epoch", ylabel=f"{title} (%)", ylim=(0, 103), title="Training")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    loss_axes = axes.twinx()
    (loss_line,) = loss_axes.plot(epochs, losses, color=_COLOURS[2], linestyle="--")
    loss_axes.set_ylabel("training loss")
    loss_axes.set_ylim(bottom=0)
    axes.annotate(
        f"{100 * scores[-1]:.2f}%",
        (len(losses), 100 * scores[-1]),
        xytext=(-4, -16),
        textcoords="offset points",
        ha="right",
        color=_COLOURS[1],
    )
    axes.legend([score_line, loss_line], [title, "training loss"], loc="center right")


def _draw_bars(axes: Axes, comparison: Mapping[str, Mapping[str, float | None]]) -> None:
    forms = list(next(iter(comparison.values())))
    width = 0.8 / len(forms)
    for place, form in enumerate(forms):
        values = [quantity[form] for quantity in comparison.values()]
        shares = [(quantity[form] or 0) / (quantity[forms[0]] or 1) for quantity in comparison.values()]
        offsets = [index + (place - (len(forms) - 1) / 2) * width for index in range(len(values))]
        bars = axes.bar(offsets, shares, width * 0.94, label=form, color=_COLOURS[place % len(_COLOURS)])
        labels = ["not known" if value is None else f"{value:,.3g}" for value in values]
        axes.bar_label(bars, labels, fontsize=8, padding=2)
    axes.set_xticks(range(len(comparison)), list(comparison))
    axes.set(ylabel=f"relative to the {forms[0]}", title="The same function, side by side")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=len(forms), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
