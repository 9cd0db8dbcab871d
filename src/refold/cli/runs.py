"""The commands that train and use what was trained: `quickstart`, `train`, `distill` and `predict`."""

# Heavy imports are inside the commands, so that --help and mistyped options answer at once.

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from refold.cli.options import takes_options_of
from refold.cli.shared import (
    AsJson,
    Checkpoint,
    ModelArguments,
    NumClasses,
    console,
    network_from,
)
from refold.errors import InputError
from refold.training.settings import QuickstartOptions, Settings

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A value of the recipe, such as epochs=30; repeatable."),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Print the resolved recipe, and with --data the time and memory it takes."
    ),
]


@takes_options_of(QuickstartOptions)
def quickstart(given: dict[str, Any]) -> None:
    """Train a multi-branch network, fold it, prove it, export it, and compare the forms in one table."""
    from refold.quickstart import render, render_files, run
    from refold.training.run import default_output

    folder = given["output"] or default_output("quickstart")
    with stopped_by_ctrl_c(folder):
        result = run(QuickstartOptions(**{**given, "output": folder}), console)
    console.print(render(result))
    console.print(render_files(result), soft_wrap=True)


@takes_options_of(Settings, without=("teacher", "teacher_checkpoint", "teacher_cache"))
def train_command(
    given: dict[str, Any],
    overrides: Overrides = None,
    dry_run: DryRun = False,
    resume: Annotated[
        Path | None, typer.Option("--resume", help="Go on with the run of this folder, as it was started.")
    ] = None,
) -> None:
    """Train a network on images, fold it, prove it, save it and export it; --resume goes on after a stop."""
    _train("train", given, overrides, dry_run, resume)


@takes_options_of(Settings, required=("teacher",))
def distill_command(given: dict[str, Any], overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Train a network to answer as a teacher does, beside the classes; else the same as train."""
    _train("distill", given, overrides, dry_run)


def _train(
    command: str,
    given: dict[str, Any],
    overrides: list[str] | None,
    dry_run: bool,
    resume: Path | None = None,
) -> None:
    from refold.training.recipe import load_recipe, parse_overrides
    from refold.training.rendering import render_estimate, render_recipe, render_result
    from refold.training.run import default_output, expect, train
    from refold.training.run import resume as go_on

    data, output = given.pop("data"), given.pop("output")
    recipe = load_recipe(given.pop("recipe"), parse_overrides(overrides or []))
    folder = resume or output or default_output(command)
    if resume is not None and (data or overrides or output):
        raise InputError(
            "--resume goes on with a run as it was started; leave --data, --set and --output out."
        )
    plain: dict[str, Any] = {key: str(v) if isinstance(v, Path) else v for key, v in given.items()}
    settings = Settings(folder, data or "", recipe=recipe, **plain)
    if dry_run:
        console.print(render_recipe(recipe))
        if data is not None:
            console.print(render_estimate(expect(settings, console)))
        return
    if resume is None and data is None:
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
    model_args: ModelArguments = None,
    as_json: AsJson = False,
) -> None:
    """Name the likeliest classes of images; a model name without --checkpoint takes its published weights."""
    from refold.training.predicting import find_images, network_classifier, onnx_classifier

    files = find_images(images)
    path = Path(target)
    if path.suffix == ".onnx":
        classifier = onnx_classifier(path)
    else:
        net = network_from(target, checkpoint, num_classes, model_args, form="plain", pretrained=None)
        classifier = network_classifier(net)
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
