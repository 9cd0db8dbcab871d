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
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from PIL.Image import Image
from rich.console import Console
from torch import nn

from refold.checkpoints import example_input, save
from refold.errors import InputError, RefoldError, first_line
from refold.files import make_folder, write_text
from refold.training.batches import reseed
from refold.training.callbacks import EpochRow, Keeper, LiveProgress, Unreadable
from refold.training.data import open_data
from refold.training.estimating import Estimate, estimate, memory_of_process
from refold.training.finishing import finish, provenance
from refold.training.images import Images, LabelledImages
from refold.training.module import TrainingModule, make_optimizer
from refold.training.processes import Launcher, PeerEnded, Place, ProcessLauncher
from refold.training.recipe import ResolvedRecipe
from refold.training.settings import HISTORY, RUN, STATE, TENSORBOARD, TRAINING, Result, Settings
from refold.training.starting import build_network, fit_in_memory, preprocessing_for, ready
from refold.training.task import task_of
from refold.training.teaching import open_teaching
from refold.unfolding import unfold

__all__ = ["Result", "Settings", "default_output", "expect", "resume", "train"]

_LAUNCHER = ProcessLauncher()
_SAMPLE = 256
_PEER_ENDED = "Another process of the run ended; it says why."
_PEER_IS_GONE = ("Connection closed by peer", "Connection reset by peer", "NCCL")


def default_output(command: str) -> Path:
    """A new folder under ``runs``, named by the command and the time."""
    return Path("runs") / time.strftime(f"{command}-%Y%m%d-%H%M%S")


def train(settings: Settings, console: Console, launcher: Launcher = _LAUNCHER) -> Result | None:
    """Train, fold, prove, save and export; everything that is written goes into ``settings.output``.

    Several devices train in processes of their own, which the ``launcher`` starts unless torchrun did it; the first of
    all writes and returns the result, the others None.
    Raises `InputError` where the images, the recipe or a setting cannot be used, where the folder holds a run
    already, and where the loss stops being a number; `NotEquivalent` where a form differs.
    """
    if (launcher.place() or Place()).is_first and (settings.output / RUN).exists():
        raise InputError(
            f"'{settings.output}' holds a run already; give another folder, or go on with it: "
            f"refold train --resume {settings.output}"
        )
    return _run(settings, console, launcher)


def resume(folder: Path, console: Console, launcher: Launcher = _LAUNCHER) -> Result | None:
    """Go on with the run of a folder, from its last whole epoch; a finished run is folded and exported again.

    On one CPU process the weights are bit for bit those of a run that was never interrupted. Under torchrun each
    process reads the folder.
    Raises `InputError` where the folder holds no run, or its state cannot be read.
    """
    try:
        written = json.loads((folder / RUN).read_text(encoding="utf-8"))
        recipe = ResolvedRecipe.from_dict(written.pop("recipe"))
        settings = Settings(**{**written, "recipe": recipe, "output": folder})
    except FileNotFoundError as error:
        raise InputError(f"'{folder}' holds no run to go on with: there is no {RUN} in it.") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"'{folder / RUN}' is not understood ({error}); start the run again.") from error
    if (launcher.place() or Place()).is_first:
        for leftover in folder.glob(".*.part"):
            leftover.unlink()  # half-written when the process was killed
    return _run(settings, console, launcher)


def expect(settings: Settings, console: Console) -> Estimate:
    """The time and memory that each process of a run will take, from a few real steps; nothing is written.

    Raises what `train` raises before it begins.
    """
    settings.check()
    here = Place(0, settings.devices, settings.nodes)
    everything = open_data(settings.data, settings.seed)
    in_memory = fit_in_memory(everything, settings.recipe.recipe, here.devices)
    sample = dataclasses.replace(
        everything,
        training=_some(everything.training, _SAMPLE),
        held_out=_some(everything.held_out, _SAMPLE // 4),
    )
    program = memory_of_process()
    began = time.perf_counter()
    if in_memory:
        sample = ready(sample, settings.recipe.recipe, Unreadable(console, _SAMPLE), console, here.devices)
    reading = time.perf_counter() - began
    parts = [len(images.training) + len(images.held_out) for images in (everything, sample)]
    factor = parts[0] / parts[1] if in_memory else 0.0
    with _threads(settings.threads), _quiet(), console.status("Measuring a few steps"):
        module = _module(settings, everything, here, console)
        alone = dataclasses.replace(settings, devices=1, nodes=1, strategy="auto", tensorboard=False)
        trainer = _trainer(alone, module, [])
        return estimate(
            module,
            sample,
            trainer.strategy.root_device,
            trainer.precision_plugin.forward_context,
            reading=reading * factor,
            images=round(_pixel_bytes(sample) * factor),
            program=program,
        )


def _some(images: Images, count: int) -> Images:
    """That many of the images, spread evenly."""
    chosen = range(0, len(images), max(1, len(images) // count))
    return Images([images.sources[i] for i in chosen], [images.targets[i] for i in chosen])


def _pixel_bytes(images: LabelledImages) -> int:
    sources = (*images.training.sources, *images.held_out.sources)
    # Pillow keeps four bytes a pixel.
    return sum(4 * source.width * source.height for source in sources if isinstance(source, Image))


def _run(settings: Settings, console: Console, launcher: Launcher = _LAUNCHER) -> Result | None:
    settings.check()
    here = launcher.place()
    if here is None and settings.devices * settings.nodes > 1:
        result: Result | None = launcher.start(
            _started, (settings, console.quiet, launcher), devices=settings.devices, nodes=settings.nodes
        )
        return result
    here = here or Place()
    settings = dataclasses.replace(settings, devices=here.devices, nodes=here.nodes)
    if not here.is_first:
        console = Console(quiet=True)
    recipe = settings.recipe.recipe
    unreadable = Unreadable(console, settings.unreadable)
    images = ready(open_data(settings.data, settings.seed), recipe, unreadable, console, here.devices)
    with _threads(settings.threads), _quiet():
        module = _module(settings, images, here, console)
        make_optimizer(module.net, recipe)  # what is unknown is said before anything is written
        _trainer(settings, module, [])
        if here.is_first:
            make_folder(settings.output)
            write_text(settings.output / RUN, json.dumps(settings.to_dict(), indent=2))
        keeper = _fit(settings, module, unreadable, console)
        return finish(settings, module, keeper, unreadable, console) if here.is_first else None


def _started(settings: Settings, quiet: bool, launcher: Launcher) -> Result | None:
    return _run(settings, Console(quiet=quiet), launcher)


def _module(settings: Settings, images: LabelledImages, here: Place, console: Console) -> TrainingModule:
    recipe = settings.recipe.recipe
    task = task_of(images, recipe)
    reseed(settings.seed)
    net = build_network(
        settings.network,
        len(images.class_names),
        recipe,
        settings.checkpoint,
        settings.model_args,
        partial(console.print, markup=False),
    )
    preprocessing = preprocessing_for(net, recipe, settings.checkpoint)
    net = _unfolded(net, settings, preprocessing)
    if settings.channels_last:
        net = net.to(memory_format=torch.channels_last)
    module = TrainingModule(
        net,
        recipe,
        images,
        preprocessing,
        task,
        seed=settings.seed,
        workers=settings.workers,
        accumulate=settings.accumulate,
        processes=here.processes,
        sync_batch_norm=settings.sync_batch_norm,
        channels_last=settings.channels_last,
        compile=settings.compile,
        teaching=open_teaching(settings, net, images, preprocessing, console),
    )
    # Lightning makes it double only after it has read the weights to go on from.
    return module.double() if settings.precision == "64-true" else module


def _unfolded(net: nn.Module, settings: Settings, preprocessing: dict[str, Any]) -> nn.Module:
    if settings.unfold is None:
        return net
    return unfold(net, settings.unfold, example_input=example_input(net, preprocessing["input_size"]))


def _fit(settings: Settings, module: TrainingModule, unreadable: Unreadable, console: Console) -> Keeper:
    state = settings.output / STATE

    def keep(net: nn.Module, row: EpochRow) -> None:
        save(
            net,
            settings.output / TRAINING,
            class_names=module.images.class_names,
            preprocessing=module.preprocessing,
            provenance=provenance(settings, module.images, row, unreadable),
        )

    keeper = Keeper(state, settings.output / HISTORY, keep, last=settings.keep == "last")
    live = LiveProgress(console, f"Training {settings.network}", keeper)
    trainer = _trainer(settings, module, [unreadable, keeper, live])
    begun = _readable(state)
    with _interruptible(settings):
        trainer.fit(module, ckpt_path=begun, weights_only=True)
    return keeper


def _trainer(settings: Settings, module: TrainingModule, callbacks: list[Callback]) -> Trainer:
    recipe = settings.recipe.recipe
    try:
        return Trainer(
            accelerator=settings.accelerator,
            devices=settings.devices,
            num_nodes=settings.nodes,
            strategy=_strategy(settings),
            precision=settings.precision,  # type: ignore[arg-type]  # a text of the user's; Lightning checks it
            max_epochs=recipe.epochs,
            limit_train_batches=module.batches,
            accumulate_grad_batches=settings.accumulate,
            gradient_clip_val=recipe.gradient_clip,
            callbacks=callbacks,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            logger=TensorBoardLogger(settings.output, TENSORBOARD, version="")
            if settings.tensorboard
            else False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    except ModuleNotFoundError as error:
        raise InputError("Logs for TensorBoard need its package; pip install tensorboard.") from error
    except (ValueError, RuntimeError, MisconfigurationException) as error:
        raise InputError(
            f"Lightning cannot train on {settings.devices} devices with accelerator '{settings.accelerator}' and "
            f"precision '{settings.precision}' here: {' '.join(str(error).split())}"
        ) from error


def _strategy(settings: Settings) -> str | DDPStrategy:
    if settings.strategy == "auto" and settings.devices * settings.nodes == 1:
        return "auto"
    # Batch norm statistics are averaged once an epoch instead (or synchronised).
    return DDPStrategy(
        find_unused_parameters=settings.strategy == "ddp_find_unused_parameters_true", broadcast_buffers=False
    )


def _readable(state: Path) -> str | None:
    """The state to go on from, if there is one; raises `InputError` where it is damaged."""
    if not state.is_file():
        return None
    try:
        torch.load(state, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, UnpicklingError) as error:
        raise InputError(
            f"'{state}' cannot be read ({first_line(error)}); remove it to begin with the first epoch again."
        ) from error
    return str(state)


@contextmanager
def _interruptible(settings: Settings) -> Iterator[None]:
    """Lightning turns Ctrl-C and SIGTERM into an exit of the process; here it stays an interrupt.

    What ends a training from outside becomes an `InputError`, which says how to go on.
    """
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if in_main else None
    kept = (
        f" {settings.output} keeps the last whole epoch; go on with: refold train --resume {settings.output}"
    )
    try:
        yield
    except SystemExit as error:
        raise KeyboardInterrupt from error
    except (RefoldError, OSError, RuntimeError) as error:
        reason = _reason(error, settings)
        if reason is None:
            raise
        kind = PeerEnded if reason == _PEER_ENDED else InputError
        raise kind(reason + (kept if (settings.output / STATE).is_file() else "")) from error
    finally:
        if in_main:
            signal.signal(signal.SIGINT, handler)


def _reason(error: BaseException, settings: Settings) -> str | None:
    """Why a training cannot go on, where it is known and not a defect of the program."""
    said = str(error)
    if isinstance(error, RefoldError):
        return said
    if isinstance(error, OSError):
        return f"The training cannot go on: {error.strerror or error}."
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in said:
        size = settings.recipe.recipe.batch_size
        return (
            f"The memory does not hold this training at batch_size {size}; lower it, or raise --accumulate."
        )
    if "DataLoader worker" in said:
        return f"A process that prepares images was ended ({first_line(error)}); give fewer --workers."
    if settings.devices * settings.nodes > 1 and any(sign in said for sign in _PEER_IS_GONE):
        return _PEER_ENDED
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's advice off the terminal; what concerns the run is said here."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning.*")
            for said in ("lr_scheduler.step", "all_reduce is deprecated"):
                warnings.filterwarnings("ignore", message=f".*{said}.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
