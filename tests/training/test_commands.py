"""The commands ``refold train`` and ``refold distill``."""

import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from refold import cli
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

    def stopped(settings: Settings, console: object) -> None:
        seen.append(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "train", stopped)
    folder = tmp_path / "run"
    for command, own in (
        ("train", []),
        ("distill", ["--teacher", "resnet18", "--teacher-checkpoint", "t.safetensors"]),
    ):
        arguments = ["--data", "digits", "-o", str(folder), "--set", "epochs=3", "--seed", "7", *own]
        result = CliRunner().invoke(cli.app, [command, *arguments])
        assert result.exit_code == 130
        assert f"go on with: refold train --resume {folder}" in " ".join(result.stderr.split())
    train, distill = seen
    assert (train.output, train.data, train.seed, train.teacher) == (folder, "digits", 7, None)
    assert train.recipe.recipe.epochs == 3
    assert (distill.teacher, distill.teacher_checkpoint) == ("resnet18", "t.safetensors")


def test_mistakes_are_one_clear_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for arguments, message in (
        (["train"], "nothing to train on; give --data"),
        (["train", "--set", "epoch=3"], "did you mean 'epochs'"),
        (["train", "--resume", str(tmp_path)], "holds no run"),
        (["train", "--resume", str(tmp_path), "--set", "epochs=9"], "as it was started; leave"),
    ):
        with pytest.raises(InputError, match=message):
            CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.setitem(sys.modules, "lightning", None)
    for name in [name for name in sys.modules if name.startswith("refold.training.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(InputError, match=r"Training needs lightning.*pip install 'refold\[train\]'"):
        CliRunner().invoke(cli.app, ["train"], catch_exceptions=False)
