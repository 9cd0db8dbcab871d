"""Which runs a table of a paper takes: its rows over seeds, at reduced or full scale, and their teachers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from refold.bench.papers.published import Exhibit, PaperRow
from refold.errors import InputError
from refold.training.recipe import load_recipe
from refold.training.settings import TRAINING, Settings

_TEACHER_SEED = 0


@dataclass(frozen=True)
class Training:
    """What `refold paper NAME --accuracy` is told beside its table.

    ``data`` and ``runs`` are a folder of images and the folder that keeps the runs; there are ``seeds`` runs a row.
    With ``full`` the rows are the paper's own networks, trained by its recipe, else those of reduced.yaml.
    ``overrides`` go over the recipe of all rows. ``threads`` and ``accelerator`` are those of `refold train`.
    """

    data: str
    runs: Path
    seeds: int = 3
    full: bool = False
    overrides: Mapping[str, Any] | None = None
    threads: int = 1
    accelerator: str = "auto"

    def check(self) -> None:
        """Raise `InputError` where there is nothing to train."""
        if self.seeds < 1:
            raise InputError(f"seeds is {self.seeds}; give the number of runs a row, 1 or more.")


@dataclass(frozen=True)
class PlannedRun:
    """A run by the name of its folder, and what trains it."""

    name: str
    settings: Settings


@dataclass(frozen=True)
class PlannedRow:
    """A row with its runs by seed; rows that are trained alike share them."""

    row: PaperRow
    runs: tuple[PlannedRun, ...]


@dataclass(frozen=True)
class Plan:
    """The rows of an exhibit that are trained, ``runs`` in the order in which they are made, and why others are not."""

    exhibit: Exhibit
    rows: tuple[PlannedRow, ...]
    runs: tuple[PlannedRun, ...]
    left: Mapping[str, str]


def why_not(exhibit: Exhibit) -> str:
    """One sentence on why the accuracies of an exhibit are not trained here; empty where they are."""
    if exhibit.trained:
        return ""
    if exhibit.columns_of("top-1"):
        return (
            f"No rows of {exhibit.name} are chosen to be trained small and compared; train its networks one by "
            "one, with refold train --network NAME."
        )
    if any("mAP" in column.quantity for column in exhibit.columns):
        return f"{exhibit.name} is about detectors on COCO, which no reduced scale stands for; see refold train --task."
    return f"{exhibit.name} prints no accuracy of classifiers; leave --accuracy out to see what it prints."


def plan(exhibit: Exhibit, training: Training, only: Sequence[str] = ()) -> Plan:
    """The runs of the rows that match the patterns ``only``, by default all, and of the rows they are compared with.

    One seed after the other, so that what has been trained when a user stops can be compared.
    Raises `InputError` where an exhibit has no rows that are trained (`why_not`), or none of those asked for.
    """
    training.check()
    if reason := why_not(exhibit):
        raise InputError(reason)
    wanted = {row.model for row in (exhibit.only(tuple(only)) if only else exhibit).rows}
    wanted |= {row.reference for row in exhibit.rows if row.model in wanted and row.reference}
    known = reduced()["networks"]
    left = {
        row.model: _left(row)
        for row in exhibit.rows
        if row.model in wanted and (row not in exhibit.trained or not (training.full or row.network in known))
    }
    rows = [row for row in exhibit.trained if row.model in wanted and row.model not in left]
    if not any(row.reference not in (None, row.model) for row in rows):
        raise InputError(
            f"No row of {exhibit.name} that was asked for is compared with another; leave --only out."
        )
    made: dict[str, PlannedRun] = {}
    of_row: dict[str, list[PlannedRun]] = {row.model: [] for row in rows}
    for seed in range(training.seeds):
        for row in rows:
            teacher = None
            if row.teacher is not None and not training.full:
                as_row = PaperRow(row.teacher, (), row.teacher)
                teacher = _run(exhibit, as_row, training, _TEACHER_SEED)
                made.setdefault(teacher.name, teacher)
            run = _run(exhibit, row, training, seed, teacher)
            of_row[row.model].append(made.setdefault(run.name, run))
    planned = tuple(PlannedRow(row, tuple(of_row[row.model])) for row in rows)
    return Plan(exhibit, planned, tuple(made.values()), left)


@cache
def reduced() -> dict[str, Any]:
    """The reduced scale: a ``recipe``, and what stands for each of the ``networks``."""
    content: dict[str, Any] = yaml.safe_load(
        (files("refold.replication") / "reduced.yaml").read_text("utf-8")
    )
    return content


def _left(row: PaperRow) -> str:
    if row.network is None:
        return "is a network that cannot be built here"
    return (
        f"{row.network} has no reduced form; --full trains it as the paper did"
        if row.reference
        else "is compared with no row"
    )


def _run(
    exhibit: Exhibit, row: PaperRow, training: Training, seed: int, teacher: PlannedRun | None = None
) -> PlannedRun:
    """The run of a row; a teacher is one as well."""
    assert row.network is not None
    own, arguments, changes = row.network, dict(row.arguments), dict(row.recipe or {})
    told = row.teacher if teacher is None else str(teacher.settings.output / TRAINING)
    if training.full:
        values = changes
    else:
        small = reduced()["networks"][own]
        own = small.get("network", own)
        width = arguments.get("width", 1) * small.get("arguments", {}).get("width", 1)
        arguments |= small.get("arguments", {}) | ({"width": width} if width != 1 else {})
        values = {**reduced()["recipe"], "image_size": small["image_size"], **changes}
    settings = Settings(
        training.runs,
        str(Path(training.data).resolve()) if Path(training.data).exists() else training.data,
        own,
        load_recipe(exhibit.recipe, {**values, **(training.overrides or {})}, own),
        model_args=[f"{key}={json.dumps(value)}" for key, value in arguments.items()] or None,
        unfold=row.unfold,
        teacher=told,
        seed=seed,
        threads=training.threads,
        accelerator=training.accelerator,
        keep="last",
    )
    name = f"{own.replace('/', '-')}-{_digest(settings)}-seed{seed}"
    return PlannedRun(name, replace(settings, output=training.runs / name))


def _digest(settings: Settings) -> str:
    """A name for what decides what is learnt, so that a folder never holds a run of other settings."""
    told = settings.to_dict() | {"recipe": asdict(settings.recipe.recipe)}
    decisive = {key: value for key, value in told.items() if key not in ("output", "threads", "accelerator")}
    return sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:8]
