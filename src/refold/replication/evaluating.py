"""Released weights of a table's networks, asked about ImageNet's photos: accuracies here beside the printed ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo

from refold.bench.papers.grids import Grid
from refold.bench.papers.published import Exhibit, PaperRow, find_exhibit
from refold.errors import CheckpointError, InputError
from refold.files import PathLike
from refold.models import create_model
from refold.replication.sheet import Sheet
from refold.training.pictures import LeftOut, find_images
from refold.training.predicting import ImagePredictor, network_classifier

FORMAT = "refold released weights 1"
_CLASSES = 1000
_TOP = {"top-1": 1, "top-5": 5}


@dataclass(frozen=True)
class Evaluation:
    """What the released weights of one network gave: shares in percent by quantity ("top-1", "top-5").

    ``weights`` is where they come from, ``images`` how many photos they were asked about; without, ``reason`` says why.
    """

    weights: str = ""
    images: int = 0
    accuracies: dict[str, float] = dataclasses.field(default_factory=dict)
    reason: str = ""


def evaluate(
    name: str,
    folder: PathLike,
    *,
    only: Sequence[str] = (),
    say: Callable[[str], None] = lambda _: None,
) -> Sheet:
    """What the released weights of a table's networks answer, as of "repghost/table-4", beside what is printed.

    ``folder`` holds ImageNet's photos, one folder a class: all thousand, or some, named by their WordNet numbers
    (n01440764). Each network prepares them as its weights were trained. A row has weights where they are published for
    its network as it is; the others say why they have none.
    Raises `InputError` for an unknown name, a table without accuracies, and a folder that holds no classes of ImageNet.
    """
    exhibit = find_exhibit(name)
    columns = exhibit.columns_of("top-1", "top-5")
    if not columns:
        raise InputError(
            f"{exhibit.name} prints no accuracy of classifiers; refold paper list shows which do."
        )
    exhibit = exhibit.only(tuple(only)) if only else exhibit
    photos = imagenet_photos(folder)
    known: dict[tuple[str | None, int | None], Evaluation] = {}
    found: dict[str, Evaluation] = {}
    for row in exhibit.rows:
        reason = _without_weights(row)
        if reason:
            found[row.model] = Evaluation(reason=reason)
            continue
        key = (row.network, row.pixels)
        if key not in known:
            say(f"{row.network}: {len(photos):,} photos")
            known[key] = _evaluation(row, photos)
        found[row.model] = known[key]
    return _sheet(exhibit, found)


def imagenet_photos(folder: PathLike) -> list[tuple[Path, int]]:
    """The photos of a folder with their classes among ImageNet's; raises `InputError` where it holds others."""
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"There is no folder '{root}'; give one with ImageNet's photos, one folder a class.")
    inside = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    places = {name: place for place, name in enumerate(ImageNetInfo().label_names())}
    if len(inside) == _CLASSES and not any(entry.name in places for entry in inside):
        places = {entry.name: place for place, entry in enumerate(inside)}
    if stranger := next((entry.name for entry in inside if entry.name not in places), None):
        raise InputError(
            f"'{root / stranger}' is no class of ImageNet; name its folders by WordNet numbers, such as n01440764, "
            "or give all thousand in their order."
        )
    if not inside:
        raise InputError(f"'{root}' holds no folders of classes; give ImageNet's photos, one folder a class.")
    return [
        (path, places[entry.name]) for entry in inside for path in sorted(find_images([entry], LeftOut()))
    ]


def _without_weights(row: PaperRow) -> str:
    if row.network is None:
        return "cannot be built here"
    if row.arguments or row.unfold or row.recipe is not None or row.linear:
        return "no weights of this variant are published"
    return ""


def _evaluation(row: PaperRow, photos: Sequence[tuple[Path, int]]) -> Evaluation:
    assert row.network is not None
    try:
        network: Any = create_model(row.network, pretrained=True)
    except CheckpointError as error:
        return Evaluation(reason=str(error))
    cfg = getattr(network, "pretrained_cfg", None) or {}
    asked = network_classifier(network, row.network)
    if row.pixels is not None:
        preprocessing = asked.preprocessing.model_copy(update={"input_size": (3, row.pixels, row.pixels)})
        asked = dataclasses.replace(asked, preprocessing=preprocessing)
    right = _right(asked, photos)
    shares = {quantity: 100 * count / len(photos) for quantity, count in right.items()}
    return Evaluation(cfg.get("hf_hub_id") or cfg.get("url") or "torchvision", len(photos), shares)


def _right(asked: ImagePredictor, photos: Sequence[tuple[Path, int]]) -> dict[str, int]:
    """How many photos have their class first, and among the first five; one that cannot be read has neither."""
    numbered = dataclasses.replace(asked, class_names=[str(place) for place in range(_CLASSES)])
    right = dict.fromkeys(_TOP, 0)
    answers = numbered.predict([path for path, _ in photos], max(_TOP.values()))
    for (_, label), answer in zip(photos, answers, strict=True):
        named = [name for name, _ in answer.classes]
        for quantity, count in _TOP.items():
            right[quantity] += str(label) in named[:count]
    return right


def _sheet(exhibit: Exhibit, found: dict[str, Evaluation]) -> Sheet:
    columns = exhibit.columns_of("top-1", "top-5")
    headings = ["row", "network", "weights"]
    for _, column in columns:
        headings += [f"{column.quantity} %: paper", "here", "Δ"]
    rows, content = [], []
    for row in exhibit.rows:
        evaluation = found[row.model]
        cells = [row.model, row.subject if row.network else "", evaluation.weights]
        for place, column in columns:
            printed, here = row.values[place], evaluation.accuracies.get(column.quantity)
            cells += [printed, "" if here is None else f"{here:.2f}"]
            cells.append(f"{here - float(printed):+.2f}" if printed and here is not None else "")
        rows.append(cells)
        printed_values = {column.quantity: row.values[place] for place, column in columns}
        content.append(
            {"model": row.model, "network": row.network, "published": printed_values, **asdict(evaluation)}
        )
    asked = max(evaluation.images for evaluation in found.values())
    lines = [
        f"{asked:,} photos; each network prepares them as its weights ask, which the papers' may not have been"
    ]
    lines += [f"{model}: {each.reason}" for model, each in found.items() if each.reason]
    told = {"format": FORMAT, "name": exhibit.name, "rows": content}
    return Sheet(exhibit, Grid("", headings, rows, 3), lines, told)
