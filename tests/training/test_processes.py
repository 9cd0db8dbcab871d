"""Several processes train as one does, and end together with one reason."""

import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from refold.errors import InputError
from refold.training import run as running
from refold.training.processes import Launcher, Place, ProcessLauncher
from refold.training.recipe import load_recipe
from refold.training.run import Settings

LAUNCHER = ProcessLauncher()
place, start = LAUNCHER.place, LAUNCHER.start


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., Settings]:
    """A run on class folders of noise, one image broken, at a batch that two processes cannot share equally."""
    generator = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(11):
            pixels = generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{index}.png")

    def make(output: str, **others: Any) -> Settings:
        recipe = {"epochs": 2, "batch_size": 9, "image_size": 32, "learning_rate": 1e-3, "ema_decay": 0.5}
        resolved = load_recipe("small_images", recipe)
        return Settings(
            tmp_path / output, str(tmp_path / "data"), "test_efficientnet", resolved,
            precision="64-true", accelerator="cpu", sync_batch_norm=True, **others,
        )  # fmt: skip

    return make


def fit(settings: Settings, stop: str = "", resumes: bool = False) -> list[int]:
    """Train and leave out what comes after; with ``stop`` the second process ends so in the second epoch."""
    torch.set_num_threads(1)
    running.finish = lambda *_: [os.getpid()]  # type: ignore[assignment]
    if stop and place() == Place(1, 2, 1):
        end_second(stop)
    beginning = running.Beginning(resumes=resumes)
    return running._run(settings, Console(quiet=True), ProcessLauncher(), beginning)  # type: ignore[return-value]


def end_second(how: str) -> None:
    validate = running.TrainingModule.validation_step

    def ended(module: running.TrainingModule, batch: Any, batch_idx: int) -> None:
        if module.current_epoch == 1 and how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if module.current_epoch == 1:
            raise InputError("Enough of this.")
        validate(module, batch, batch_idx)

    running.TrainingModule.validation_step = ended  # type: ignore[method-assign]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
    return state


def history(folder: Path) -> list[list[float]]:
    lines = (folder / "history.csv").read_text().splitlines()[1:]
    return [[float(v) for v in line.split(",")[:-1] if v not in ("trained", "average")] for line in lines]


def assert_same(one: Path, two: Path) -> None:
    first, second = tensors(one), tensors(two)
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=1e-7, atol=1e-9, msg=key)
    np.testing.assert_allclose(history(two), history(one), rtol=1e-6)
    assert not list(two.glob(".*"))


def test_two_processes_are_as_one(
    settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights and statistics from the same seed, and each held-out image counted once."""
    monkeypatch.setattr(running, "finish", running.finish)
    fit(settings("one"))
    two = settings("two", devices=2)
    assert start(fit, (two,), devices=2, nodes=1) != [os.getpid()]
    assert_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_one_process_ends_all_and_they_go_on_together(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "finish", running.finish)
    whole, parts = settings("whole"), settings("parts", devices=2)
    fit(whole)
    for stop, message in (
        (
            "raises",
            r"^Enough of this\. .*parts keeps the last whole epoch; go on with: refold train --resume",
        ),
        ("killed", r"^Process 1 of 2 was ended from outside \(SIGKILL\)"),
    ):
        with pytest.raises(InputError, match=message):
            start(fit, (parts, stop, stop == "killed"), devices=2, nodes=1)
    start(fit, (parts, "", True), devices=2, nodes=1)
    assert_same(whole.output, parts.output)


def test_where_a_process_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert place() is None
    environment = {"TORCHELASTIC_RUN_ID": "a", "RANK": "5", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "2"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert place() == Place(5, 2, 3)
    assert (Place(5, 2, 3).processes, Place(5, 2, 3).is_first, Place().is_first) == (6, False, True)
    monkeypatch.setenv("WORLD_SIZE", "7")
    with pytest.raises(InputError, match="2 of 7 processes here; start equally many"):
        place()


def test_machines_need_a_meeting_point(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(InputError, match="set MASTER_PORT, NODE_RANK on each, or start with torchrun"):
        start(fit, (settings("run"),), devices=1, nodes=2)
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("NODE_RANK", "2")
    with pytest.raises(InputError, match="NODE_RANK is 2; the 2 machines are numbered from 0"):
        start(fit, (settings("run"),), devices=1, nodes=2)
    for given, message in (
        ({"strategy": "fsdp"}, "no strategy 'fsdp' here; choose auto, ddp"),
        ({"devices": 0}, "devices is 0; give at least 1"),
    ):
        with pytest.raises(InputError, match=message):
            running.train(dataclasses.replace(settings("run"), **given), Console(quiet=True))  # type: ignore[arg-type]


def test_a_launcher_starts_the_run(settings: Callable[..., Settings]) -> None:
    """Whatever brings a run into its processes is asked once, and gets all that it takes to train in each."""

    class Remembering(ProcessLauncher):
        def start(self, work: Callable[..., Any], arguments: tuple[Any, ...], **where: int) -> Any:
            asked.append((work, arguments, where))

    asked: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, int]]] = []
    launcher: Launcher = Remembering()
    told = settings("run", devices=3, nodes=2)
    assert running.train(told, Console(quiet=True), launcher) is None
    ((_, arguments, where),) = asked
    assert arguments == (told, True, launcher, running.Beginning())
    assert where == {"devices": 3, "nodes": 2}
