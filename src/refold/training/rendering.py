"""Recipes and results as tables."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from refold.training.estimating import Estimate
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


def render_estimate(expected: Estimate) -> Table:
    """The memory and the time that a run is expected to take, in their parts."""
    table = Table(title="What the run takes", title_justify="left")
    table.add_column("", no_wrap=True)
    table.add_column("memory", justify="right")
    parts = ("program", "images", "weights", "gradients", "optimizer", "average", "teacher", "activations")
    for name in parts:
        if getattr(expected, name):
            table.add_row(name, _megabytes(getattr(expected, name)))
    table.add_row("[bold]memory of each process", f"[bold]{_megabytes(expected.memory)}")
    table.add_section()
    table.add_row(
        f"{expected.steps:,} steps an epoch, {expected.batches * expected.batch_images:,} images",
        f"{expected.epoch_seconds:,.1f} s",
    )
    table.add_row("[bold]time of the training", f"[bold]{_duration(expected.seconds)}")
    table.caption = (
        f"From steps of {expected.measured_images} images on this machine; a process takes "
        f"{expected.batch_images}. Folding and exporting, and talk between processes, come on top."
    )
    return table


def render_result(result: Result, folder: Path) -> Table:
    """What the run gave, and where its files are."""
    table = Table.grid(padding=(0, 2))
    best = result.best
    table.add_row("best epoch", f"{best['epoch']} of {result.epochs} ({best['weights']} weights)")
    if result.int8 is None:
        _add_forms(table, result)
    else:
        _add_int8(table, result, result.int8)
    if result.unreadable:
        table.add_row("left out", f"{len(result.unreadable)} images that cannot be read")
    table.add_row("files", f"{escape(str(folder))}: {', '.join(result.files)}")
    return table


def _add_forms(table: Table, result: Result) -> None:
    table.add_row(
        f"held-out {result.score}",
        f"training form {result.training_score:.2%}, plain {result.plain_score:.2%}, "
        f"ONNX {result.onnx_score:.2%}",
    )
    table.add_row(
        "same answers",
        f"plain {result.same_answers:,}, ONNX {result.onnx_same_answers:,} of {result.held_out_images:,}",
    )
    table.add_row("proof", f"distance in float64 {result.proof['distance_float64']:.1e}")
    table.add_row("ONNX", f"|Δ| ≤ {result.export_difference:.1e} against PyTorch")


def _add_int8(table: Table, result: Result, int8: dict[str, Any]) -> None:
    table.add_row(
        f"held-out {result.score}",
        f"float32 {result.plain_score:.2%}, int8 before training {int8['start_score']:.2%}, as trained "
        f"{result.training_score:.2%}, the file {result.onnx_score:.2%}",
    )
    table.add_row(
        "same answers",
        f"before training {int8['start_same_answers']:,}, the file {result.onnx_same_answers:,} of "
        f"{result.held_out_images:,}",
    )
    table.add_row(
        "distance from float32",
        f"before training {int8['start_decibels']:.1f} dB, the file {int8['decibels']:.1f} dB",
    )
    table.add_row("file against what was trained", f"{int8['decibels_from_trained']:.1f} dB")
    table.add_row("could saturate", f"{int8['saturating_channels']} channels")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _duration(seconds: float) -> str:
    hours = seconds / 3600
    if hours >= 48:
        return f"{hours / 24:,.1f} days"
    return f"{hours:.1f} h" if hours >= 2 else f"{seconds / 60:.1f} min"


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)
