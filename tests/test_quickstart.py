"""The whole path, on the bundled digits and on a user's folder."""

import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

import refold
from refold.errors import InputError
from refold.quickstart import IN_ENGINE, PLAIN_FORM, TRAINING_FORM, QuickstartOptions, render, run

FILES = [
    "README.md", "card.json", "chart.png", "curves.png", "data.png", "fold.json", "fold.svg", "history.csv",
    "last.ckpt", "plain.onnx", "plain.safetensors", "results.json", "run.json", "split.csv", "training.safetensors",
]  # fmt: skip


def quiet() -> Console:
    return Console(file=io.StringIO(), width=80)


@pytest.mark.slow
def test_digits_reach_the_promised_accuracy_in_every_form(tmp_path: Path) -> None:
    result = run(QuickstartOptions(tmp_path / "run"), quiet())
    columns = result.columns
    assert list(columns) == [TRAINING_FORM, PLAIN_FORM, IN_ENGINE]
    assert columns[TRAINING_FORM].score >= 0.97
    assert {column.score for column in columns.values()} == {columns[TRAINING_FORM].score}
    assert [column.same_answers for column in columns.values()] == [359] * 3
    # The history is kept in float32.
    assert result.history[-1]["score"] == pytest.approx(columns[TRAINING_FORM].score, rel=1e-6)
    assert result.proof["distance_float64"] <= 1e-9
    assert columns[PLAIN_FORM].operators.get("batch norm", 0) == 0
    assert columns[PLAIN_FORM].operator_count < columns[TRAINING_FORM].operator_count
    assert columns[PLAIN_FORM].parameters == columns[IN_ENGINE].parameters < columns[TRAINING_FORM].parameters
    assert columns[PLAIN_FORM].macs == columns[IN_ENGINE].macs == columns[TRAINING_FORM].macs
    assert columns[IN_ENGINE].latency > 0
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == FILES


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """Class folders of plain colours, easily told apart."""
    for name, shade in (("red", (200, 0, 0)), ("green", (0, 200, 0))):
        (tmp_path / "colours" / name).mkdir(parents=True)
        for index in range(10):
            lighter = tuple(value + 5 * index for value in shade)
            Image.new("RGB", (40, 30), lighter).save(tmp_path / "colours" / name / f"{index}.png")
    return tmp_path / "colours"


def test_a_users_folder_leaves_files_that_load(colours: Path, tmp_path: Path) -> None:
    console = quiet()
    result = run(QuickstartOptions(tmp_path / "run", colours, epochs=2, image_size=32, seed=5), console)
    assert (result.training_images, result.held_out_images) == (16, 4)
    assert [column.same_answers for column in result.columns.values()] == [4, 4, 4]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == FILES
    written = json.loads((tmp_path / "run" / "results.json").read_text())
    assert written["columns"]["plain"]["macs"] == result.columns[PLAIN_FORM].macs
    assert json.loads((tmp_path / "run" / "fold.json").read_text())["proof"] == written["proof"]

    training = refold.load(result.files["training form"], form="training")
    plain = refold.load(result.files["plain form"], form="plain")
    card = training.card
    assert card.class_names == ["green", "red"]  # type: ignore[union-attr]
    assert card.provenance["epoch"]["epoch"] == 2  # type: ignore[index, union-attr]
    assert plain.card.provenance == card.provenance  # type: ignore[union-attr]
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(training(images), plain(images), rtol=1e-3, atol=1e-5)
    console.print(render(result))
    assert "same answers" in console.file.getvalue()  # type: ignore[attr-defined]


def test_what_cannot_be_used_is_said_before_anything_is_written(colours: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for settings, message in (
        (QuickstartOptions(tmp_path / "run", tmp_path / "missing"), "There is no folder"),
        (QuickstartOptions(tmp_path / "run", image_size=4), "'image_size' is 4 .* from 8 to 4,096"),
        (QuickstartOptions(tmp_path / "run", epochs=0), "'epochs' is 0 .* from 1"),
        (QuickstartOptions(tmp_path / "file"), "cannot be made"),
    ):
        with pytest.raises(InputError, match=message):
            run(settings, quiet())
    assert not (tmp_path / "run").exists()
