"""A table trained here, as a sheet."""

from __future__ import annotations

import csv
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from refold.bench.papers.grids import Grid
from refold.replication.relations import RULE, Relation
from refold.replication.replicating import Replication
from refold.replication.sheet import Sheet
from refold.training.settings import HISTORY

FORMAT = "refold replication 1"
_HEADINGS = [
    "row",
    "trained here",
    "top-1 %: here",
    "each seed",
    "quoted",
    "Δ: paper",
    "Δ: here",
    "the relation",
]
_NUMBERS = 2


def relation_cells(relation: Relation) -> list[str]:
    """The cells of a row of the table."""
    values = list(relation.accuracies.values())
    paper = relation.published_difference
    return [
        relation.model,
        relation.trained,
        with_spread(values, ".2f"),
        ", ".join(f"{value:.2f}" for value in values),
        "" if relation.published is None else f"{relation.published:g}",
        "" if paper is None or relation.reference is None else f"{paper:+.2f}",
        with_spread(relation.differences, "+.2f"),
        "" if relation.verdict is None else f"{relation.verdict} (to {relation.reference})",
    ]


def with_spread(values: list[float], form: str) -> str:
    """Mean and standard deviation; nothing of no values."""
    if not values:
        return ""
    return f"{mean(values):{form}}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def remarks(found: Replication) -> list[str]:
    """How it was trained, the rule, and what was left out."""
    lines = []
    if found.cards:
        card = next(iter(found.cards.values()))
        recipe, data = card["settings"]["recipe"]["recipe"], card["data"]
        scale = "the paper's networks and recipe" if found.training.full else "reduced networks and schedule"
        lines.append(
            f"{scale}: {recipe['epochs']} epochs of {data['training_images']:,} images, {recipe['optimizer']}, "
            f"{recipe['learning_rate']:g} at {recipe['learning_rate_batch_size']} images, {recipe['schedule']}; "
            f"measured on {card['result']['held_out_images']:,} held-out images after the last epoch, in plain form"
        )
    lines += ["±: standard deviation over the seeds", RULE]
    lines += [f"not trained: {model} {reason}" for model, reason in found.left.items()]
    return lines


def sheet(found: Replication) -> Sheet:
    """The table of what was trained, with what each run was told, its epochs and its versions as content."""
    rows = [relation_cells(relation) for relation in found.relations]
    return Sheet(found.exhibit, Grid("", _HEADINGS, rows, _NUMBERS), remarks(found), _content(found))


def _content(found: Replication) -> dict[str, Any]:
    recipes = [card["settings"]["recipe"]["recipe"] for card in found.cards.values()]
    shared = {
        key: value for key, value in (recipes or [{}])[0].items() if all(r[key] == value for r in recipes)
    }
    return {
        "format": FORMAT,
        "name": found.exhibit.name,
        "source": found.exhibit.source,
        "title": found.exhibit.title,
        "full": found.training.full,
        "rule": RULE,
        "rows": [
            {
                **asdict(relation),
                "differences": relation.differences,
                "published_difference": relation.published_difference,
                "relation": relation.verdict,
            }
            for relation in found.relations
        ],
        "left": found.left,
        "recipe": shared,
        "runs": {name: _run(found, name, shared) for name in found.cards},
    }


def _run(found: Replication, name: str, shared: dict[str, Any]) -> dict[str, Any]:
    card, told = found.cards[name], found.cards[name]["settings"]
    with (found.training.runs / name / HISTORY).open(encoding="utf-8", newline="") as file:
        history = [dict(row) for row in csv.DictReader(file)]
    recipe = told["recipe"]["recipe"]
    return {
        **{key: told[key] for key in ("network", "model_args", "unfold", "seed", "precision")},
        "teacher": told["teacher"] and (Path(told["teacher"]).parent.name or told["teacher"]),
        "recipe": {key: value for key, value in recipe.items() if key not in shared},
        **{key: card["data"][key] for key in ("training_images", "held_out_images")},
        **{key: card["result"][key] for key in ("training_score", "plain_score", "same_answers")},
        "distance_float64": card["result"]["proof"]["distance_float64"],
        "history": history,
        "versions": card["versions"],
    }
