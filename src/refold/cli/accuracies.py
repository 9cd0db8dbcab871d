"""What `refold paper` does with --accuracy and --pretrained: accuracies trained here, and those of released weights."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from refold import replication
from refold.cli.shared import console, error_console, say
from refold.errors import InputError
from refold.replication.sheet import check_suffix
from refold.training.recipe import parse_overrides


def train_rows(
    name: str, given: Mapping[str, Any], threads: int, only: Sequence[str], output: Sequence[Path], form: str
) -> None:
    """Train the rows of an exhibit, write what is known after each run, and print it at the end."""
    _check(output)
    if "data" not in given:
        raise InputError("There is nothing to train on; give --data FOLDER, such as that of CIFAR-10.")
    training = replication.Training(
        given["data"],
        given.get("runs", Path("runs") / name.replace("/", "-")),
        seeds=given.get("seeds", 3),
        full=given.get("full", False),
        overrides=parse_overrides(given.get("set", [])),
        threads=threads,
        accelerator=given.get("accelerator", "auto"),
    )

    def write(found: replication.Replication) -> None:
        for path in output:
            replication.sheet(found).save(path)

    try:
        found = replication.replicate(
            name, training, error_console if form else console, only=only, on_run=write
        )
    except KeyboardInterrupt:
        print(f"refold: stopped; the same command goes on with the runs of {training.runs}.", file=sys.stderr)
        raise typer.Exit(130) from None
    _show(replication.sheet(found), output, form)


def evaluate_rows(name: str, folder: Path, only: Sequence[str], output: Sequence[Path], form: str) -> None:
    """Ask the released weights of an exhibit's networks about the photos of a folder."""
    _check(output)
    _show(replication.evaluate(name, folder, only=only, say=say), output, form)


def _check(output: Sequence[Path]) -> None:
    for path in output:
        check_suffix(path)


def _show(sheet: replication.Sheet, output: Sequence[Path], form: str) -> None:
    for path in output:
        sheet.save(path)
    if form == "json":
        print(sheet.to_json())
    elif form:
        print(sheet.to_markdown(), end="")
    else:
        console.print(sheet.to_rich())
