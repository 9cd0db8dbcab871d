"""Training the rows of a table, one run after the other, each resumed where it was stopped and read where it ended."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from refold.bench.papers.published import Exhibit, PaperRow, find_exhibit
from refold.errors import InputError
from refold.replication.plan import Plan, PlannedRun, Training, plan
from refold.replication.relations import Relation
from refold.training.progress import tell
from refold.training.run import resume, train
from refold.training.settings import CARD, RUN


@dataclass(frozen=True)
class Replication:
    """A table trained here: its relations, the cards of its finished runs, and why other rows were not trained."""

    exhibit: Exhibit
    training: Training
    relations: tuple[Relation, ...]
    cards: dict[str, dict[str, Any]]
    left: dict[str, str]


def replicate(
    name: str,
    training: Training,
    console: Console,
    *,
    only: Sequence[str] = (),
    on_run: Callable[[Replication], None] = lambda _: None,
) -> Replication:
    """Train the rows of a table or figure, such as "repvgg/figure-6", and compare them with the paper's.

    ``only`` are patterns of rows or networks, by default all. After each run ``on_run`` is given what is known by then.
    Finished runs of ``training.runs`` are read, stopped ones go on.
    Raises `InputError` for an unknown name and a table whose accuracies cannot be trained, and what `train` raises.
    """
    planned = plan(find_exhibit(name), training, only)
    left = [run for run in planned.runs if _card(run) is None]
    tell(
        console,
        f"{name}: {len(planned.rows)} rows, {training.seeds} seeds, {len(planned.runs)} runs, of which "
        f"{len(planned.runs) - len(left)} are finished.",
    )
    for number, run in enumerate(left, 1):
        args = " ".join(run.settings.model_args or ())
        tell(console, f"Run {number} of {len(left)}: {run.settings.network} {args}, seed {run.settings.seed}")
        begun = (run.settings.output / RUN).is_file()
        if begun:
            resume(run.settings.output, console)
        else:
            train(run.settings, console)
        on_run(_read(planned, training))
    return _read(planned, training)


def _read(planned: Plan, training: Training) -> Replication:
    """What the finished runs say."""
    cards = {run.name: card for run in planned.runs if (card := _card(run)) is not None}
    known = {planned_row.row.model: _accuracies(planned_row.runs, cards) for planned_row in planned.rows}
    rows = {each.row.model: each for each in planned.rows}
    relations = []
    for each in planned.rows:
        other = each.row.reference if each.row.reference != each.row.model else None
        relations.append(
            Relation(
                each.row.model,
                trained_as(each.runs[0]),
                published(planned.exhibit, each.row),
                known[each.row.model],
                other,
                None if other is None else published(planned.exhibit, rows[other].row),
                None if other is None else known[other],
            )
        )
    return Replication(planned.exhibit, training, tuple(relations), cards, dict(planned.left))


def published(exhibit: Exhibit, row: PaperRow) -> float | None:
    """The top-1 accuracy that the paper prints for a row."""
    ((place, _),) = exhibit.columns_of("top-1")
    return float(row.values[place]) if row.values[place] else None


def trained_as(run: PlannedRun) -> str:
    """The network of a run with its arguments, branches and image size, as one text."""
    settings = run.settings
    told = [*(settings.model_args or ()), *([f"unfold={settings.unfold}"] if settings.unfold else [])]
    arguments = f"({', '.join(told)})".replace('"', "") if told else ""
    return f"{settings.network}{arguments}, {settings.recipe.recipe.image_size} px"


def _accuracies(runs: Iterable[PlannedRun], cards: dict[str, dict[str, Any]]) -> dict[int, float]:
    return {
        run.settings.seed: 100 * cards[run.name]["result"]["plain_score"] for run in runs if run.name in cards
    }


def _card(run: PlannedRun) -> dict[str, Any] | None:
    """The card of a run that has ended; raises `InputError` where it is not understood."""
    path = run.settings.output / CARD
    if not path.is_file():
        return None
    try:
        card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        float(card["result"]["plain_score"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"'{path}' is not the card of a run ({error!r}); remove its folder.") from error
    return card
