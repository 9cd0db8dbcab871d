"""The papers' accuracy tables, trained: which runs there are, what their relations say, and that they go on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from refold.bench.papers import find_exhibit, list_papers
from refold.cli import app
from refold.errors import InputError
from refold.models import create_model
from refold.replication import Relation, Training, why_not
from refold.replication.plan import plan, reduced
from refold.replication.relations import is_told
from refold.targets import model_arguments
from refold.training import run as running
from refold.training.recipe import load_recipe

TRAINED = [
    *(f"ghostnets/table-{number}" for number in (4, 5, 6, 11, 13, 14)),
    *(f"ghostnetv3/table-{number}" for number in range(1, 9)),
    *("ghostnets/figure-11", "ghostnetv3/figure-3", "repghost/table-3", "repghost/table-7"),
    *("repvgg/figure-6", "repvgg/figure-7", "repnext/table-5"),
]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two colours, 16 images each to train on and 8 to measure."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 16), ("test", 8)):
        for channel, name in enumerate(("red", "green")):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 80, (32, 32, 3), dtype=np.uint8)
                pixels[..., channel] += 120
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return tmp_path / "images"


def a_training(**others: Any) -> Training:
    return Training("digits", Path("runs"), **others)


def test_the_tables_that_are_trained_and_why_others_are_not() -> None:
    assert {exhibit.name for exhibit in list_papers() if not why_not(exhibit)} == set(TRAINED)
    assert "No rows of repghost/table-4 are chosen" in why_not(find_exhibit("repghost/table-4"))
    assert "COCO" in why_not(find_exhibit("ghostnets/table-10"))
    assert "no accuracy" in why_not(find_exhibit("repghost/table-1"))


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("full", [False, True])
def test_every_planned_run_can_be_built(name: str, full: bool) -> None:
    planned = plan(find_exhibit(name), a_training(seeds=2, full=full))
    assert sum(row.row.reference not in (None, row.row.model) for row in planned.rows) >= 1
    assert all(len(row.runs) == 2 for row in planned.rows)
    assert {row.row.reference for row in planned.rows} - {None} <= {row.row.model for row in planned.rows}
    places = [run.name for run in planned.runs]
    assert len(set(places)) == len(places)
    for run in planned.runs[:: max(1, len(planned.runs) // 3)]:
        run.settings.check()
        if not full:  # the papers' own are built by the tests of their sizes
            given = model_arguments(run.settings.model_args)
            assert create_model(run.settings.network, num_classes=10, **given).num_classes == 10
            teacher = Path(run.settings.teacher or run.settings.output / "x").parent.name
            assert places.index(teacher) <= places.index(run.name)


def test_a_row_keeps_what_it_changes_and_the_schedule_gives_the_rest() -> None:
    rows = plan(find_exhibit("ghostnetv3/table-7"), a_training(overrides={"epochs": 5})).rows
    recipes = [row.runs[0].settings.recipe.recipe for row in rows]
    assert [recipe.weight_decay for recipe in recipes] == [0.01, 0.03, 0.05, 0.07, 0.1]
    assert {recipe.epochs for recipe in recipes} == {5}
    assert {recipe.learning_rate for recipe in recipes} == {reduced()["recipe"]["learning_rate"]}
    assert {recipe.alpha for recipe in recipes} == {0.5}  # GhostNetV3's own
    full = plan(find_exhibit("ghostnetv3/table-7"), a_training(full=True)).rows[0].runs[0].settings
    assert (full.network, full.teacher) == ("ghostnetv3_130", "beitv2_base_patch16_224")
    assert full.recipe.recipe == load_recipe("ghostnetv3", {"weight_decay": 0.01}).recipe


def test_a_width_is_multiplied_and_equal_rows_share_their_runs() -> None:
    narrow = plan(find_exhibit("ghostnets/table-11"), a_training()).rows[1].runs[0].settings
    assert model_arguments(narrow.model_args) == {"ghost_ratio": 0, "width": 0.35}
    pairs = plan(find_exhibit("ghostnetv3/table-1"), a_training())
    assert len(pairs.rows) == 6
    assert len(pairs.runs) == 6  # three seeds of two networks
    left = plan(find_exhibit("ghostnets/table-6"), a_training()).left
    assert left["HRank (ResNet56)"] == "is a network that cannot be built here"


def test_patterns_bring_the_row_that_is_compared_with() -> None:
    rows = plan(find_exhibit("repghost/table-7"), a_training(), ["BN"]).rows
    assert [row.row.model for row in rows] == ["no-reparam", "BN"]
    with pytest.raises(InputError, match=r"No row of repghost/table-7 that was asked for is compared"):
        plan(find_exhibit("repghost/table-7"), a_training(), ["no-reparam"])


@pytest.mark.parametrize(
    ("here", "paper", "verdict"),
    [
        # The mean is 2; t of two degrees of freedom times the standard error is 4.303 · s / √3.
        ((1.9, 2.0, 2.1), 1.0, "holds"),
        ((1.9, 2.0, 2.1), -1.0, "reversed"),
        ((1.0, 2.0, 3.0), 1.0, "cannot be told"),
        ((1.2, 2.0, 2.8), 1.0, "holds"),  # 1.987 of 2
        ((1.1, 2.0, 2.9), 1.0, "cannot be told"),  # 2.236
        ((1.9, 2.0, 2.1), 0.0, "differs"),
        ((1.9, 2.0, 2.1), None, "higher"),
        ((-1.9, -2.0, -2.1), None, "lower"),
        ((5.0,), 1.0, "cannot be told"),
    ],
)
def test_a_relation_is_told_where_the_spread_allows(
    here: tuple[float, ...], paper: float | None, verdict: str
) -> None:
    reference = {seed: 60.0 + 10 * seed for seed in range(len(here))}
    own = {seed: reference[seed] + value for seed, value in enumerate(here)}
    printed = None if paper is None else 70 + paper
    relation = Relation("row", "net", printed, own, "reference", 70.0, reference)
    assert relation.verdict == verdict
    assert relation.published_difference == paper
    assert Relation("row", "net", 1.0, own).verdict is None


def test_no_spread_at_all_tells_what_there_is() -> None:
    assert is_told([1.0, 1.0])
    assert not is_told([0.0, 0.0])
    assert not is_told([])


@pytest.mark.slow
def test_on_the_command_line(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: str) -> Any:
        told = ["--accuracy", "--data", str(images), "--runs", str(tmp_path / "runs"), "--only", "d=1"]
        told += ["--set", "epochs=1", "--set", "batch_size=8"]
        return CliRunner().invoke(app, ["paper", "ghostnets/table-4", *told, *arguments])

    result = tmp_path / "result.json"
    first = run("--seeds", "1", "-o", str(result), "--markdown")
    assert first.exit_code == 0, first.output
    assert "| d=1 | cghost_vgg16(cheap_kernel_size=1, width=0.125), 32 px |" in first.stdout
    known = json.loads(result.read_text())
    assert [row["relation"] for row in known["rows"]] == [None, "cannot be told"]
    assert known["rows"][1]["published_difference"] == pytest.approx(-0.1)
    assert len(known["runs"]) == 2
    assert {run["training_images"] for run in known["runs"].values()} == {32}
    assert str(tmp_path) not in result.read_text()
    # A run that is stopped leaves the others, which are not trained again.
    train = running.train
    stopped = []

    def stop_at_last(*args: Any, **others: Any) -> Any:
        stopped.append(args[0].seed)
        if len(stopped) == 2:
            raise KeyboardInterrupt
        return train(*args, **others)

    monkeypatch.setattr("refold.replication.replicating.train", stop_at_last)
    second = run("--seeds", "2", "-o", str(result))
    assert second.exit_code == 130
    assert stopped == [1, 1]
    assert len(json.loads(result.read_text())["runs"]) == 3
    third = run("--seeds", "2", "--json")
    assert third.exit_code == 0, third.output
    assert stopped == [1, 1, 1]
    assert [len(row["differences"]) for row in json.loads(third.stdout)["rows"]] == [0, 2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["repghost/table-7", "--accuracy"], "There is nothing to train on; give --data"),
        (["repghost/table-7", "--seeds", "2"], "--seeds is about training; add --accuracy"),
        (["repghost/table-4", "--accuracy", "--data", "digits"], "are chosen to be trained small"),
        (["repghost/table-7", "--accuracy", "--data", "digits", "--seeds", "0"], "seeds is 0; give"),
        (["repghost/table-7", "--accuracy", "--data", "digits", "-o", "t.csv"], "neither .json nor .md"),
        (["repghost/table-7", "--accuracy", "--data", "digits", "--csv"], "--csv exclude each other"),
        (["repghost/table-7", "--accuracy", "--pretrained", "photos"], "exclude each other"),
        (["repghost/table-7", "--accuracy", "--data", "digits", "--set", "epoch=2"], "no key 'epoch'"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(words: list[str], message: str) -> None:
    error = CliRunner().invoke(app, ["paper", *words]).exception
    assert isinstance(error, InputError) or "RecipeError" in type(error).__name__
    assert message in str(error)
    assert "\n" not in str(error)
