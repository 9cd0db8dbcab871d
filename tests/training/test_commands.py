"""The commands ``refold train`` and ``refold distill``."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import refold
from refold import cli
from refold.cli.runs import distill_command, train_command
from refold.errors import InputError
from refold.training import run as running
from refold.training.run import Settings


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_dry_run_prints_the_resolved_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    printed = invoke("train", "--dry-run", "--recipe", "repghost", "--set", "batch_size=256")
    for key, value, source in (
        ("epochs", "300", "section 4.1"),
        ("batch_size", "256", "given"),
        ("learning rate of the run", "0.15", "proportional to"),
    ):
        assert re.search(rf"{key}[^\n]*{value}[^\n]*{source}", printed)
    assert not list(tmp_path.iterdir())


def test_options_reach_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Settings] = []

    def stopped(settings: Settings, console: object, *, overwrite: bool) -> None:
        seen.append(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "train", stopped)
    folder = tmp_path / "run"
    for command, own in (
        ("train", []),
        ("distill", ["--teacher", "resnet18", "--teacher-checkpoint", "t.safetensors"]),
    ):
        arguments = ["--data", "digits", "-o", str(folder), "--set", "epochs=3", "--seed", "7", *own]
        arguments += [
            "--devices",
            "2",
            "--nodes",
            "3",
            "--sync-batch-norm",
            "--no-channels-last",
            "--compile",
        ]
        result = CliRunner().invoke(cli.app, [command, *arguments])
        assert result.exit_code == 130
        assert result.stderr == "refold: stopped; nothing was written\n"
    train, distill = seen
    assert (train.output, train.data, train.seed, train.teacher) == (folder, "digits", 7, None)
    assert train.recipe.recipe.epochs == 3
    assert (train.devices, train.nodes, train.sync_batch_norm, train.channels_last) == (2, 3, True, False)
    assert (train.compile, train.tensorboard, train.strategy, train.keep) == (True, False, "auto", "best")
    assert (distill.teacher, distill.teacher_checkpoint) == ("resnet18", "t.safetensors")


def test_mistakes_are_one_clear_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for arguments, message in (
        (["train"], "nothing to train on; give --data"),
        (["train", "--set", "epoch=3"], "did you mean 'epochs'"),
        (["train", "--resume", str(tmp_path)], "holds no run"),
        (["train", "--resume", str(tmp_path), "--recipe", "repghost"], "goes on with a run .* leave"),
        (["train", "--resume", str(tmp_path), "--dry-run"], "goes on with a run .* leave"),
        (["train", "--resume", str(tmp_path), "--overwrite"], "goes on with a run .* leave"),
        (["train", "--resume", str(tmp_path), "-o", "elsewhere"], "goes on with a run .* leave"),
        (["train", "--data", "digits", "--data-changed"], "--data-changed belongs to --resume"),
    ):
        with pytest.raises(InputError, match=message):
            CliRunner().invoke(cli.app, arguments, catch_exceptions=False)


def test_an_interrupt_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stopped(settings: Settings, console: object, *, overwrite: bool) -> None:
        settings.output.mkdir()
        (settings.output / "run.json").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "train", stopped)
    folder = tmp_path / "run"
    result = CliRunner().invoke(cli.app, ["train", "--data", "digits", "-o", str(folder)])
    assert (result.exit_code, result.stderr) == (
        130,
        f"refold: stopped; go on with: refold train --resume {folder}\n",
    )


def test_options_have_the_defaults_of_settings() -> None:
    settings = {entry.name: entry.default for entry in dataclasses.fields(Settings)}
    for command, own in ((train_command, 20), (distill_command, 22)):
        options = {name: given.default for name, given in inspect.signature(command).parameters.items()}
        shared = options.keys() & settings.keys() - {"data", "network", "recipe", "output", "teacher"}
        assert len(shared) == own
        assert {name: options[name] for name in shared} == {name: settings[name] for name in shared}


def test_a_dry_run_with_data_says_what_a_run_takes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ["--set", "batch_size=16", "--set", "image_size=32", "--network", "resnet10t"]
    printed = invoke("train", "--dry-run", "--data", "digits", *settings)
    assert re.search(r"memory of each process .* MB", printed)
    assert re.search(r"89 steps an epoch, 1,424 images .* s ", printed)
    assert re.search(r"time of the training .* (min|h|days)", printed)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_counts_the_teacher(tmp_path: Path) -> None:
    """Its answers and its features are asked for as in a run."""
    teacher = tmp_path / "teacher.safetensors"
    names = [str(digit) for digit in range(10)]
    refold.save(refold.create_model("resnet10t", num_classes=10), teacher, class_names=names)
    told = ["--set", "batch_size=16", "--set", "image_size=32", "--network", "resnet10t"]
    for weight in ("0", "1"):
        features = ["--set", f"feature_weight={weight}"]
        printed = invoke(
            "distill", "--dry-run", "--data", "digits", "--teacher", str(teacher), *told, *features
        )
        assert re.search(r"teacher +[^\n]*\d MB", printed)
