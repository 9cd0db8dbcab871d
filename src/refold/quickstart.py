"""The whole path in one run: train a multi-branch network, fold, prove and export it, compare the forms."""

from __future__ import annotations

import csv
import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from refold.bench import measure_latency, torch_threads
from refold.bench.chart import training_and_comparison_chart
from refold.checkpoints import example_input, load, read_card
from refold.export import Contents, get_engine
from refold.files import write_text
from refold.folding import Cost, count
from refold.training import run as training
from refold.training.data import fitting_recipe, open_data
from refold.training.recipe import load_recipe
from refold.training.settings import HISTORY, ONNX, PLAIN, REPORT, TRAINING, QuickstartOptions

NETWORK = "repghostnet_050"
ENGINE = "onnxruntime"
RECIPE = "small_images"
# Enough to show the way in minutes; `refold train` takes photos at their usual size.
_SIDE, _SIDE_OF_PHOTOS = 48, 96

TRAINING_FORM, PLAIN_FORM, IN_ENGINE = "training form", "plain", "plain in ONNX Runtime"

# By default as many epochs as show the network about this many images.
_IMAGES_SHOWN = 30_000
_FEWEST_EPOCHS, _MOST_EPOCHS = 3, 50


@dataclass(frozen=True)
class ComparedForm:
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
class QuickstartResult:
    """What a run found, and the files that it wrote by what they hold."""

    data: str
    network: str
    class_names: list[str]
    training_images: int
    held_out_images: int
    seed: int
    seconds: float
    history: list[dict[str, float]]
    columns: dict[str, ComparedForm]
    proof: dict[str, Any]
    export_difference: float
    files: dict[str, str]


def run(settings: QuickstartOptions, console: Console) -> QuickstartResult:
    """Train, fold, prove, export and compare; everything that is written goes into ``settings.output``.

    Raises `InputError` where the images or a setting cannot be used, `NotEquivalent` where a form differs.
    """
    begin = time.perf_counter()
    data = "digits" if settings.data is None else str(settings.data)
    # Once more when training begins: to know how many there are takes no time.
    images = open_data(data, settings.seed)
    seen = round(_IMAGES_SHOWN / len(images.training))
    epochs = min(_MOST_EPOCHS, max(_FEWEST_EPOCHS, seen)) if settings.epochs is None else settings.epochs
    is_small = fitting_recipe(data, from_weights=False) == RECIPE
    side = settings.image_size or (_SIDE if is_small else _SIDE_OF_PHOTOS)
    recipe = load_recipe(RECIPE, {"epochs": epochs, "image_size": side})
    told = training.Settings(
        settings.output, data, NETWORK, recipe, seed=settings.seed, threads=settings.threads, keep="last"
    )
    trained = training.train(told, console)
    assert trained is not None  # this process is the only one
    with torch_threads(settings.threads):
        return _compare(settings, trained, images.title, begin, console)


def _compare(
    settings: QuickstartOptions, trained: training.Result, title: str, begin: float, console: Console
) -> QuickstartResult:
    folder = settings.output
    files = {
        "training form": folder / TRAINING,
        "plain form": folder / PLAIN,
        "ONNX": folder / ONNX,
        "fold report": folder / REPORT,
        "results": folder / "results.json",
        "chart": folder / "chart.png",
    }
    net, plain = load(folder / TRAINING, form="training"), load(folder / PLAIN, form="plain")
    card = read_card(folder / TRAINING)
    assert card is not None
    with console.status("Comparing the three, in turn"):
        columns = _columns(net, plain, folder / ONNX, trained)
    result = QuickstartResult(
        data=title,
        network=NETWORK,
        class_names=card.class_names or [],
        training_images=card.provenance["data"]["training_images"],
        held_out_images=trained.held_out_images,
        seed=settings.seed,
        seconds=time.perf_counter() - begin,
        history=_history(folder / HISTORY),
        columns=columns,
        proof=trained.proof,
        export_difference=trained.export_difference,
        files={name: str(path) for name, path in files.items()},
    )
    write_text(files["results"], json.dumps(dataclasses.asdict(result), indent=2))
    _draw(result, files["chart"])
    return result


def _columns(net: Any, plain: Any, onnx_file: Path, trained: training.Result) -> dict[str, ComparedForm]:
    example = example_input(net)
    engine = get_engine(ENGINE)
    session = engine.open(onnx_file, threads=1)
    forms: dict[str, Callable[[torch.Tensor], Any]] = {
        TRAINING_FORM: net.eval(),
        PLAIN_FORM: plain.eval(),
        IN_ENGINE: session,
    }
    latencies = measure_latency(
        {name: partial(form, example) for name, form in forms.items()}, rounds=50, threads=1
    )
    costs: dict[str, Cost | Contents] = {
        TRAINING_FORM: count(net, example),
        PLAIN_FORM: count(plain, example),
        IN_ENGINE: engine.contents(onnx_file),
    }
    answers = {
        TRAINING_FORM: (trained.training_score, trained.held_out_images),
        PLAIN_FORM: (trained.plain_score, trained.same_answers),
        IN_ENGINE: (trained.onnx_score, trained.onnx_same_answers),
    }
    return {
        name: ComparedForm(
            accuracy=answers[name][0],
            same_answers=answers[name][1],
            parameters=cost.parameters or 0,
            macs=cost.macs or 0,
            operators=cost.operators,
            latency=latencies[name].median,
        )
        for name, cost in costs.items()
    }


def _history(path: Path) -> list[dict[str, float]]:
    with path.open(encoding="utf-8") as lines:
        return [
            {"loss": float(row["loss"]), "accuracy": float(row["held_out_accuracy"])}
            for row in csv.DictReader(lines)
        ]


def render(result: QuickstartResult) -> Table:
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

    def row(title: str, show: Callable[[ComparedForm], Any]) -> None:
        table.add_row(title, *(str(show(column)) for column in columns.values()))

    row("held-out accuracy", lambda c: f"{c.accuracy:.2%}")
    row("top-1 agreement", lambda c: f"{c.same_answers:,} of {result.held_out_images:,}")
    row("parameters", lambda c: f"{c.parameters:,}")
    row("MACs", lambda c: f"{c.macs:,}")
    row("operators", lambda c: f"{c.operator_count:,}")
    row("convolutions", lambda c: c.operators.get("convolution", c.operators.get("Conv", 0)))
    row("batch norms", lambda c: c.operators.get("batch norm", c.operators.get("BatchNormalization", 0)))
    row("latency", lambda c: f"{c.latency:.2f} ms")
    return table


def render_files(result: QuickstartResult) -> Table:
    """Where the files are."""
    table = Table.grid(padding=(0, 2))
    for name, path in result.files.items():
        table.add_row(name, path)
    return table


def _draw(result: QuickstartResult, path: Path) -> None:
    columns = result.columns.items()
    training_and_comparison_chart(
        path,
        title=f"{result.network}, {result.data}",
        losses=[epoch["loss"] for epoch in result.history],
        accuracies=[epoch["accuracy"] for epoch in result.history],
        comparison={
            "parameters (M)": {name: column.parameters / 1e6 for name, column in columns},
            "MACs (M)": {name: column.macs / 1e6 for name, column in columns},
            "operators": {name: column.operator_count for name, column in columns},
            "latency (ms)": {name: column.latency for name, column in columns},
        },
    )
