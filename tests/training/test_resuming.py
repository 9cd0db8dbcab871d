"""Going on with a run: one at a time, by what it began with, with what may change and a reason where it may not."""

import io
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from refold.errors import InputError, RecipeError
from refold.training import run as running
from refold.training.folders import class_folders
from refold.training.images import LabelledImages
from refold.training.lock import locked
from refold.training.module import TrainingModule
from refold.training.recipe import load_recipe
from refold.training.resuming import read_settings, remove_run
from refold.training.run import Settings, resume, train
from refold.training.split import same_split, write_split

Make = Callable[..., Path]


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def said(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture
def settings(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Settings]:
    """Settings of a short run, which leaves out what comes after training."""
    monkeypatch.setattr(running, "finish", lambda *_: None)
    data = make({"a": 10, "b": 10})

    def of(output: str = "run", **recipe: Any) -> Settings:
        values = {"epochs": 1, "batch_size": 8, "image_size": 32, **recipe}
        resolved = load_recipe("small_images", values)
        return Settings(tmp_path / output, str(data), "test_efficientnet", resolved)

    return of


# ---- the lock ----


def test_a_folder_is_one_runs(tmp_path: Path) -> None:
    held = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from pathlib import Path; from refold.training.lock import locked\n"
            f"with locked(Path({str(tmp_path)!r})):\n    print('held', flush=True); time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert held.stdout is not None
        assert held.stdout.readline() == "held\n"
        with (
            pytest.raises(
                InputError, match=rf"in use by another run \(process {held.pid} on .* since .*\); wait"
            ),
            locked(tmp_path),
        ):
            pass
    finally:
        held.kill()  # as a power cut would: nothing is cleaned
        held.wait()
    assert list(tmp_path.iterdir()) != []
    with locked(tmp_path):
        assert json.loads((tmp_path / ".lock.owner").read_text())[0] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_refused_while_another_has_its_folder(settings: Callable[..., Settings]) -> None:
    told = settings()
    with locked(told.output), pytest.raises(InputError, match="in use by another run"):
        train(told, quiet())
    train(told, quiet())
    with locked(told.output), pytest.raises(InputError, match="in use by another run"):
        resume(told.output, quiet())


# ---- the split ----


@pytest.fixture
def images(make: Make) -> Callable[[], LabelledImages]:
    root = make({"a": 20, "b": 20})
    return lambda: class_folders(root)


def parts(images: LabelledImages) -> tuple[set[str], set[str]]:
    return {str(s) for s in images.training.sources}, {str(s) for s in images.held_out.sources}


def picture(path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 255, (9, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def test_the_split_is_found_again(images: Callable[[], LabelledImages], tmp_path: Path) -> None:
    write_split(images(), tmp_path / "split.csv")
    again, changes = same_split(images(), tmp_path / "split.csv", changes_allowed=False)
    assert changes == []
    assert (list(again.training.sources), list(again.held_out.sources)) == (
        list(images().training.sources),
        list(images().held_out.sources),
    )
    lines = (tmp_path / "split.csv").read_text().splitlines()
    assert lines[0] == "part,class,image,digest"
    assert len(lines) == 41
    assert sum(line.startswith("held-out,") for line in lines) == 8


def test_changed_data_are_named_and_held_out_images_stay_held_out(
    images: Callable[[], LabelledImages], tmp_path: Path
) -> None:
    first = images()
    write_split(first, tmp_path / "split.csv")
    training, held_out = parts(first)
    root = Path(first.title)
    for index in range(15):
        picture(root / "a" / f"new {index}.png", 100 + index)
    gone = sorted(training)[0]
    Path(gone).unlink()
    other = sorted(held_out)[0]
    picture(Path(other), 7)
    with pytest.raises(InputError) as caught:
        same_split(images(), tmp_path / "split.csv", changes_allowed=False)
    message = str(caught.value)
    assert "15 images new (a/new 0.png, a/new 1.png, a/new 10.png, ...)" in message
    assert f"1 image gone ({Path(gone).relative_to(root)})" in message
    assert f"1 image of another content ({Path(other).relative_to(root)})" in message
    assert "--data-changed" in message
    # The seed alone would now hold out others.
    assert parts(images())[1] != held_out
    again, changes = same_split(images(), tmp_path / "split.csv", changes_allowed=True)
    assert len(changes) == 3
    assert parts(again)[1] == held_out
    assert len(parts(again)[0]) == len(training) - 1 + 15


def test_a_new_image_of_a_split_on_disk_stays_where_it_lies(make: Make, tmp_path: Path) -> None:
    root = make({f"{part}/{name}": 3 for part in ("train", "val") for name in "ab"})
    write_split(class_folders(root), tmp_path / "split.csv")
    picture(root / "val" / "a" / "new.png", 3)
    again, _ = same_split(class_folders(root), tmp_path / "split.csv", changes_allowed=True)
    assert str(root / "val" / "a" / "new.png") in parts(again)[1]


def test_other_classes_are_refused(images: Callable[[], LabelledImages], tmp_path: Path) -> None:
    write_split(images(), tmp_path / "split.csv")
    root = Path(images().title)
    (root / "b").rename(root / "c")
    for allowed in (False, True):
        with pytest.raises(InputError, match="no longer those that the run began with: 'b' is only in one"):
            same_split(images(), tmp_path / "split.csv", changes_allowed=allowed)


def test_a_run_goes_on_with_its_data(settings: Callable[..., Settings], tmp_path: Path) -> None:
    told = settings()
    train(told, quiet())
    picture(Path(told.data) / "a" / "new.png", 5)
    with pytest.raises(InputError, match=r"changed since the run began: 1 image new \(a/new\.png\)"):
        resume(told.output, quiet())
    console = quiet()
    resume(told.output, console, data_changed=True)
    assert "1 image new (a/new.png)" in said(console)
    resume(told.output, quiet())  # the change is known now
    moved = tmp_path / "moved"
    shutil.move(told.data, moved)
    with pytest.raises(InputError, match="There is no folder"):
        resume(told.output, quiet())
    resume(told.output, quiet(), changes={"data": str(moved)})
    assert read_settings(told.output).data == str(moved)


# ---- what may change ----


def test_a_value_that_can_change_does(settings: Callable[..., Settings]) -> None:
    told = settings()
    train(told, quiet())
    console = quiet()
    resume(
        told.output,
        console,
        changes={"threads": 2, "keep": "last"},
        recipe_changes={"epochs": 2, "learning_rate": 1e-4},
    )
    now = read_settings(told.output)
    assert (now.threads, now.keep, now.recipe.recipe.epochs, now.recipe.recipe.learning_rate) == (
        2,
        "last",
        2,
        1e-4,
    )
    assert now.recipe.sources["epochs"] == "given on resuming"
    assert "epoch 2 of 2: loss" in said(console)
    assert "epoch 1 of 2: loss" not in said(console)
    assert "starts from the last whole epoch of" in said(console)


@pytest.mark.parametrize(
    ("changes", "recipe_changes", "message"),
    [
        ({"network": "resnet18"}, {}, "network is 'test_efficientnet' .* cannot become 'resnet18'"),
        ({"seed": 3}, {}, "seed is 0 .* decides what is learnt from the beginning"),
        ({}, {"batch_size": 4}, "batch_size is 8 .* other steps than the schedule counted"),
        ({}, {"optimizer": "sgd"}, "optimizer is 'adamw' .* belongs to the optimiser"),
        ({}, {"ema_decay": 0.9}, "ema_decay is None .* no place for it"),
        ({"threads": 0}, {}, "threads is 0; give a number from 1"),
    ],
)
def test_a_value_that_cannot_change_is_refused(
    settings: Callable[..., Settings], changes: dict[str, Any], recipe_changes: dict[str, Any], message: str
) -> None:
    told = settings()
    train(told, quiet())
    before = (told.output / "run.json").read_bytes()
    with pytest.raises(InputError, match=message):
        resume(told.output, quiet(), changes=changes, recipe_changes=recipe_changes)
    assert (told.output / "run.json").read_bytes() == before


def test_a_run_that_diverged_goes_on_with_another_rate(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = TrainingModule.training_step

    def poisoned(module: TrainingModule, batch: Any, batch_idx: int) -> Any:
        if module.current_epoch == 1 and module.recipe.learning_rate > 1e-3:
            next(module.net.parameters()).data.fill_(float("nan"))
        return step(module, batch, batch_idx)

    monkeypatch.setattr(TrainingModule, "training_step", poisoned)
    told = settings(epochs=2)
    for again in (lambda: train(told, quiet()), lambda: resume(told.output, quiet())):
        with pytest.raises(
            InputError, match=r"no longer a number in epoch 2 .*--set learning_rate.*--overwrite"
        ):
            again()
    resume(told.output, quiet(), recipe_changes={"learning_rate": 1e-3})
    assert torch.load(told.output / "last.ckpt", weights_only=True)["epoch"] == 1


def test_a_run_is_replaced_when_that_is_asked_for(settings: Callable[..., Settings]) -> None:
    told = settings()
    train(told, quiet())
    (told.output / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds a run already; .* replace it \(--overwrite\)"):
        train(told, quiet())
    with pytest.raises(RecipeError, match="auto_augment"):
        train(settings(auto_augment="nonsense"), quiet(), overwrite=True)
    assert (told.output / "last.ckpt").exists()  # a mistake costs nothing
    train(settings(epochs=2), quiet(), overwrite=True)
    assert (told.output / "notes.txt").read_text() == "mine"
    assert torch.load(told.output / "last.ckpt", weights_only=True)["epoch"] == 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: run.pop("recipe"), "KeyError"),
        (lambda run: run.update(devices="many"), "'devices': Input should be a valid integer"),
        (lambda run: run.update(seed=-1), "seed is -1"),
        (lambda run: run.update(strategy="fsdp"), "'strategy'"),
        (lambda run: run["recipe"]["recipe"].update(epochs="many"), "'epochs' is 'many'"),
        (lambda run: run["recipe"].update(recipe=7), "is not understood"),
    ],
)
def test_broken_settings_are_named(
    settings: Callable[..., Settings], damage: Callable[[dict[str, Any]], Any], message: str
) -> None:
    told = settings()
    told.output.mkdir()
    written = told.to_dict()
    damage(written)
    (told.output / "run.json").write_text(json.dumps(written))
    with pytest.raises(InputError, match=message):
        resume(told.output, quiet())


def test_deep_nesting_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="is not understood"):
        resume(tmp_path, quiet())


# ---- what is said and checked before ----


def test_a_run_says_what_it_starts_from_and_trains_on(settings: Callable[..., Settings]) -> None:
    console = quiet()
    told = settings()
    (Path(told.data) / "a" / "film.gif").touch()
    train(told, console)
    lines = [line for line in said(console).splitlines() if line]  # older versions of Rich leave one empty
    assert lines[0] == "test_efficientnet starts from random weights."
    assert lines[1] == (
        f"{told.data}: 16 training and 4 held-out images of 2 classes (a 8, b 8), all 20 x 12 pixels."
    )
    assert lines[2] == (
        "Trained at 32 x 32 pixels, recipe small_images: 1 epoch in batches of 8, learning rate 0.00141421."
    )
    assert lines[3].startswith("Left out: 1 pictures of another format")
    assert lines[4].startswith("epoch 1 of 1: loss")
    assert (told.output / "data.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"auto_augment": "rnd-m9"}, "'auto_augment' is 'rnd-m9', which timm does not understand"),
        ({"auto_augment": "rand-m9-n100000"}, "'auto_augment' is 'rand-m9-n100000'"),
        ({"auto_augment": "rand-mx"}, "'auto_augment' is 'rand-mx'"),
        ({"optimizer": "adam_w"}, "'optimizer' is 'adam_w'; expected one of timm's"),
    ],
)
def test_typing_mistakes_are_found_before_images_are_read(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, recipe: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(running, "open_data", lambda *_: pytest.fail("images were looked for"))
    with pytest.raises(RecipeError, match=message):
        train(settings(**recipe), quiet())


def test_a_size_that_the_network_does_not_take_is_named(settings: Callable[..., Settings]) -> None:
    told = settings(image_size=8)
    with pytest.raises(
        InputError, match=r"vgg11 does not take images of 8 x 8 pixels \(.*\); give another image_size"
    ):
        train(Settings(told.output, told.data, "vgg11", told.recipe), quiet())
    assert not told.output.exists()


# ---- from the command line ----


def run_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "refold", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


@pytest.mark.slow
def test_sigterm_ends_as_an_interrupt_does(settings: Callable[..., Settings], tmp_path: Path) -> None:
    told = settings()
    script = textwrap.dedent(
        f"""
        import os, signal, sys, threading
        from refold.training import module
        from refold.training.module import TrainingModule
        step = TrainingModule.training_step
        def stopped(self, batch, index):
            if self.current_epoch == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(self, batch, index)
        TrainingModule.training_step = stopped
        sys.argv = ["refold", "train", "--data", {told.data!r}, "-o", {str(told.output)!r}, "--network",
            "test_efficientnet", "--set", "epochs=3", "--set", "batch_size=8", "--set", "image_size=32"]
        from refold.cli import main
        main()
        """
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == 130, ended.stderr
    assert ended.stderr.strip().endswith(f"refold: stopped; go on with: refold train --resume {told.output}")
    assert torch.load(told.output / "last.ckpt", weights_only=True)["epoch"] == 0
    assert not list(told.output.glob(".*"))


def test_files_that_are_no_runs_are_not_replaced(settings: Callable[..., Settings]) -> None:
    folder = settings().output
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("mine")
    with pytest.raises(
        InputError, match=r"holds no run, but README\.md, which this one would replace; give another"
    ):
        train(settings(), quiet())
    assert (folder / "README.md").read_text() == "mine"


def test_a_state_of_something_else_is_named(settings: Callable[..., Settings]) -> None:
    train(settings(), quiet())
    state = settings().output / "last.ckpt"
    kept = torch.load(state, weights_only=True)
    name = next(iter(kept["state_dict"]))
    kept["state_dict"]["net.stranger"] = kept["state_dict"].pop(name)
    for foreign in (kept, {"a": torch.zeros(3)}):
        torch.save(foreign, state)
        with pytest.raises(
            InputError, match=r"last\.ckpt' is not the state of this run, or 'run\.json' was edited"
        ):
            resume(settings().output, quiet(), recipe_changes={"epochs": 9})


def test_a_linked_folder_of_logs_is_unlinked_and_kept(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").symlink_to(tmp_path / "logs")
    remove_run(tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())
    assert (tmp_path / "logs").is_dir()


@pytest.mark.parametrize(
    "text", ["", "part,class,image,digest\n", "part,class,image,digest\njunk,a,1.png,00\n"]
)
def test_a_broken_list_of_images_is_named(
    images: Callable[[], LabelledImages], tmp_path: Path, text: str
) -> None:
    (tmp_path / "split.csv").write_text(text)
    with pytest.raises(InputError, match=r"split\.csv', which says what the run trains on, cannot be read"):
        same_split(images(), tmp_path / "split.csv", changes_allowed=True)


def test_a_state_with_flipped_bytes_is_refused(settings: Callable[..., Settings]) -> None:
    told = settings()
    train(told, quiet())
    state = told.output / "last.ckpt"
    content = bytearray(state.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    state.write_bytes(content)
    with pytest.raises(InputError, match=r"last\.ckpt' cannot be read \(.* is damaged\); remove it"):
        resume(told.output, quiet())


def test_what_a_run_lacks_is_said(settings: Callable[..., Settings]) -> None:
    told = settings(epochs=2)
    train(told, quiet())
    with pytest.raises(
        InputError, match=r"has 2 epochs already and cannot end with 1; give epochs=2 or more"
    ):
        resume(told.output, quiet(), recipe_changes={"epochs": 1})
    resume(told.output, quiet(), recipe_changes={"epochs": 2})
    (told.output / "split.csv").unlink()
    console = quiet()
    resume(told.output, console)
    assert "split.csv' is gone: that the images are those of the beginning is not checked." in said(console)
    (told.output / "training.safetensors").unlink()
    with pytest.raises(
        InputError, match=r"training\.safetensors', the best network so far, is gone; put it back"
    ):
        resume(told.output, quiet())
