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
from rich.console import Console

from refold.cli.options import Given, takes_options_of
from refold.cli.shared import (
    AsJson,
    Checkpoint,
    ModelArguments,
    NumClasses,
    console,
    error_console,
    network_from,
    say,
)
from refold.errors import InputError, printable
from refold.training.settings import INT8, PLAIN, TRAINING, QuickstartOptions, Settings

if TYPE_CHECKING:
    from refold.training.finding import Finder, Seen
    from refold.training.predicting import ImagePredictor

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

# What a network of no name is made of, for a task that needs a head.
_HEADS = {"detect": "dense/", "instances": "maskrcnn/", "segment": "lraspp/"}

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
    if "network" not in given.stated and told["task"] in _HEADS:
        told["network"] = _HEADS[told["task"]] + told["network"]
    data, output = told.pop("data"), told.pop("output")
    from_weights = told["pretrained"] or told["checkpoint"] or weights_file(told["network"])
    name = told.pop("recipe") or fitting_recipe(
        data, from_weights=bool(from_weights), network=told["network"]
    )
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
    task: Annotated[
        str | None,
        typer.Option("--task", help="classify, detect, instances or segment, where the data leave it open."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a training would learn from: images a class, their sizes, what is left out and why."""
    from refold.files import check_writable
    from refold.training.data import open_data
    from refold.training.progress import tell
    from refold.training.settings import check_task
    from refold.training.survey import draw_sample, render_survey, sizes_in_words, survey

    if output is not None:
        check_writable(output)
    check_task(task)
    images = open_data(data, seed, task)
    found = survey(images, error_console)
    if output is not None:
        draw_sample(images, output)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
        return
    console.print(render_survey(found))
    for note in (sizes_in_words(found), *found.notes):
        tell(console, note)
    if output is not None:
        tell(console, f"Sample: {output}")


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
            metavar="RUN|FILE|NAME",
            help="A run's folder, a file of refold.save, an exported file of any engine, or a model name.",
        ),
    ],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Image files, and folders of them.")],
    top: Annotated[int, typer.Option("--top", min=1, help="How many classes of a classifier.")] = 5,
    threshold: Annotated[
        float, typer.Option("--threshold", min=0, max=1, help="The least score of a detector's box.")
    ] = 0.3,
    draw: Annotated[
        Path | None, typer.Option("--draw", help="Draw the answers on copies of the images in this folder.")
    ] = None,
    checkpoint: Checkpoint = None,
    num_classes: NumClasses = None,
    model_args: ModelArguments = None,
    as_json: AsJson = False,
    as_csv: Annotated[
        bool, typer.Option("--csv", help="Print CSV: a line a class, or a box with its corners.")
    ] = False,
) -> None:
    """Say what is in images: classes, boxes or masks; a model name without --checkpoint takes its published weights.

    The exit code is 2 if an image has no prediction.
    """
    from refold.training.finding import Finder
    from refold.training.pictures import LeftOut, find_images

    if as_json and as_csv:
        raise InputError("--json and --csv are two ways to print the same; choose one.")
    left_out = LeftOut()
    files = find_images(images, left_out)
    for note in left_out.notes():
        say(note)
    predictor = _predictor(target, checkpoint, num_classes, model_args, threshold)
    seen: Iterator[Seen]
    seen = predictor.predict(files) if isinstance(predictor, Finder) else predictor.predict(files, top)
    if draw is not None:
        seen = _drawing(seen, draw)
    write = _print_json if as_json else _print_csv if as_csv else _print_lines
    failed = write(seen)
    for note in predictor.notes:
        say(note)
    if failed:
        raise InputError(f"{failed} of {len(files)} images have no prediction.")


def _predictor(
    target: str,
    checkpoint: Path | None,
    num_classes: int | None,
    model_args: list[str] | None,
    threshold: float,
) -> ImagePredictor | Finder:
    from refold.export.engines import engine_of
    from refold.training.exported import exported_predictor
    from refold.training.finding import network_finder
    from refold.training.predicting import network_classifier

    path = Path(target)
    if (path / INT8).is_file():
        path = path / INT8
    is_exported = engine_of(path) is not None
    if (is_exported or path.is_dir()) and not (checkpoint is None and num_classes is None):
        raise InputError(
            f"'{target}' has its weights and classes; leave --checkpoint and --num-classes out, or name a model."
        )
    if is_exported:
        return exported_predictor(path, threshold)
    if path.is_dir():
        target = str(_network_of_run(path))
    net = network_from(target, checkpoint, num_classes, model_args, form="plain", pretrained=None)
    if getattr(net, "output_kind", None) is not None:
        return network_finder(net, target, threshold)
    return network_classifier(net, target)


def _drawing(seen: Iterator[Seen], folder: Path) -> Iterator[Seen]:
    """Draw what is seen in each image on a copy of it, on the way through."""
    from refold.files import make_folder, written_aside
    from refold.training.pictures import read_image

    make_folder(folder)
    used: set[str] = set()
    for each in seen:
        if each.error is None:
            stem, number = Path(each.image).stem, 1
            while stem in used:  # images of the same name in two folders
                number += 1
                stem = f"{Path(each.image).stem}-{number}"
            used.add(stem)
            for suffix, picture in each.drawn(read_image(Path(each.image))).items():
                with written_aside(folder / f"{stem}{suffix}") as aside:
                    picture.save(aside, format="png")
        yield each


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


def _print_json(predictions: Iterator[Seen]) -> int:
    """Print all, and return how many images have none."""
    found = list(predictions)
    print(json.dumps([prediction.to_dict() for prediction in found], indent=2))
    return sum(prediction.error is not None for prediction in found)


def _print_csv(predictions: Iterator[Seen]) -> int:
    """Print one line a class or box, and return how many images have none."""
    failed = 0
    table = csv.writer(sys.stdout, lineterminator="\n")
    for number, prediction in enumerate(predictions):
        if number == 0:
            table.writerow(prediction.columns)
        failed += _print_error(prediction)
        table.writerows([printable(cell) for cell in row] for row in prediction.rows())
    return failed


def _print_lines(predictions: Iterator[Seen]) -> int:
    """Print one line an image, and return how many have none."""
    failed = 0
    for prediction in predictions:
        failed += _print_error(prediction)
        if prediction.error is None:
            print(printable(prediction.line()))
    return failed


def _print_error(prediction: Seen) -> bool:
    if prediction.error is not None:
        print(f"refold: {printable(prediction.error)}", file=sys.stderr)
    return prediction.error is not None
