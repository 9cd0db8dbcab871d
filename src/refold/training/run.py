"""A whole training run: images to a trained, folded, proved, saved and exported network, resumable at any time."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from PIL.Image import Image
from rich.console import Console
from torch import nn

from refold.bench.latency import torch_threads
from refold.checkpoints import example_input, save
from refold.errors import InputError
from refold.files import remove_leftovers, write_text, written_aside
from refold.models.composed import task_of
from refold.quantization.rounded import RoundedNetwork
from refold.training.batches import reseed
from refold.training.callbacks import EpochRow, Keeper, LiveProgress, Unreadable
from refold.training.checking import check_recipe, check_size, describe_start
from refold.training.data import open_data
from refold.training.estimating import Estimate, estimate, memory_of_process
from refold.training.finishing import finish, provenance
from refold.training.images import Images, LabelledImages
from refold.training.interruptions import interruptible, lightning_quiet
from refold.training.lock import locked
from refold.training.module import TrainingModule
from refold.training.processes import Launcher, Place, ProcessLauncher
from refold.training.progress import tell
from refold.training.resuming import (
    changed,
    check_foreign,
    foreign_state,
    read_settings,
    readable_state,
    remove_run,
)
from refold.training.rounding import finish_rounded, fitted, rounded_start
from refold.training.settings import (
    HISTORY,
    RUN,
    SAMPLE,
    SPLIT,
    STATE,
    TENSORBOARD,
    TRAINING,
    Result,
    Settings,
)
from refold.training.split import same_split, write_split
from refold.training.starting import build_network, fit_in_memory, preprocessing_for, ready
from refold.training.survey import draw_sample
from refold.training.tasks import task_for
from refold.training.teaching import open_teaching
from refold.unfolding import unfold

__all__ = ["Result", "Settings", "default_output", "expect", "resume", "train"]

_LAUNCHER = ProcessLauncher()
_SAMPLE = 256


def default_output(command: str) -> Path:
    """A new folder under ``runs``, named by the command and the time."""
    return Path("runs") / time.strftime(f"{command}-%Y%m%d-%H%M%S")


def train(
    settings: Settings, console: Console, launcher: Launcher = _LAUNCHER, *, overwrite: bool = False
) -> Result | None:
    """Train, fold, prove, save and export; everything that is written goes into ``settings.output``.

    Several devices train in processes of their own, which the ``launcher`` starts unless torchrun did it; the first of
    all writes and returns the result, the others None. With ``overwrite`` the files of a run that is there already go
    once the new one is about to train.
    Raises `InputError` where the images, the recipe or a setting cannot be used, where the folder holds a run
    already, or files that it would replace, or another run has it, and where the loss stops being a number;
    `NotEquivalent` where a form differs.
    """
    if (launcher.place() or Place()).is_first and not overwrite and (settings.output / RUN).exists():
        raise InputError(
            f"'{settings.output}' holds a run already; give another folder, replace it (--overwrite), or go on with "
            f"it: refold train --resume {settings.output}"
        )
    if (launcher.place() or Place()).is_first and not overwrite:
        check_foreign(settings.output)
    return _run(settings, console, launcher, Beginning(overwrite=overwrite))


def resume(
    folder: Path,
    console: Console,
    launcher: Launcher = _LAUNCHER,
    *,
    changes: Mapping[str, Any] | None = None,
    recipe_changes: Mapping[str, Any] | None = None,
    data_changed: bool = False,
) -> Result | None:
    """Go on with the run of a folder, from its last whole epoch; a finished run is folded and exported again.

    On one CPU process the weights are bit for bit those of a run that was never interrupted. Under torchrun each
    process reads the folder. ``changes`` are settings, and ``recipe_changes`` values of the recipe, that hold from now
    on; ``data_changed`` goes on with images that are no longer those of the beginning.
    Raises `InputError` where the folder holds no run, its state cannot be read, the data changed, or a change makes no
    sense in a run that has begun.
    """
    settings = changed(read_settings(folder), changes or {}, recipe_changes or {})
    return _run(settings, console, launcher, Beginning(resumes=True, data_changed=data_changed))


def expect(settings: Settings, console: Console) -> Estimate:
    """The time and memory that each process of a run will take, from a few real steps; nothing is written.

    Raises what `train` raises before it begins.
    """
    settings = fitted(settings)
    settings.check()
    check_recipe(settings.recipe.recipe)
    here = Place(0, settings.devices, settings.nodes)
    everything = open_data(settings.data, settings.seed, _task(settings))
    in_memory = fit_in_memory(everything, settings.recipe.recipe, here.devices)
    sample = dataclasses.replace(
        everything,
        training=_some(everything.training, _SAMPLE),
        held_out=_some(everything.held_out, _SAMPLE // 4),
    )
    program = memory_of_process()
    with torch_threads(settings.threads), lightning_quiet():
        net, preprocessing = _network(settings, everything, console)
        describe_start(settings, everything, preprocessing, console)
        began = time.perf_counter()
        if in_memory:
            sample = ready(
                sample, settings.recipe.recipe, Unreadable(console, _SAMPLE), console, here.devices
            )
        reading = time.perf_counter() - began
        parts = [len(images.training) + len(images.held_out) for images in (everything, sample)]
        factor = parts[0] / parts[1] if in_memory else 0.0
        with console.status("Measuring a few steps"):
            module = _module(settings, net, preprocessing, everything, here, console)
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


def _task(settings: Settings) -> str | None:
    """What the data must be for: as it is told, or as the head of the network says."""
    task = task_of(settings.network)
    return settings.task or (None if task == "classify" else task)


def _some(images: Images, count: int) -> Images:
    """That many of the images, spread evenly."""
    chosen = range(0, len(images), max(1, len(images) // count))
    return Images([images.sources[i] for i in chosen], [images.targets[i] for i in chosen])


def _pixel_bytes(images: LabelledImages) -> int:
    sources = (*images.training.sources, *images.held_out.sources)
    # Pillow keeps four bytes a pixel.
    return sum(4 * source.width * source.height for source in sources if isinstance(source, Image))


@dataclass(frozen=True)
class Beginning:
    """How a run starts: anew, in place of another, or where it was left."""

    resumes: bool = False
    overwrite: bool = False
    data_changed: bool = False


def _run(settings: Settings, console: Console, launcher: Launcher, beginning: Beginning) -> Result | None:
    settings = fitted(settings)
    settings.check()
    check_recipe(settings.recipe.recipe)
    here = launcher.place()
    if here is None and settings.devices * settings.nodes > 1:
        result: Result | None = launcher.start(
            _started,
            (settings, console.quiet, launcher, beginning),
            devices=settings.devices,
            nodes=settings.nodes,
        )
        return result
    here = here or Place()
    settings = dataclasses.replace(settings, devices=here.devices, nodes=here.nodes)
    if not here.is_first:
        return _trained(settings, here, Console(quiet=True), beginning)
    with locked(settings.output) if beginning.resumes else nullcontext():
        return _trained(settings, here, console, beginning)


def _started(settings: Settings, quiet: bool, launcher: Launcher, beginning: Beginning) -> Result | None:
    return _run(settings, Console(quiet=quiet), launcher, beginning)


def _trained(settings: Settings, here: Place, console: Console, beginning: Beginning) -> Result | None:
    recipe = settings.recipe.recipe
    images = open_data(settings.data, settings.seed, _task(settings))
    notes = list(images.notes)
    if beginning.resumes and (settings.output / SPLIT).is_file():
        images, changes = same_split(images, settings.output / SPLIT, changes_allowed=beginning.data_changed)
        notes += changes
    elif beginning.resumes:
        notes.append(
            f"'{settings.output / SPLIT}' is gone: that the images are those of the beginning is not checked."
        )
    with torch_threads(settings.threads), lightning_quiet():
        net, preprocessing = _network(settings, images, console)
        describe_start(settings, images, preprocessing, console)
        for note in notes:
            tell(console, note)
        unreadable = Unreadable(console, settings.unreadable)
        read = ready(images, recipe, unreadable, console, here.devices)
        module = _module(settings, net, preprocessing, read, here, console)
        _trainer(settings, module, [])  # what it refuses is said before anything is written
        if not here.is_first:
            _fit(settings, module, unreadable, console)
            return None
        with nullcontext() if beginning.resumes else locked(settings.output):
            _begin(settings, images, beginning)
            keeper = _fit(settings, module, unreadable, console)
            ended = finish_rounded if settings.rounds else finish
            return ended(settings, module, keeper, unreadable, console)


def _begin(settings: Settings, images: LabelledImages, beginning: Beginning) -> None:
    """Make the folder ready, and write what a run begins with."""
    remove_leftovers(settings.output)
    if not beginning.resumes:
        if beginning.overwrite:
            remove_run(settings.output)
        elif (settings.output / RUN).exists():
            raise InputError(f"Another run began in '{settings.output}' meanwhile; give another folder.")
    # The settings last: with them a folder holds a run.
    write_split(images, settings.output / SPLIT)
    if not (settings.output / SAMPLE).exists():
        draw_sample(images, settings.output / SAMPLE)
    write_text(settings.output / RUN, json.dumps(settings.to_dict(), indent=2))


def _network(
    settings: Settings, images: LabelledImages, console: Console
) -> tuple[nn.Module, dict[str, Any]]:
    """The network to train, with its branches, and how its images are prepared."""
    recipe = settings.recipe.recipe
    reseed(settings.seed)
    if settings.rounds:
        return rounded_start(settings, images, partial(console.print, markup=False))
    net = build_network(
        settings.network,
        len(images.class_names),
        recipe,
        settings.checkpoint,
        settings.model_args,
        partial(console.print, markup=False),
        pretrained=settings.pretrained,
    )
    preprocessing = preprocessing_for(net, recipe, settings.checkpoint)
    net = _unfolded(net, settings, preprocessing)
    check_size(net, preprocessing["input_size"], settings.network)
    return net, preprocessing


def _module(
    settings: Settings,
    net: nn.Module,
    preprocessing: dict[str, Any],
    images: LabelledImages,
    here: Place,
    console: Console,
) -> TrainingModule:
    recipe = settings.recipe.recipe
    if settings.channels_last:
        net = net.to(memory_format=torch.channels_last)
    task = task_for(images, recipe)
    task.check_network(net, settings.network)
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
        teaching=open_teaching(settings, net, images, preprocessing, task, console),
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
        if isinstance(net, RoundedNetwork):
            with written_aside(settings.output / settings.best) as aside:
                net.write(aside)
            return
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
    begun = readable_state(settings)
    with interruptible(settings):
        # Lightning has the option since 2.6; before, a state that holds code was refused when it was read here.
        safely: dict[str, Any] = (
            {"weights_only": True} if "weights_only" in signature(trainer.fit).parameters else {}
        )
        try:
            trainer.fit(module, ckpt_path=begun, **safely)
        except RuntimeError as error:
            if "loading state_dict" not in str(error):
                raise
            raise foreign_state(state) from error
        if trainer.is_global_zero:
            keeper.write_history()
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
        raise InputError(
            "Logs for TensorBoard need its package: pip install 'refold[tensorboard]'."
        ) from error
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
