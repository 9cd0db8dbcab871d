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
from rich.console import Console

from refold.cli.options import Given, takes_options_of
from refold.cli.shared import (
    AsJson,
    Checkpoint,
    ModelArguments,
    NumClasses,
    console,
    network_from,
)
from refold.errors import InputError, printable
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

Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the run that is in the folder already.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors and the result.")]


def console_of(quiet: bool) -> Console:
    """The console for what is said on the way, which ``quiet`` silences."""
    return Console(quiet=True) if quiet else console


@takes_options_of(QuickstartOptions)
def quickstart(given: Given, quiet: Quiet = False) -> None:
    """Train a multi-branch network, fold it, prove it, export it, and compare the forms in one table."""
    from refold.quickstart import render, render_files, run
    from refold.training.run import default_output

    folder = given.values["output"] or default_output("quickstart")
    with stopped_by_ctrl_c(folder):
        result = run(QuickstartOptions(**{**given.values, "output": folder}), console_of(quiet))
    console.print(render(result))
    console.print(render_files(result), soft_wrap=True)


@takes_options_of(Settings, without=("teacher", "teacher_checkpoint", "teacher_cache"))
def train_command(
    given: Given,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume", help="Go on with the run of this folder; options stated with it hold from now on."
        ),
    ] = None,
    data_changed: Annotated[
        bool, typer.Option("--data-changed", help="With --resume: the images are others now, and may be.")
    ] = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Train a network on images, fold it, prove it, save it and export it; --resume goes on after a stop."""
    if resume is None:
        if data_changed:
            raise InputError("--data-changed belongs to --resume; leave it out.")
        _train("train", given, overrides, dry_run, overwrite, quiet)
    elif dry_run or overwrite or given.stated & {"output", "recipe"}:
        raise InputError(
            "--resume goes on with a run in its folder and by its recipe; leave --dry-run, --overwrite, --output and "
            "--recipe out. Values of the recipe are changed by --set."
        )
    else:
        _resume(resume, given, overrides, data_changed, quiet)


@takes_options_of(Settings, required=("teacher",))
def distill_command(
    given: Given,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Train a network to answer as a teacher does, beside the classes; else the same as train."""
    _train("distill", given, overrides, dry_run, overwrite, quiet)


def _train(
    command: str, given: Given, overrides: list[str] | None, dry_run: bool, overwrite: bool, quiet: bool
) -> None:
    from refold.targets import weights_file
    from refold.training.data import fitting_recipe
    from refold.training.recipe import load_recipe, parse_overrides
    from refold.training.rendering import render_estimate, render_recipe, render_result
    from refold.training.run import default_output, expect, train

    told, shown = _plain(given.values), console_of(quiet)
    data, output = told.pop("data"), told.pop("output")
    from_weights = told["pretrained"] or told["checkpoint"] or weights_file(told["network"])
    name = told.pop("recipe") or fitting_recipe(data, from_weights=bool(from_weights))
    recipe = load_recipe(name, parse_overrides(overrides or []), told["network"])
    settings = Settings(Path(output or default_output(command)), data or "", recipe=recipe, **told)
    if dry_run:
        console.print(render_recipe(recipe))
        if data is not None:
            console.print(render_estimate(expect(settings, shown)))
        return
    if data is None:
        raise InputError("There is nothing to train on; give --data digits, or --data FOLDER.")
    with stopped_by_ctrl_c(settings.output):
        result = train(settings, shown, overwrite=overwrite)
    if result is not None:  # the first process of a run has it
        console.print(render_result(result, settings.output))


def _resume(folder: Path, given: Given, overrides: list[str] | None, data_changed: bool, quiet: bool) -> None:
    from refold.training.recipe import parse_overrides
    from refold.training.rendering import render_result
    from refold.training.run import resume

    shown = console_of(quiet)
    stated = {name: value for name, value in _plain(given.values).items() if name in given.stated}
    with stopped_by_ctrl_c(folder):
        result = resume(
            folder,
            shown,
            changes=stated,
            recipe_changes=parse_overrides(overrides or []),
            data_changed=data_changed,
        )
    if result is not None:
        console.print(render_result(result, folder))


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}


def check_data(
    data: Annotated[str, typer.Argument(metavar="DATA", help="What --data of train takes.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also draw a sample of each class (.png).")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="The seed that a run would have.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Show what a training would learn from: images a class, their sizes, what is left out and why."""
    from refold.files import check_writable
    from refold.training.data import open_data
    from refold.training.survey import draw_sample, render_survey, sizes_in_words, survey

    if output is not None:
        check_writable(output)
    images = open_data(data, seed)
    found = survey(images, Console(stderr=True))
    if output is not None:
        draw_sample(images, output)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
        return
    console.print(render_survey(found))
    for note in (sizes_in_words(found), *found.notes):
        console.print(printable(note), markup=False, highlight=False, soft_wrap=True)
    if output is not None:
        console.print(f"Sample: {printable(output)}", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def stopped_by_ctrl_c(folder: Path) -> Iterator[None]:
    """End with the exit code of an interrupt, and say what there is to go on with."""
    try:
        yield
    except KeyboardInterrupt:
        begun = (folder / "run.json").is_file()
        left = f"go on with: refold train --resume {folder}" if begun else "nothing was written"
        print(f"refold: stopped; {printable(left)}", file=sys.stderr)
        sys.exit(130)


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
