"""A whole training run: images to a trained, folded, proved, saved and exported network, resumable at any time."""

from __future__ import annotations

import dataclasses
import json
import logging
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from rich.console import Console
from torch import Tensor, nn

from refold.checkpoints import example_input, load, original, save
from refold.errors import InputError, RefoldError
from refold.export import export
from refold.files import make_folder, write_text
from refold.folding import fold
from refold.training.batches import held_out_loader, reseed
from refold.training.callbacks import Keeper, LiveProgress, Row, Unreadable, progress
from refold.training.curves import draw_curves
from refold.training.data import LabelledImages, open_data, read_into_memory
from refold.training.distillation import Teacher, open_teacher
from refold.training.module import Classifier, make_optimizer
from refold.training.recipe import Recipe, ResolvedRecipe
from refold.training.starting import build_network, preprocessing_for, teacher_network
from refold.unfolding import unfold

STATE, TRAINING, PLAIN = "last.ckpt", "training.safetensors", "plain.safetensors"
_RUN, _CARD, _REPORT, _HISTORY, _CURVES, _ONNX = (
    "run.json",
    "card.json",
    "fold.json",
    "history.csv",
    "curves.png",
    "plain.onnx",
)
Keep = Literal["best", "last"]
_LARGEST_MEMORY = 2 * 1024**3


@dataclass(frozen=True)
class Settings:
    """What a run may be told, beside its recipe.

    ``data`` is what `refold.training.data.open_data` understands. ``checkpoint`` holds weights to start from,
    ``unfold`` names a plan of `refold.unfold`, ``teacher`` a network or a checkpoint to learn from.
    ``accelerator`` and ``precision`` are those of Lightning's Trainer. ``unreadable``
    images may be left out before it is an error. ``keep`` says which epoch's network is the result: the one that did
    best on the held-out images, or the last.
    """

    output: Path
    data: str
    network: str
    recipe: ResolvedRecipe
    checkpoint: str | None = None
    unfold: str | None = None
    teacher: str | None = None
    teacher_checkpoint: str | None = None
    seed: int = 0
    workers: int = 0
    threads: int = 1
    accelerator: str = "auto"
    precision: str = "32-true"
    accumulate: int = 1
    unreadable: int = 10
    keep: Keep = "best"

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON-able values."""
        return {**dataclasses.asdict(self), "output": str(self.output)}


@dataclass(frozen=True)
class Result:
    """What a run gave: the best epoch, held-out accuracies (shares) of both forms, the proof and the files."""

    best: Row
    epochs: int
    training_accuracy: float
    plain_accuracy: float
    same_answers: int
    held_out_images: int
    unreadable: list[str]
    proof: dict[str, Any]
    export_difference: float
    files: dict[str, str]


def default_output(command: str) -> Path:
    """A new folder under ``runs``, named by the command and the time."""
    return Path("runs") / time.strftime(f"{command}-%Y%m%d-%H%M%S")


def train(settings: Settings, console: Console) -> Result:
    """Train, fold, prove, save and export; everything that is written goes into ``settings.output``.

    Raises `InputError` where the images, the recipe or a setting cannot be used, where the folder holds a run
    already, and where the loss stops being a number; `NotEquivalent` where a form differs.
    """
    if (settings.output / _RUN).exists():
        raise InputError(
            f"'{settings.output}' holds a run already; give another folder, or go on with it: "
            f"refold train --resume {settings.output}"
        )
    return _run(settings, console)


def resume(folder: Path, console: Console) -> Result:
    """Go on with the run of a folder, from its last whole epoch; a finished run is folded and exported again.

    On one CPU process the weights are bit for bit those of a run that was never interrupted.
    Raises `InputError` where the folder holds no run.
    """
    try:
        written = json.loads((folder / _RUN).read_text(encoding="utf-8"))
        recipe = ResolvedRecipe.from_dict(written.pop("recipe"))
        settings = Settings(**{**written, "recipe": recipe, "output": folder})
    except FileNotFoundError as error:
        raise InputError(f"'{folder}' holds no run to go on with: there is no {_RUN} in it.") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"'{folder / _RUN}' is not understood ({error}); start the run again.") from error
    for leftover in folder.glob(".*.part"):
        leftover.unlink()  # half-written when the process was killed
    return _run(settings, console)


def _run(settings: Settings, console: Console) -> Result:
    if settings.keep not in get_args(Keep):
        raise InputError(f"There is no network '{settings.keep}' to keep; choose best or last.")
    recipe = settings.recipe.recipe
    unreadable = Unreadable(console, settings.unreadable)
    images = _ready(open_data(settings.data, settings.seed), recipe, unreadable, console)
    with _threads(settings.threads), _quiet():
        module = _classifier(settings, images)
        make_optimizer(module.net, recipe)  # what is unknown is said before anything is written
        _trainer(settings, [])
        make_folder(settings.output)
        write_text(settings.output / _RUN, json.dumps(settings.to_dict(), indent=2))
        keeper = _fit(settings, module, unreadable, console)
        assert keeper.best is not None
        return _finish(settings, module, keeper, unreadable, console)


def _classifier(settings: Settings, images: LabelledImages) -> Classifier:
    recipe = settings.recipe.recipe
    classes = len(images.class_names)
    reseed(settings.seed)
    net = build_network(settings.network, classes, recipe, settings.checkpoint)
    preprocessing = preprocessing_for(net, recipe, settings.checkpoint)
    net = _unfolded(net, settings, preprocessing).to(memory_format=torch.channels_last)
    teacher: Teacher | None = None
    if settings.teacher is not None:
        answering = teacher_network(settings.teacher, classes, settings.teacher_checkpoint)
        teacher = open_teacher(answering, settings.teacher, images.class_names, preprocessing)
    return Classifier(
        net,
        recipe,
        images,
        preprocessing,
        seed=settings.seed,
        workers=settings.workers,
        accumulate=settings.accumulate,
        teacher=teacher,
    )


def _unfolded(net: nn.Module, settings: Settings, preprocessing: dict[str, Any]) -> nn.Module:
    if settings.unfold is None:
        return net
    return unfold(net, settings.unfold, example_input=example_input(net, preprocessing["input_size"]))


def _fit(settings: Settings, module: Classifier, unreadable: Unreadable, console: Console) -> Keeper:
    state = settings.output / STATE

    def keep(net: nn.Module, row: Row) -> None:
        save(
            net,
            settings.output / TRAINING,
            class_names=module.images.class_names,
            preprocessing=module.preprocessing,
            provenance=_provenance(settings, module.images, row, unreadable),
        )

    keeper = Keeper(state, settings.output / _HISTORY, keep, last=settings.keep == "last")
    live = LiveProgress(console, f"Training {settings.network}", keeper)
    trainer = _trainer(settings, [unreadable, keeper, live])
    with _interruptible():
        trainer.fit(module, ckpt_path=str(state) if state.is_file() else None, weights_only=True)
    return keeper


def _trainer(settings: Settings, callbacks: list[Callback]) -> Trainer:
    recipe = settings.recipe.recipe
    try:
        return Trainer(
            accelerator=settings.accelerator,
            devices=1,
            precision=settings.precision,  # type: ignore[arg-type]  # a text of the user's; Lightning checks it
            max_epochs=recipe.epochs,
            accumulate_grad_batches=settings.accumulate,
            gradient_clip_val=recipe.gradient_clip,
            callbacks=callbacks,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    except (ValueError, RuntimeError, MisconfigurationException) as error:
        raise InputError(
            f"Lightning cannot train with accelerator '{settings.accelerator}' and precision "
            f"'{settings.precision}' here: {' '.join(str(error).split())}"
        ) from error


def _finish(
    settings: Settings, module: Classifier, keeper: Keeper, unreadable: Unreadable, console: Console
) -> Result:
    """What is folded is the best network as it was saved."""
    folder, images = settings.output, module.images
    names = [TRAINING, PLAIN, _ONNX, _REPORT, _CARD, _HISTORY, _CURVES]
    net = load(folder / TRAINING, form="training")
    trained = net if settings.unfold is None else original(net)
    example = example_input(net, module.preprocessing["input_size"])
    with console.status("Folding, and proving the fold"):
        plain: Any = fold(trained, example)
    answers = {name: _answers(form, module) for name, form in (("training", net), ("plain", plain))}
    reference, truth = answers["training"]
    same = int((answers["plain"][0] == reference).sum())
    save(plain, folder / PLAIN)
    write_text(folder / _REPORT, plain.fold_report.to_json())
    with console.status("Exporting to ONNX, and running the file against PyTorch"):
        exported = export(plain, folder / _ONNX, example)
    draw_curves(folder / _CURVES, f"{settings.network}, {images.title}", keeper.rows)
    assert keeper.best is not None
    result = Result(
        best=keeper.best,
        epochs=len(keeper.rows),
        training_accuracy=(reference == truth).double().mean().item(),
        plain_accuracy=(answers["plain"][0] == truth).double().mean().item(),
        same_answers=same,
        held_out_images=len(truth),
        unreadable=list(unreadable.messages),
        proof=plain.fold_report.proof.to_dict(),
        export_difference=exported.max_difference,
        files={name: str(folder / name) for name in names},
    )
    card = {
        **_provenance(settings, images, keeper.best, unreadable),
        "class_names": images.class_names,
        "preprocessing": module.preprocessing,
        "result": dataclasses.asdict(result),
    }
    write_text(folder / _CARD, json.dumps(card, indent=2))
    return result


def _answers(net: nn.Module, module: Classifier) -> tuple[Tensor, Tensor]:
    """Predicted and true classes of the held-out images, int64 ``(images,)``."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net.eval().to(device)
    predictions, truth = [], []
    with torch.inference_mode():
        for batch in held_out_loader(module.images.held_out, module.measure, 128, workers=module.workers):
            if len(batch.images):
                predictions.append(net(batch.images.to(device)).argmax(dim=1).cpu())
                truth.append(batch.targets)
    net.cpu()
    return torch.cat(predictions), torch.cat(truth)


def _provenance(
    settings: Settings, images: LabelledImages, row: Row, unreadable: Unreadable
) -> dict[str, Any]:
    return {
        "data": {
            "title": images.title,
            "training_images": len(images.training),
            "held_out_images": len(images.held_out),
            "unreadable": len(unreadable.messages),
        },
        "settings": settings.to_dict(),
        "epoch": row,
        "versions": {name: version(name) for name in ("refold", "torch", "timm", "lightning")},
    }


def _ready(
    images: LabelledImages, recipe: Recipe, unreadable: Unreadable, console: Console
) -> LabelledImages:
    """Read the images into memory where they fit, large enough for the recipe's smallest crop."""
    smallest = 1.0 if recipe.crop_padding is not None else recipe.crop_scale[0]
    side = round(recipe.image_size / smallest**0.5)
    total = len(images.training) + len(images.held_out)
    if total * 4 * side**2 > _LARGEST_MEMORY:
        return images
    with progress(console) as shown:
        task = shown.add_task("Reading images", total=total, note="")
        parts = [
            read_into_memory(part, side, lambda: shown.advance(task), unreadable.add)
            for part in (images.training, images.held_out)
        ]
    if not all(parts):
        raise InputError(f"No image of '{images.title}' can be read; repair or replace them.")
    return dataclasses.replace(images, training=parts[0], held_out=parts[1])


@contextmanager
def _interruptible() -> Iterator[None]:
    """Lightning turns Ctrl-C and SIGTERM into an exit of the process; here it stays an interrupt."""
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if in_main else None
    try:
        yield
    except SystemExit as error:
        raise KeyboardInterrupt from error
    except RefoldError:
        raise
    except OSError as error:
        raise InputError(f"The training cannot go on: {error.strerror or error}.") from error
    finally:
        if in_main:
            signal.signal(signal.SIGINT, handler)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's advice off the terminal; what concerns the run is said here."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning.*")
            warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
