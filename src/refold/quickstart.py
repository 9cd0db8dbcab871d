"""The whole path in one run: train a multi-branch network, fold, prove and export it, compare the forms."""

from __future__ import annotations

import csv
import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import ImageOps
from PIL.Image import new as new_image
from rich.console import Console
from rich.table import Table

from refold.bench import measure_latency, torch_threads
from refold.bench.chart import training_and_comparison_chart
from refold.checkpoints import example_input, load, read_card
from refold.export import Contents, get_engine
from refold.files import write_text, written_aside
from refold.folding import Cost, count
from refold.training import run as training
from refold.training.data import fitting_recipe, open_data
from refold.training.finding import network_finder
from refold.training.images import LabelledImages
from refold.training.pictures import read_image
from refold.training.recipe import load_recipe
from refold.training.settings import HISTORY, ONNX, PLAIN, REPORT, TRAINING, QuickstartOptions, check_task
from refold.training.tasks import TASKS

ENGINE = "onnxruntime"


@dataclass(frozen=True)
class Plan:
    """What is trained for a task: a network, by a recipe with values of its own.

    By default as many epochs as show the network about ``images_shown`` images, within bounds. The sides are enough to
    show the way in minutes; `refold train` takes photos at their usual size. ``values_of_digits`` are for those alone.
    """

    network: str
    recipe: str
    side: int
    side_of_photos: int
    images_shown: int
    epochs: tuple[int, int]
    values: Mapping[str, Any] = field(default_factory=dict)
    values_of_digits: Mapping[str, Any] = field(default_factory=dict)


PLANS = {
    "classify": Plan("repghostnet_050", "small_images", 48, 96, 30_000, (3, 50)),
    # Few epochs: small batches, quick steps and little change of the images. Scenes of digits are drawn by chance as it
    # is, and boxes that an edge has cut would teach a digit's size wrong.
    "detect": Plan(
        "dense/repghostnet_050",
        "dense",
        96,
        192,
        28_800,
        (9, 60),
        {
            "batch_size": 16,
            "learning_rate": 0.005,
            "weight_decay": 0.01,
            "resize_range": (0.9, 1.1),
            "color_jitter": 0.0,
        },
        {"resize_range": (1.0, 1.0)},
    ),
    "instances": Plan("maskrcnn/repghostnet_050", "maskrcnn", 96, 192, 5_000, (10, 60)),
    "segment": Plan("lraspp/repghostnet_050", "segmentation", 96, 192, 10_000, (10, 60)),
}
"""What is trained for each task."""

TRAINING_FORM, PLAIN_FORM, IN_ENGINE = "training form", "plain", "plain in ONNX Runtime"


@dataclass(frozen=True)
class ComparedForm:
    """One form of the network: what it answers and what it costs for one image, latency in milliseconds.

    A file for images of any size tells no ``macs``.
    """

    score: float
    same_answers: int
    parameters: int
    macs: int | None
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
    score: str
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
    check_task(settings.task)
    # Once more when training begins: to know how many there are takes no time.
    images = open_data(data, settings.seed, settings.task)
    plan = PLANS[images.task]
    fewest, most = plan.epochs
    seen = min(most, max(fewest, round(plan.images_shown / len(images.training))))
    epochs = seen if settings.epochs is None else settings.epochs
    is_small = fitting_recipe(data, from_weights=False) == "small_images"
    side = settings.image_size or (plan.side if is_small else plan.side_of_photos)
    values = {**plan.values, **(plan.values_of_digits if settings.data is None else {})}
    recipe = load_recipe(plan.recipe, {**values, "epochs": epochs, "image_size": side})
    told = training.Settings(
        settings.output,
        data,
        plan.network,
        recipe,
        task=images.task,
        seed=settings.seed,
        threads=settings.threads,
        keep="last",
    )
    trained = training.train(told, console)
    assert trained is not None  # this process is the only one
    with torch_threads(settings.threads):
        return _compare(settings, trained, images, begin, console)


def _compare(
    settings: QuickstartOptions,
    trained: training.Result,
    images: LabelledImages,
    begin: float,
    console: Console,
) -> QuickstartResult:
    folder, network = settings.output, PLANS[images.task].network
    files = {
        "training form": folder / TRAINING,
        "plain form": folder / PLAIN,
        "ONNX": folder / ONNX,
        "fold report": folder / REPORT,
        "results": folder / "results.json",
        "chart": folder / "chart.png",
    }
    if images.keeps_size:
        files["found"] = folder / "found.png"
    net, plain = load(folder / TRAINING, form="training"), load(folder / PLAIN, form="plain")
    card = read_card(folder / TRAINING)
    assert card is not None
    with console.status("Comparing the three, in turn"):
        columns = _columns(net, plain, folder / ONNX, trained)
    result = QuickstartResult(
        data=images.title,
        network=network,
        class_names=card.class_names or [],
        training_images=card.provenance["data"]["training_images"],
        held_out_images=trained.held_out_images,
        score=trained.score,
        seed=settings.seed,
        seconds=time.perf_counter() - begin,
        history=_history(folder / HISTORY, f"held_out_{TASKS[images.task].score}"),
        columns=columns,
        proof=trained.proof,
        export_difference=trained.export_difference,
        files={name: str(path) for name, path in files.items()},
    )
    write_text(files["results"], json.dumps(dataclasses.asdict(result), indent=2))
    _draw(result, files["chart"])
    if images.keeps_size:
        with console.status("Drawing what was found"):
            _draw_found(plain, images, files["found"])
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
            score=answers[name][0],
            same_answers=answers[name][1],
            parameters=cost.parameters or 0,
            macs=cost.macs,
            operators=cost.operators,
            latency=latencies[name].median,
        )
        for name, cost in costs.items()
    }


def _history(path: Path, score: str) -> list[dict[str, float]]:
    with path.open(encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    return [{"loss": float(row["loss"]), "score": float(row[score])} for row in rows]


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

    row(f"held-out {result.score}", lambda c: f"{c.score:.2%}")
    row("same answers", lambda c: f"{c.same_answers:,} of {result.held_out_images:,}")
    row("parameters", lambda c: f"{c.parameters:,}")
    row("MACs", lambda c: "not known" if c.macs is None else f"{c.macs:,}")
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
        scores=[epoch["score"] for epoch in result.history],
        score_title=result.score,
        comparison={
            "parameters (M)": {name: column.parameters / 1e6 for name, column in columns},
            "MACs (M)": {name: column.macs and column.macs / 1e6 for name, column in columns},
            "operators": {name: column.operator_count for name, column in columns},
            "latency (ms)": {name: column.latency for name, column in columns},
        },
    )


def _draw_found(plain: Any, images: LabelledImages, path: Path) -> None:
    """Draw what the plain form finds in the first held-out images."""
    columns, side = 4, 320
    finder = network_finder(plain, PLAIN_FORM, 0.3)
    pictures = [read_image(source) for source in images.held_out.sources[: 3 * columns]]
    # Small ones are enlarged, so that names can be read.
    pictures = [ImageOps.contain(picture, (side, side)) for picture in pictures]
    sheet = new_image("RGB", (columns * side, -(-len(pictures) // columns) * side), (255, 255, 255))
    for number, picture in enumerate(pictures):
        drawn = finder.see(picture).drawn(picture)[".png"]
        sheet.paste(drawn, (number % columns * side, number // columns * side))
    with written_aside(path) as aside:
        sheet.save(aside, format="png")
