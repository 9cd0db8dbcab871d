"""The commands that train and use what was trained: `quickstart`, `train`, `distill` and `predict`."""

# Heavy imports are inside the commands, so that --help and mistyped options answer at once.

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from refold.cli.options import takes_options_of
from refold.cli.shared import (
    CHECKPOINT_SUFFIXES,
    AsJson,
    Checkpoint,
    NumClasses,
    console,
    network_from,
)
from refold.errors import InputError, printable
from refold.training.settings import PLAIN, TRAINING, QuickstartOptions, Settings

if TYPE_CHECKING:
    from refold.training.predicting import ImagePredictor, Prediction

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
            metavar="RUN|FILE|NAME",
            help="A run's folder, a file of refold.save, an exported file of any engine, or a model name.",
        ),
    ],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Image files, and folders of them.")],
    top: Annotated[int, typer.Option("--top", min=1, help="How many classes.")] = 5,
    checkpoint: Checkpoint = None,
    num_classes: NumClasses = None,
    as_json: AsJson = False,
    as_csv: Annotated[
        bool, typer.Option("--csv", help="Print CSV: image, rank, class, probability.")
    ] = False,
) -> None:
    """Name the likeliest classes of images; a model name without --checkpoint takes its published weights.

    The exit code is 2 if an image has no prediction.
    """
    from refold.training.predicting import find_images

    if as_json and as_csv:
        raise InputError("--json and --csv are two ways to print the same; choose one.")
    files = find_images(images)
    predictor = _predictor(target, checkpoint, num_classes)
    write = _print_json if as_json else _print_csv if as_csv else _print_lines
    failed = write(predictor.predict(files, top))
    for note in predictor.notes:
        print(f"refold: {printable(note)}", file=sys.stderr)
    if failed:
        raise InputError(f"{failed} of {len(files)} images have no prediction.")


def _predictor(target: str, checkpoint: Path | None, num_classes: int | None) -> ImagePredictor:
    from refold.export.engines import engine_of
    from refold.models import create_model
    from refold.training.exported import exported_classifier
    from refold.training.predicting import network_classifier

    path = Path(target)
    is_exported = engine_of(path) is not None
    if (is_exported or path.is_dir()) and not (checkpoint is None and num_classes is None):
        raise InputError(
            f"'{target}' has its weights and classes; leave --checkpoint and --num-classes out, or name a model."
        )
    if is_exported:
        return exported_classifier(path)
    if path.is_dir():
        path = _network_of_run(path)
    elif checkpoint is None and not path.is_file() and path.suffix not in CHECKPOINT_SUFFIXES:
        return network_classifier(create_model(target, pretrained=True, num_classes=num_classes), target)
    return network_classifier(network_from(str(path), checkpoint, num_classes), str(path))


def _network_of_run(folder: Path) -> Path:
    """The plain network of a finished run, or of one that is not the best so far, which is said."""
    plain, training = folder / PLAIN, folder / TRAINING
    if plain.is_file():
        return plain
    if not training.is_file():
        raise InputError(
            f"The folder '{folder}' holds neither {PLAIN} nor {TRAINING} of a run; give the folder of "
            "refold train, or a file."
        )
    print(
        f"refold: the run '{printable(folder)}' is not finished; its best network so far predicts.",
        file=sys.stderr,
    )
    return training


def _print_json(predictions: Iterator[Prediction]) -> int:
    """Print all, and return how many images have none."""
    found = list(predictions)
    print(json.dumps([prediction.to_dict() for prediction in found], indent=2))
    return sum(prediction.error is not None for prediction in found)


def _print_csv(predictions: Iterator[Prediction]) -> int:
    """Print one line a class, and return how many images have none."""
    failed = 0
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(("image", "rank", "class", "probability"))
    for prediction in predictions:
        failed += _print_error(prediction)
        for rank, (name, probability) in enumerate(prediction.classes, start=1):
            table.writerow((printable(prediction.image), rank, printable(name), f"{probability:.6g}"))
    return failed


def _print_lines(predictions: Iterator[Prediction]) -> int:
    """Print one line an image, and return how many have none."""
    failed = 0
    for prediction in predictions:
        failed += _print_error(prediction)
        if prediction.error is None:
            shown = ", ".join(f"{name} {probability:.1%}" for name, probability in prediction.classes)
            print(printable(f"{prediction.image}: {shown}"))
    return failed


def _print_error(prediction: Prediction) -> bool:
    if prediction.error is not None:
        print(f"refold: {printable(prediction.error)}", file=sys.stderr)
    return prediction.error is not None
