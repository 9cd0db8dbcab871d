"""The commands that train and use what was trained: `quickstart`, `train`, `distill` and `predict`."""

# Heavy imports are inside the commands, so that --help and mistyped options answer at once.

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from refold.cli.shared import (
    CHECKPOINT_SUFFIXES,
    AsJson,
    Checkpoint,
    NumClasses,
    console,
    network_from,
)
from refold.errors import InputError

Seed = Annotated[int, typer.Option("--seed", help="Seed of the weights, the split and the training.")]
Threads = Annotated[
    int, typer.Option("--threads", min=1, help="PyTorch threads; a small network gains little from more.")
]


def quickstart(
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Your own images, one folder a class, instead of the digits."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The run's folder.", show_default="runs/quickstart-TIME"),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option("--epochs", help="Passes over the images.", show_default="what fits the data"),
    ] = None,
    image_size: Annotated[int, typer.Option("--image-size", help="Side of the images in pixels.")] = 48,
    threads: Threads = 1,
    seed: Seed = 0,
) -> None:
    """Train a multi-branch network, fold it, prove it, export it, and compare the forms in one table."""
    from refold.quickstart import QuickstartOptions, render, render_files, run
    from refold.training.run import default_output

    folder = output or default_output("quickstart")
    with stopped_by_ctrl_c(folder):
        result = run(QuickstartOptions(folder, data, epochs, image_size, seed, threads), console)
    console.print(render(result))
    console.print(render_files(result), soft_wrap=True)


@dataclass(frozen=True)
class TrainingOptions:
    """What `train` and `distill` are told alike, each option once; names and defaults are those of `Settings`."""

    data: Annotated[
        str | None,
        typer.Option(
            help="digits, a folder with one folder of images a class, CIFAR as distributed, wds/FOLDER or hfds/NAME."
        ),
    ] = None
    network: Annotated[str, typer.Option(help="The network to train, any model name.")] = "repghostnet_050"
    recipe: Annotated[str, typer.Option(help="A recipe's name, or a YAML file.")] = "finetune"
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="A value of the recipe, such as epochs=30; repeatable."
        ),
    ] = None
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The run's folder.", show_default="runs/COMMAND-TIME"),
    ] = None
    checkpoint: Annotated[Path | None, typer.Option(help="Weights of the network to start from.")] = None
    unfold: Annotated[
        str | None, typer.Option(metavar="PLAN", help="Train with the branches of this plan.")
    ] = None
    seed: Seed = 0
    workers: Annotated[int, typer.Option(min=0, help="Processes that prepare images, a device.")] = 0
    threads: Threads = 1
    accelerator: Annotated[str, typer.Option(help="auto, cpu, gpu or mps.")] = "auto"
    devices: Annotated[int, typer.Option(min=1, help="Devices of this machine that train together.")] = 1
    nodes: Annotated[
        int,
        typer.Option(
            min=1, help="Machines that train together, each given MASTER_ADDR, MASTER_PORT and NODE_RANK."
        ),
    ] = 1
    strategy: Annotated[
        Literal["auto", "ddp", "ddp_find_unused_parameters_true"],
        typer.Option(help="How devices train together, by Lightning's name."),
    ] = "auto"
    sync_batch_norm: Annotated[
        bool, typer.Option("--sync-batch-norm", help="Take batch statistics over all devices.")
    ] = False
    precision: Annotated[str, typer.Option(help="32-true, bf16-mixed or 16-mixed.")] = "32-true"
    channels_last: Annotated[bool, typer.Option(help="Keep channels last in memory.")] = True
    compile: Annotated[bool, typer.Option("--compile", help="Run the network through torch.compile.")] = False
    accumulate: Annotated[int, typer.Option(min=1, help="Batches that make one step.")] = 1
    unreadable: Annotated[
        int, typer.Option(min=0, help="Images that may be unreadable before it is an error.")
    ] = 10
    keep: Annotated[
        Literal["best", "last"],
        typer.Option(help="The network to keep: the best on held-out images, or the last."),
    ] = "best"
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Log each epoch for TensorBoard, too.")
    ] = False
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the resolved recipe, and with --data the time and memory it takes."
        ),
    ] = False


def _with_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command with the `TrainingOptions` after its own options; it gets them as one argument."""
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "options"]
    hints = get_type_hints(TrainingOptions, include_extras=True)
    shared = [
        inspect.Parameter(
            entry.name, inspect.Parameter.KEYWORD_ONLY, default=entry.default, annotation=hints[entry.name]
        )
        for entry in fields(TrainingOptions)
    ]

    @wraps(command)
    def parsed(**given: Any) -> None:
        options = TrainingOptions(**{entry.name: given.pop(entry.name) for entry in fields(TrainingOptions)})
        command(options=options, **given)

    own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    parsed.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]  # what Typer reads
    parsed.__annotations__ = {p.name: p.annotation for p in (*own, *shared)}
    return parsed


@_with_options
def train_command(
    options: TrainingOptions,
    resume: Annotated[
        Path | None, typer.Option("--resume", help="Go on with the run of this folder, as it was started.")
    ] = None,
) -> None:
    """Train a network on images, fold it, prove it, save it and export it; --resume goes on after a stop."""
    _train("train", options, resume)


@_with_options
def distill_command(
    options: TrainingOptions,
    teacher: Annotated[
        str,
        typer.Option("--teacher", help="A model name, whose published weights are taken, or a checkpoint."),
    ],
    teacher_checkpoint: Annotated[
        Path | None, typer.Option("--teacher-checkpoint", help="Weights for the teacher's model name.")
    ] = None,
    teacher_cache: Annotated[
        Path | None,
        typer.Option(
            "--teacher-cache", help="Keep the teacher's answers here; for images without augmentation."
        ),
    ] = None,
) -> None:
    """Train a network to answer as a teacher does, beside the classes; else the same as train."""
    _train(
        "distill",
        options,
        teacher=teacher,
        teacher_checkpoint=teacher_checkpoint,
        teacher_cache=teacher_cache,
    )


def _train(command: str, options: TrainingOptions, resume: Path | None = None, **teacher: Any) -> None:
    from refold.training.recipe import load_recipe, parse_overrides
    from refold.training.rendering import render_estimate, render_recipe, render_result
    from refold.training.run import Settings, default_output, expect, train
    from refold.training.run import resume as go_on

    own = {"data", "recipe", "settings", "output", "dry_run"}
    given = {entry.name: getattr(options, entry.name) for entry in fields(options) if entry.name not in own}
    recipe = load_recipe(options.recipe, parse_overrides(options.settings or []))
    folder = resume or options.output or default_output(command)
    if resume is not None and (options.data or options.settings or options.output):
        raise InputError(
            "--resume goes on with a run as it was started; leave --data, --set and --output out."
        )
    plain: dict[str, Any] = {
        key: str(v) if isinstance(v, Path) else v for key, v in {**given, **teacher}.items()
    }
    settings = Settings(folder, options.data or "", recipe=recipe, **plain)
    if options.dry_run:
        console.print(render_recipe(recipe))
        if options.data is not None:
            console.print(render_estimate(expect(settings, console)))
        return
    if resume is None and options.data is None:
        raise InputError("There is nothing to train on; give --data digits, or --data FOLDER.")
    with stopped_by_ctrl_c(folder):
        result = train(settings, console) if resume is None else go_on(resume, console)
    if result is not None:  # the first process of a run has it
        console.print(render_result(result, folder))


@contextmanager
def stopped_by_ctrl_c(folder: Path) -> Iterator[None]:
    """End with the exit code of an interrupt, and say what there is to go on with."""
    try:
        yield
    except KeyboardInterrupt:
        begun = (folder / "run.json").is_file()
        left = f"go on with: refold train --resume {folder}" if begun else "nothing was written"
        print(f"refold: stopped; {left}", file=sys.stderr)
        raise typer.Exit(130) from None


def predict(
    target: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT|ONNX|NAME",
            help="A file of refold.save, an ONNX file of a training run, or a model name.",
        ),
    ],
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", help="Image files, and folders of them.")
    ],
    top: Annotated[int, typer.Option("--top", min=1, help="How many classes.")] = 5,
    checkpoint: Checkpoint = None,
    num_classes: NumClasses = None,
    as_json: AsJson = False,
) -> None:
    """Name the likeliest classes of images; a model name without --checkpoint takes its published weights."""
    from refold.models import create_model
    from refold.training.predicting import find_images, network_classifier, onnx_classifier

    files = find_images(images)
    path = Path(target)
    if path.suffix == ".onnx":
        classifier = onnx_classifier(path)
    elif checkpoint is None and path.suffix not in CHECKPOINT_SUFFIXES:
        classifier = network_classifier(create_model(target, pretrained=True, num_classes=num_classes))
    else:
        classifier = network_classifier(network_from(target, checkpoint, num_classes))
    predictions = classifier.predict(files, top)
    if as_json:
        print(json.dumps([prediction.to_dict() for prediction in predictions], indent=2))
        return
    for prediction in predictions:
        if prediction.error is not None:
            print(f"refold: {prediction.error}", file=sys.stderr)
            continue
        shown = ", ".join(f"{name} {probability:.1%}" for name, probability in prediction.classes)
        print(f"{prediction.image}: {shown}")
