"""The curves of a run as a PNG file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from refold.files import PathLike, written_aside

WEIGHTS = ("trained", "average")


def draw_curves(
    path: PathLike, title: str, rows: Sequence[Mapping[str, Any]], score: str, score_title: str
) -> None:
    """Draw losses, the held-out ``score`` and the learning rate over the epochs, from the rows of the history.

    Raises `InputError` where ``path`` cannot be written.
    """
    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13)
    epochs = [row["epoch"] for row in rows]
    keys = list(rows[0])
    panels = {
        "loss": [key for key in keys if key == "loss" or key.startswith("held_out_loss_")],
        f"held-out {score_title} (%)": [
            key for key in keys if key in {f"held_out_{score}_{weights}" for weights in WEIGHTS}
        ],
        "learning rate": ["learning_rate"],
    }
    for axes, (label, shown) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for key in shown:
            factor = 100 if label.endswith("(%)") else 1
            name = "training" if key == "loss" else key.rpartition("_")[2] + " weights, held out"
            axes.plot(epochs, [factor * row[key] for row in rows], label=name, marker=".", linewidth=1.2)
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if len(shown) > 1:
            axes.legend(frameon=False)
    with written_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=150)
