"""The whole path in one run: train a multi-branch network, fold, prove and export it, compare the forms."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

from refold.bench import measure_latency, torch_threads
from refold.bench.chart import training_and_comparison_chart
from refold.checkpoints import example_input, load, save
from refold.errors import InputError
from refold.export import Contents, export, get_engine
from refold.files import make_folder, write_text
from refold.folding import Cost, count, fold
from refold.models import create_model
from refold.training.data import (
    LabelledImages,
    TransformedImages,
    bundled_digits,
    class_folders,
    read_into_memory,
    transforms,
)
from refold.training.loop import Epoch, Recipe, batches_per_epoch, predict, train

NETWORK = "repghostnet_050"
ENGINE = "onnxruntime"

TRAINING_FORM, PLAIN, IN_ENGINE = "training form", "plain", "plain in ONNX Runtime"

# By default as many epochs as show the network about this many images.
_IMAGES_SHOWN = 30_000
_FEWEST_EPOCHS, _MOST_EPOCHS = 3, 50
_LARGEST_MEMORY = 2 * 1024**3


@dataclass(frozen=True)
class Settings:
    """What a run may be told.

    ``data`` None means the bundled digits, ``epochs`` None a number that fits the data.
    """

    output: Path
    data: Path | None = None
    epochs: int | None = None
    image_size: int = 48
    seed: int = 0
    threads: int = 1


@dataclass(frozen=True)
class Column:
    """One form of the network: what it answers and what it costs for one image, latency in milliseconds."""

    accuracy: float
    same_answers: int
    parameters: int
    macs: int
    operators: dict[str, int]
    latency: float

    @property
    def operator_count(self) -> int:
        """All operators that run."""
        return sum(self.operators.values())


@dataclass(frozen=True)
class Result:
    """What a run found, and the files that it wrote by what they hold."""

    data: str
    network: str
    class_names: list[str]
    training_images: int
    held_out_images: int
    seed: int
    seconds: float
    history: list[Epoch]
    columns: dict[str, Column]
    proof: dict[str, Any]
    export_difference: float
    files: dict[str, str]


def default_output() -> Path:
    """A new folder under ``runs``, named by the time."""
    return Path("runs") / time.strftime("quickstart-%Y%m%d-%H%M%S")


def run(settings: Settings, console: Console) -> Result:
    """Train, fold, prove, export and compare; everything that is written goes into ``settings.output``.

    Raises `InputError` where the images or a setting cannot be used, `NotEquivalent` where a form differs.
    """
    with torch_threads(settings.threads):
        return _run(settings, console)


def _run(settings: Settings, console: Console) -> Result:
    start = time.perf_counter()
    if settings.image_size < 8:
        raise InputError(f"The image size is {settings.image_size}; give at least 8 pixels.")
    if settings.epochs is not None and settings.epochs < 1:
        raise InputError(f"The number of epochs is {settings.epochs}; give at least 1.")
    images = (
        bundled_digits(settings.seed)
        if settings.data is None
        else class_folders(settings.data, settings.seed)
    )
    images = _in_memory(images, settings.image_size, console)
    with _run_folder(settings.output) as folder:
        files = {
            "training form": folder / "training.safetensors",
            "plain form": folder / "plain.safetensors",
            "ONNX": folder / "plain.onnx",
            "fold report": folder / "fold.json",
            "results": folder / "results.json",
            "chart": folder / "chart.png",
        }
        _, transform, _ = transforms(settings.image_size, images.mirror)
        held_out = TransformedImages(images.held_out, transform)
        history = _train(images, settings, files["training form"], console)

        # What is folded is what was saved; class names and provenance go along into the plain file.
        net = load(files["training form"], form="training")
        example = example_input(net)
        with console.status("Folding, and proving the fold"):
            plain: Any = fold(net, example)
        console.print(plain.fold_report)
        save(plain, files["plain form"])
        write_text(files["fold report"], plain.fold_report.to_json())
        with console.status("Exporting to ONNX, and running the file against PyTorch"):
            exported = export(plain, files["ONNX"], example, engine=ENGINE)
        with console.status("Comparing the three, image by image and in turn"):
            columns = _compare(net, plain, files["ONNX"], held_out, example)

        result = Result(
            data=images.title,
            network=NETWORK,
            class_names=images.class_names,
            training_images=len(images.training),
            held_out_images=len(images.held_out),
            seed=settings.seed,
            seconds=time.perf_counter() - start,
            history=history,
            columns=columns,
            proof=plain.fold_report.proof.to_dict(),
            export_difference=exported.max_difference,
            files={name: str(path) for name, path in files.items()},
        )
        write_text(files["results"], json.dumps(dataclasses.asdict(result), indent=2))
        _draw(result, files["chart"])
    return result


def _in_memory(images: LabelledImages, image_size: int, console: Console) -> LabelledImages:
    total = len(images.training) + len(images.held_out)
    if total * 4 * image_size**2 > _LARGEST_MEMORY:
        raise InputError(
            f"'{images.title}' holds {total:,} images, more than the quickstart keeps in memory at "
            f"{image_size} pixels; give a smaller folder or a smaller image size."
        )
    with _progress(console) as progress:
        task = progress.add_task("Reading images", total=total, note="")
        parts = [
            read_into_memory(part, image_size, lambda: progress.advance(task))
            for part in (images.training, images.held_out)
        ]
    return dataclasses.replace(images, training=parts[0], held_out=parts[1])


def _train(images: LabelledImages, settings: Settings, path: Path, console: Console) -> list[Epoch]:
    """Train; the checkpoint is renewed after every epoch, so an interrupted run leaves the last good one."""
    augment, measure, preprocessing = transforms(settings.image_size, images.mirror)
    seen = round(_IMAGES_SHOWN / len(images.training))
    epochs = settings.epochs or min(_MOST_EPOCHS, max(_FEWEST_EPOCHS, seen))
    recipe = Recipe(epochs)
    torch.manual_seed(settings.seed)
    net = create_model(NETWORK, num_classes=len(images.class_names), drop_rate=0.0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with _progress(console) as progress:
        batches = epochs * batches_per_epoch(len(images.training), recipe.batch_size)
        task = progress.add_task(f"Training {NETWORK}", total=batches, note="")

        def keep(epoch: Epoch) -> None:
            note = f"epoch {epoch.number} of {epochs}, held out {epoch.accuracy:.1%}"
            progress.update(task, note=note)
            save(
                net,
                path,
                class_names=images.class_names,
                preprocessing=preprocessing,
                provenance={
                    "data": images.title,
                    "seed": settings.seed,
                    "recipe": dataclasses.asdict(recipe),
                    "epoch": dataclasses.asdict(epoch),
                },
            )

        return train(
            net.to(device),
            TransformedImages(images.training, augment),
            TransformedImages(images.held_out, measure),
            recipe,
            seed=settings.seed,
            on_batch=lambda: progress.advance(task),
            on_epoch=keep,
        )


def _compare(
    net: nn.Module, plain: nn.Module, onnx_file: Path, held_out: TransformedImages, example: Tensor
) -> dict[str, Column]:
    engine = get_engine(ENGINE)
    session = engine.open(onnx_file, threads=1)

    def run_file(batch: Tensor) -> Tensor:
        return session(batch)[0]

    forms: dict[str, Callable[[Tensor], Tensor]] = {TRAINING_FORM: net, PLAIN: plain, IN_ENGINE: run_file}
    calls = {name: partial(form, example) for name, form in forms.items()}
    answers = {name: predict(form, held_out) for name, form in forms.items()}
    reference, truth = answers[TRAINING_FORM]
    latencies = measure_latency(calls, rounds=50, threads=1)
    costs: dict[str, Cost | Contents] = {
        TRAINING_FORM: count(net, example),
        PLAIN: count(plain, example),
        IN_ENGINE: engine.contents(onnx_file),
    }
    return {
        name: Column(
            accuracy=(answers[name][0] == truth).double().mean().item(),
            same_answers=int((answers[name][0] == reference).sum()),
            parameters=cost.parameters or 0,
            macs=cost.macs or 0,
            operators=cost.operators,
            latency=latencies[name].median,
        )
        for name, cost in costs.items()
    }


def render(result: Result) -> Table:
    """The one table at the end: the three forms side by side."""
    columns = result.columns
    table = Table(
        title=f"{result.network}, {result.data}",
        caption=f"trained on {result.training_images:,} images, {result.held_out_images:,} held out; "
        f"cost of one image, one thread; {result.seconds:.0f} s in all",
    )
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")

    def row(title: str, show: Callable[[Column], Any]) -> None:
        table.add_row(title, *(str(show(column)) for column in columns.values()))

    row("held-out accuracy", lambda c: f"{c.accuracy:.2%}")
    row("same answers", lambda c: f"{c.same_answers:,} of {result.held_out_images:,}")
    row("parameters", lambda c: f"{c.parameters:,}")
    row("MACs", lambda c: f"{c.macs:,}")
    row("operators", lambda c: f"{c.operator_count:,}")
    row("convolutions", lambda c: c.operators.get("convolution", c.operators.get("Conv", 0)))
    row("batch norms", lambda c: c.operators.get("batch norm", c.operators.get("BatchNormalization", 0)))
    row("latency", lambda c: f"{c.latency:.2f} ms")
    return table


def render_files(result: Result) -> Table:
    """Where the files are."""
    table = Table.grid(padding=(0, 2))
    for name, path in result.files.items():
        table.add_row(name, path)
    return table


def _draw(result: Result, path: Path) -> None:
    columns = result.columns.items()
    training_and_comparison_chart(
        path,
        title=f"{result.network}, {result.data}",
        losses=[epoch.loss for epoch in result.history],
        accuracies=[epoch.accuracy for epoch in result.history],
        comparison={
            "parameters (M)": {name: column.parameters / 1e6 for name, column in columns},
            "MACs (M)": {name: column.macs / 1e6 for name, column in columns},
            "operators": {name: column.operator_count for name, column in columns},
            "latency (ms)": {name: column.latency for name, column in columns},
        },
    )


@contextmanager
def _run_folder(path: Path) -> Iterator[Path]:
    """Make the run's folder; if the run ends before anything was written there, a new folder goes again."""
    existed = path.exists()
    folder = make_folder(path)
    try:
        yield folder
    finally:
        if not existed and not any(folder.iterdir()):
            folder.rmdir()


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )
