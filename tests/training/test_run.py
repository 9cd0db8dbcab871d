"""A run ends with files that load, goes on after an interrupt with the same bits, and stops with a reason."""

import csv
import dataclasses
import errno
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

import refold
from refold.checkpoints import read_card
from refold.errors import InputError, RecipeError
from refold.training import run as running
from refold.training import starting
from refold.training.callbacks import Keeper
from refold.training.module import TrainingModule
from refold.training.recipe import load_recipe
from refold.training.run import Settings, resume, train

FILES = [
    "README.md", "card.json", "curves.png", "data.png", "fold.json", "fold.svg", "history.csv", "last.ckpt",
    "plain.onnx", "plain.safetensors", "run.json", "split.csv", "training.safetensors",
]  # fmt: skip
QUICK = {"epochs": 2, "batch_size": 8, "image_size": 32, "learning_rate": 1e-3}


def quiet() -> Console:
    return Console(file=io.StringIO(), width=100)


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """Class folders of noisy colours."""
    generator = np.random.default_rng(0)
    for channel, name in enumerate(("red", "green")):
        folder = tmp_path / "colours" / name
        folder.mkdir(parents=True)
        for index in range(15):
            pixels = generator.integers(0, 80, (40, 36, 3), dtype=np.uint8)
            pixels[..., channel] += 120
            Image.fromarray(pixels).save(folder / f"{index}.png")
    return tmp_path / "colours"


@pytest.fixture
def settings(colours: Path, tmp_path: Path) -> Callable[..., Settings]:
    def make(output: str = "run", recipe: dict[str, Any] | None = None, **others: Any) -> Settings:
        resolved = load_recipe("small_images", {**QUICK, **(recipe or {})})
        given = {"data": str(colours), "network": "repghostnet_050", **others}
        return Settings(tmp_path / output, recipe=resolved, **given)  # type: ignore[arg-type]

    return make


@pytest.fixture
def unfinished(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what comes after training."""
    monkeypatch.setattr(running, "finish", lambda *_: None)


def test_a_run_leaves_files_that_load(settings: Callable[..., Settings]) -> None:
    result = train(settings(), quiet())
    folder = settings().output
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert result.same_answers == result.held_out_images == 6
    assert result.training_score == result.plain_score == result.best["held_out_accuracy"]
    assert result.proof["distance_float64"] <= 1e-9
    training, plain = (
        refold.load(folder / f"{form}.safetensors", form=form)  # type: ignore[arg-type]
        for form in ("training", "plain")
    )
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(training(images), plain(images), rtol=1e-3, atol=1e-5)
    card = json.loads((folder / "card.json").read_text())
    assert card["class_names"] == plain.card.class_names == ["green", "red"]  # type: ignore[union-attr]
    assert card["settings"]["seed"] == 0
    assert card["settings"]["recipe"]["recipe"]["epochs"] == 2
    assert card["epoch"]["epoch"] == result.best["epoch"]
    assert set(card["versions"]) == {"refold", "torch", "timm", "lightning"}
    rows = list(csv.DictReader((folder / "history.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    with pytest.raises(InputError, match=r"holds a run already; .*--resume"):
        train(settings(), quiet())


def test_a_run_with_branches_leaves_files_that_load_and_can_be_trained_on(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    told = dataclasses.replace(settings(recipe={"epochs": 1}), network="resnet10t", unfold="repvgg")
    train(told, quiet())
    wide, plain = (refold.load(told.output / f"{form}.safetensors") for form in ("training", "plain"))
    assert wide.unfold_report.plan == "repvgg"  # type: ignore[union-attr]
    assert not hasattr(plain, "unfold_report")
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(wide(images), plain(images), rtol=1e-3, atol=1e-4)
    start = told.output / "training.safetensors"
    net = starting.build_network("resnet10t", 5, told.recipe.recipe, start)
    assert net.unfold_report.layers == wide.unfold_report.layers  # type: ignore[union-attr]
    kernel = "layer1.0.conv1.branches.1.conv.weight"
    assert torch.equal(net.get_parameter(kernel), wide.get_parameter(kernel))
    with pytest.raises(InputError, match="unfolded already"):
        train(dataclasses.replace(told, output=tmp_path / "more", checkpoint=str(start)), quiet())


EVERYTHING = {
    "epochs": 3, "ema_decay": 0.9, "mixup": 0.2, "cutmix": 1.0, "dropout": 0.3, "random_erasing": 0.5,
    "auto_augment": "rand-m9-mstd0.5", "warm_up_epochs": 1, "optimizer": "lamb",
}  # fmt: skip


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    state = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
    return {**state, **{f"best.{k}": v for k, v in load_file(folder / "training.safetensors").items()}}


@pytest.mark.usefixtures("unfinished")
@pytest.mark.parametrize(("accumulate", "workers"), [(1, 0), (2, 2)])
def test_an_interrupted_run_goes_on_with_the_same_bits(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, accumulate: int, workers: int
) -> None:
    whole = settings("whole", EVERYTHING, accumulate=accumulate, workers=workers, seed=3)
    train(whole, quiet())
    step = TrainingModule.training_step
    stops = {(0, 1), (2, 1)}

    def interrupted(module: TrainingModule, batch: Any, batch_idx: int) -> Any:
        if (module.current_epoch, batch_idx) in stops:
            raise KeyboardInterrupt
        return step(module, batch, batch_idx)

    monkeypatch.setattr(TrainingModule, "training_step", interrupted)
    parts = settings("parts", EVERYTHING, accumulate=accumulate, seed=3)
    with pytest.raises(KeyboardInterrupt):
        train(parts, quiet())
    assert sorted(path.name for path in parts.output.iterdir()) == ["data.png", "run.json", "split.csv"]
    stops.remove((0, 1))
    with pytest.raises(KeyboardInterrupt):
        resume(parts.output, quiet())
    assert torch.load(parts.output / "last.ckpt", weights_only=True)["epoch"] == 1
    assert refold.load(parts.output / "training.safetensors", form="training")
    stops.clear()
    (parts.output / ".training.safetensors.1.part").write_bytes(b"half")
    resume(parts.output, quiet())
    assert not list(parts.output.glob(".*"))
    first, second = tensors(whole.output), tensors(parts.output)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    histories = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(path.open())]
        for path in (whole.output / "history.csv", parts.output / "history.csv")
    ]
    assert histories[0] == histories[1]
    assert len(histories[0]) == 3


@pytest.mark.usefixtures("unfinished")
def test_a_seed_decides_the_weights(settings: Callable[..., Settings]) -> None:
    results = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(settings(name, {"epochs": 1}, seed=seed), quiet())
        results.append(load_file(settings(name).output / "training.safetensors"))
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])
    assert not all(torch.equal(results[0][key], results[2][key]) for key in results[0])


@pytest.mark.usefixtures("unfinished")
def test_a_loss_that_is_no_number_keeps_the_last_good_checkpoint(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = TrainingModule.training_step

    def poisoned(module: TrainingModule, batch: Any, batch_idx: int) -> Any:
        if module.current_epoch == 1:
            next(module.net.parameters()).data.fill_(float("nan"))
        return step(module, batch, batch_idx)

    monkeypatch.setattr(TrainingModule, "training_step", poisoned)
    with pytest.raises(InputError, match=r"no longer a number in epoch 2 \(learning rate .*lower"):
        train(settings(), quiet())
    kept = refold.load(settings().output / "training.safetensors", form="training")
    assert all(parameter.isfinite().all() for parameter in kept.parameters())
    assert kept.card.provenance["epoch"]["epoch"] == 1  # type: ignore[union-attr]


@pytest.mark.usefixtures("unfinished")
def test_a_full_disk_leaves_what_was_there(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning.pytorch import Trainer

    write = Trainer.save_checkpoint

    def full(trainer: Trainer, path: Any, *args: Any, **kwargs: Any) -> None:
        if trainer.current_epoch == 1:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(trainer, path, *args, **kwargs)

    monkeypatch.setattr(Trainer, "save_checkpoint", full)
    with pytest.raises(InputError, match=r"last.ckpt' cannot be written: No space left on device"):
        train(settings(), quiet())
    folder = settings().output
    assert not list(folder.glob(".*"))
    assert torch.load(folder / "last.ckpt", weights_only=True)["epoch"] == 0
    monkeypatch.undo()
    monkeypatch.setattr(running, "finish", lambda *_: None)
    kept = (folder / "last.ckpt").read_bytes()
    (folder / "last.ckpt").write_bytes(kept[:1000])
    with pytest.raises(
        InputError, match=r"last.ckpt' cannot be read .* remove it to begin with the first epoch"
    ):
        resume(folder, quiet())
    (folder / "last.ckpt").write_bytes(kept)
    resume(folder, quiet())
    assert torch.load(folder / "last.ckpt", weights_only=True)["epoch"] == 1


@pytest.mark.usefixtures("unfinished")
@pytest.mark.parametrize("in_memory", [True, False])
def test_unreadable_images_are_named_counted_and_left_out(
    settings: Callable[..., Settings], colours: Path, monkeypatch: pytest.MonkeyPatch, in_memory: bool
) -> None:
    if not in_memory:
        monkeypatch.setattr(starting, "_LARGEST_MEMORY", 0)
    broken = [colours / "red" / "3.png", colours / "green" / "4.png"]
    for path in broken:
        path.write_bytes(path.read_bytes()[:90])
    console = quiet()
    train(settings("run", {"batch_size": 24}), console)
    said = console.file.getvalue().replace("\n", "")  # type: ignore[attr-defined]
    assert said.count("Left out: The image") == 2
    assert all(str(path) in said for path in broken)
    with pytest.raises(
        InputError, match=r"2 images cannot be read, and 1 may be left out; the last: .*\.png"
    ):
        train(settings("strict", {"batch_size": 24}, unreadable=1), quiet())


def test_what_cannot_be_used_is_said_before_anything_is_written(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    for recipe, others, message in (
        ({"optimizer": "adamm"}, {}, "'optimizer' is 'adamm'; expected one of timm's"),
        ({}, {"data": str(tmp_path / "missing")}, "There is no folder"),
        ({}, {"network": "repghostnet_051"}, "repghostnet_050"),
        ({}, {"accumulate": 8}, "fewer than 2 a batch"),
        ({}, {"precision": "bf17"}, "accelerator 'auto' and precision 'bf17' here: "),
        ({}, {"accelerator": "tpus"}, "accelerator 'tpus' and precision '32-true' here: "),
    ):
        given = settings("run", recipe)
        with pytest.raises(refold.RefoldError, match=message) as caught:
            train(Settings(**{**vars(given), **others}), quiet())
        assert isinstance(caught.value, RecipeError) == bool(recipe)
        assert not given.output.exists()
    with pytest.raises(InputError, match="holds no run"):
        resume(tmp_path / "nothing", quiet())
    (tmp_path / "run.json").write_text('{"recipe": {}}')
    with pytest.raises(InputError, match="is not understood"):
        resume(tmp_path, quiet())


@pytest.mark.parametrize(("keep", "epoch", "weights"), [("best", 1, "trained"), ("last", 2, "average")])
def test_the_best_epoch_is_kept_or_the_last(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, keep: Any, epoch: int, weights: str
) -> None:
    """Accuracies that fall from epoch to epoch, the average's below."""

    def results(module: TrainingModule) -> dict[str, float]:
        worse = module.current_epoch / 4
        accuracies = {"held_out_accuracy_trained": 0.9 - worse, "held_out_accuracy_average": 0.8 - worse}
        return {"loss": 1.0, **accuracies}

    kept: dict[str, Any] = {}
    monkeypatch.setattr(TrainingModule, "epoch_results", results)
    monkeypatch.setattr(running, "finish", lambda settings, module, keeper, *_: kept.update(keeper.best))
    given = settings(recipe={"ema_decay": 0.9}, keep=keep)
    train(given, quiet())
    assert (kept["epoch"], kept["weights"]) == (epoch, weights)
    saved = read_card(given.output / "training.safetensors")
    assert saved is not None
    assert saved.provenance["epoch"]["epoch"] == epoch
    with pytest.raises(InputError, match="no network 'newest' to keep; choose best or last"):
        train(settings("other", keep="newest"), quiet())


def test_the_best_epoch_goes_with_the_state(tmp_path: Path) -> None:
    keeper = Keeper(tmp_path / "state", tmp_path / "history.csv", lambda net, row: None)
    keeper.load_state_dict({"rows": [{"epoch": 1}], "best": {"epoch": 1}})
    assert keeper.state_dict() == {"rows": [{"epoch": 1}], "best": {"epoch": 1}}


@pytest.mark.slow
def test_the_digits_are_learnt(tmp_path: Path) -> None:
    result = train(
        Settings(tmp_path / "run", "digits", "repghostnet_050", load_recipe("small_images")), quiet()
    )
    assert result.training_score == result.plain_score >= 0.98
    assert result.same_answers == result.held_out_images == 359


@pytest.mark.usefixtures("unfinished")
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory."),
            "does not hold this training at batch_size 8; lower it",
        ),
        (RuntimeError("[enforce fail] can't allocate memory: you tried"), "does not hold this training"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "give fewer --workers"),
        (OSError(errno.EIO, "Input/output error"), "The training cannot go on: Input/output error"),
    ],
)
def test_what_ends_a_training_from_outside_is_one_sentence(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    step = TrainingModule.training_step

    def failing(module: TrainingModule, batch: Any, batch_idx: int) -> Any:
        if module.current_epoch == 1:
            raise error
        return step(module, batch, batch_idx)

    monkeypatch.setattr(TrainingModule, "training_step", failing)
    with pytest.raises(InputError, match=message) as caught:
        train(settings(network="resnet10t"), quiet())
    assert str(caught.value).endswith(f"go on with: refold train --resume {settings().output}")
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("unfinished")
def test_switches_change_how_and_not_what(settings: Callable[..., Settings]) -> None:
    """Half precision, another layout and steps of several batches train the same network, nearly."""
    losses = []
    for name, given in (
        ("plain", {}),
        ("layout", {"channels_last": False}),
        ("half", {"precision": "bf16-mixed", "tensorboard": True}),
        ("steps", {"accumulate": 2}),
    ):
        told = settings(name, {"epochs": 1}, network="resnet10t", accelerator="cpu", **given)
        train(told, quiet())
        (row,) = csv.DictReader((told.output / "history.csv").open())
        losses.append(float(row["held_out_loss_trained"]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[2] == pytest.approx(losses[0], rel=0.1)
    assert losses[3] == pytest.approx(losses[0], rel=0.3)
    assert list((settings("half").output / "tensorboard").glob("events.*"))


@pytest.mark.usefixtures("unfinished")
def test_steps_are_whole(settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    """24 training images at 9 a step: two steps of two batches of 4, not six batches, in each of two epochs."""
    told = settings(recipe={"batch_size": 9}, network="resnet10t", accumulate=2)
    train(told, quiet())
    state = torch.load(told.output / "last.ckpt", weights_only=True)
    assert state["global_step"] == 4
