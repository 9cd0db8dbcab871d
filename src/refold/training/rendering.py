"""Recipes and results as tables."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from refold.training.recipe import ResolvedRecipe
from refold.training.settings import Result


def render_recipe(resolved: ResolvedRecipe) -> Table:
    """Every value beside its source, and the learning rate that the batch makes of it."""
    recipe = resolved.recipe
    table = Table(title=f"Recipe {resolved.name} ({resolved.title})", title_justify="left")
    table.add_column("", no_wrap=True)
    table.add_column("value", overflow="fold")
    table.add_column("from")
    for entry in dataclasses.fields(recipe):
        table.add_row(
            entry.name, escape(_shown(getattr(recipe, entry.name))), escape(resolved.sources[entry.name])
        )
    rule = {
        "linear": "proportional to batch_size",
        "square_root": "proportional to the root of batch_size",
        "none": "as given",
    }[recipe.learning_rate_scaling]
    table.add_row("[bold]learning rate of the run", f"{recipe.scaled_learning_rate:g}", rule)
    return table


def render_result(result: Result, folder: Path) -> Table:
    """What the run gave, and where its files are."""
    table = Table.grid(padding=(0, 2))
    best = result.best
    table.add_row("best epoch", f"{best['epoch']} of {result.epochs} ({best['weights']} weights)")
    table.add_row(
        "held-out accuracy",
        f"training form {result.training_accuracy:.2%}, plain {result.plain_accuracy:.2%}",
    )
    table.add_row("same answers", f"{result.same_answers:,} of {result.held_out_images:,}")
    table.add_row("proof", f"distance in float64 {result.proof['distance_float64']:.1e}")
    table.add_row("ONNX", f"|Δ| ≤ {result.export_difference:.1e} against PyTorch")
    if result.unreadable:
        table.add_row("left out", f"{len(result.unreadable)} images that cannot be read")
    table.add_row("files", f"{escape(str(folder))}: {', '.join(result.files)}")
    return table


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)
