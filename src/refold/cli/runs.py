"""The commands that train and use what was trained: `quickstart`, `train`, `distill` and `predict`."""

# Heavy imports are inside the commands, so that --help and mistyped options answer at once.

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

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

if TYPE_CHECKING:
    pass


def quickstart(
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Your own images, one folder a class, instead of the digits."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The run's folder [default: runs/quickstart-TIME].")
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="[default: what fits the data]")] = None,
    image_size: Annotated[int, typer.Option("--image-size", help="Side of the images in pixels.")] = 48,
    threads: Annotated[
        int, typer.Option("--threads", help="PyTorch threads; a small network gains little from more.")
    ] = 1,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the weights, the split and the training.")] = 0,
) -> None:
    """Train a multi-branch network, fold it, prove it, export it, and compare the forms in one table."""
    from refold.quickstart import Settings, default_output, render, render_files, run

    folder = output or default_output()
    try:
        result = run(Settings(folder, data, epochs, image_size, seed, threads), console)
    except KeyboardInterrupt:
        kept = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        left = f"; {folder} holds {', '.join(kept)}" if kept else ""
        print(f"refold: stopped{left}.", file=sys.stderr)
        raise typer.Exit(130) from None
    console.print(render(result))
    console.print(render_files(result), soft_wrap=True)


DataOption = Annotated[
    str | None,
    typer.Option(
        "--data", help="digits, a folder with one folder of images a class, or CIFAR as distributed."
    ),
]
RunOutput = Annotated[
    Path | None, typer.Option("--output", "-o", help="The run's folder [default: runs/COMMAND-TIME].")
]
NetworkOption = Annotated[str, typer.Option("--network", help="The network to train, any model name.")]
RecipeOption = Annotated[str, typer.Option("--recipe", help="A recipe's name, or a YAML file.")]
RecipeSettings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A value of the recipe, such as epochs=30; repeatable."),
]
StartFrom = Annotated[Path | None, typer.Option("--checkpoint", help="Weights of the network to start from.")]
UnfoldPlan = Annotated[
    str | None, typer.Option("--unfold", metavar="PLAN", help="Train with the branches of this plan.")
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the weights, the split and the training.")]
Workers = Annotated[int, typer.Option("--workers", min=0, help="Processes that prepare images.")]
Threads = Annotated[int, typer.Option("--threads", min=1, help="PyTorch threads.")]
Accelerator = Annotated[str, typer.Option("--accelerator", help="auto, cpu, gpu or mps.")]
Precision = Annotated[str, typer.Option("--precision", help="32-true, bf16-mixed or 16-mixed.")]
Accumulate = Annotated[int, typer.Option("--accumulate", min=1, help="Batches that make one step.")]
UnreadableLimit = Annotated[
    int, typer.Option("--unreadable", min=0, help="Images that may be unreadable before it is an error.")
]
Keep = Annotated[
    Literal["best", "last"],
    typer.Option("--keep", help="The network to keep: the best on held-out images, or the last."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and stop.")]


def train_command(
    data: DataOption = None,
    network: NetworkOption = "repghostnet_050",
    recipe: RecipeOption = "finetune",
    settings: RecipeSettings = None,
    output: RunOutput = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", help="Go on with the run of this folder, as it was started.")
    ] = None,
    checkpoint: StartFrom = None,
    unfold: UnfoldPlan = None,
    seed: Seed = 0,
    workers: Workers = 0,
    threads: Threads = 1,
    accelerator: Accelerator = "auto",
    precision: Precision = "32-true",
    accumulate: Accumulate = 1,
    unreadable: UnreadableLimit = 10,
    keep: Keep = "best",
    dry_run: DryRun = False,
) -> None:
    """Train a network on images, fold it, prove it, save it and export it; --resume goes on after a stop."""
    _train("train", **locals())


def distill_command(
    teacher: Annotated[
        str,
        typer.Option("--teacher", help="A model name, whose published weights are taken, or a checkpoint."),
    ],
    data: DataOption = None,
    network: NetworkOption = "repghostnet_050",
    teacher_checkpoint: Annotated[
        Path | None, typer.Option("--teacher-checkpoint", help="Weights for the teacher's model name.")
    ] = None,
    recipe: RecipeOption = "finetune",
    settings: RecipeSettings = None,
    output: RunOutput = None,
    checkpoint: StartFrom = None,
    unfold: UnfoldPlan = None,
    seed: Seed = 0,
    workers: Workers = 0,
    threads: Threads = 1,
    accelerator: Accelerator = "auto",
    precision: Precision = "32-true",
    accumulate: Accumulate = 1,
    unreadable: UnreadableLimit = 10,
    keep: Keep = "best",
    dry_run: DryRun = False,
) -> None:
    """Train a network to answer as a teacher does, beside the classes; else the same as train."""
    _train("distill", resume=None, **locals())


def _train(
    command: str,
    *,
    data: str | None,
    recipe: str,
    settings: list[str] | None,
    output: Path | None,
    resume: Path | None,
    dry_run: bool,
    **others: Any,
) -> None:
    try:
        from refold.training.recipe import load_recipe, parse_overrides
        from refold.training.rendering import render_recipe, render_result
        from refold.training.run import Settings, default_output, train
        from refold.training.run import resume as go_on
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in {"lightning", "torchmetrics", "yaml"}:
            raise
        raise InputError(f"Training needs {missing}; install it: pip install 'refold[train]'.") from error

    resolved = load_recipe(recipe, parse_overrides(settings or []))
    if dry_run:
        console.print(render_recipe(resolved))
        return
    if resume is not None and (data or settings or output):
        raise InputError(
            "--resume goes on with a run as it was started; leave --data, --set and --output out."
        )
    if resume is None and data is None:
        raise InputError("There is nothing to train on; give --data digits, or --data FOLDER.")
    folder = resume or output or default_output(command)
    try:
        if resume is None:
            plain: dict[str, Any] = {
                key: str(value) if isinstance(value, Path) else value for key, value in others.items()
            }
            result = train(Settings(folder, data or "", recipe=resolved, **plain), console)
        else:
            result = go_on(resume, console)
    except KeyboardInterrupt:
        print(f"refold: stopped; go on with: refold train --resume {folder}", file=sys.stderr)
        raise typer.Exit(130) from None
    if result is not None:  # the first process of a run has it
        console.print(render_result(result, folder))


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
