"""Boxes in YOLO's text files: a line a box, its class and centre, width and height in parts of the image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from refold.errors import InputError, first_line
from refold.training.labelled.splits import Found, part_of
from refold.training.labelled.tidying import BoxesOfImage, Part, Tally
from refold.training.pictures import LeftOut, find_pictures

_PARTS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
# Beyond it, a value is no part of an image but a number of pixels.
_LARGEST_SHARE = 2.0


def find_yolo(root: Path) -> Path | None:
    """The YAML file that describes a set, the folder itself where it holds images and labels, or None."""
    if root.suffix in (".yaml", ".yml"):
        return root if _described(root) is not None else None
    if not root.is_dir():
        return None
    for file in sorted([*root.glob("*.yaml"), *root.glob("*.yml")]):
        if _described(file) is not None:
            return file
    labels = root / "labels"
    is_bare = (root / "images").is_dir() and labels.is_dir() and any(labels.rglob("*.txt"))
    return root if is_bare else None


def _described(path: Path) -> Mapping[str, Any] | None:
    """What a YAML file says of a set with boxes; None where it is about something else."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    if not isinstance(document, dict) or "train" not in document or "names" not in document:
        return None
    return document if isinstance(document["train"], (str, list)) else None


def read_yolo(place: Path, root: Path, *, outlines: bool = False) -> Found:
    """The images of the parts that a YAML file names, or of a folder's ``images``, with the labels beside them.

    The labels of ``images/a.jpg`` are in ``labels/a.txt``, or in ``a.txt`` beside it. Lines of more than five columns
    are outlines, whose boxes are taken, and with ``outlines`` they, too. An image without a file of labels has no
    boxes.
    Raises `InputError`, naming file and line, where a line is not understood.
    """
    tally, left_out = Tally(), LeftOut()
    if place.is_dir():
        names, folders = _bare_names(place), _bare_parts(place)
    else:
        document = _described(place)
        assert document is not None
        names, folders = _listed_names(place, document), _listed_parts(place, document)
    parts: dict[str, Part] = {}
    for part, places in folders.items():
        images = [image for folder in places for image in _images(folder, place, left_out)]
        parts[part] = _read(images, names, tally, outlines)
    numbers = [label for part in parts.values() for labels in part.targets for label in labels.labels]
    if not names:
        names.extend(str(number) for number in range(max(numbers, default=-1) + 1))
    pictures = {name: files for name, files in left_out.files.items() if "no pictures" not in name}
    return Found(names, parts, tally, LeftOut(pictures).notes())


def _listed_names(path: Path, document: Mapping[str, Any]) -> list[str]:
    given = document["names"]
    if isinstance(given, dict):
        if sorted(given) != list(range(len(given))):
            raise InputError(
                f"'{path}': the numbers of the names are {sorted(given, key=str)[:5]} ..., not 0 to {len(given) - 1}; "
                "number them without gaps."
            )
        given = [given[number] for number in range(len(given))]
    if not isinstance(given, list) or not given:
        raise InputError(f"'{path}': 'names' is {given!r:.50}; give a list of the classes.")
    return [str(name) for name in given]


def _listed_parts(path: Path, document: Mapping[str, Any]) -> dict[str, list[Path]]:
    base = path.parent / str(document.get("path") or "")
    base = base if base.is_dir() else path.parent
    folders: dict[str, list[Path]] = {}
    for key, part in _PARTS.items():
        given = document.get(key)
        for entry in [given] if isinstance(given, str) else given or []:
            # Some tools write a path from a folder of their own.
            tried = [base / entry, path.parent / entry, path.parent / entry.removeprefix("../")]
            found = next((candidate for candidate in tried if candidate.exists()), None)
            if found is None:
                if part == "test":
                    continue
                raise InputError(
                    f"'{path}' names '{entry}' to {'train' if part == 'train' else 'measure'} on, and it is not there; "
                    "correct the path."
                )
            folders.setdefault(part, []).append(found)
    return folders


def _bare_names(root: Path) -> list[str]:
    for name in ("classes.txt", "obj.names"):
        if (root / name).is_file():
            lines = (root / name).read_text(encoding="utf-8").splitlines()
            return [line.strip() for line in lines if line.strip()]
    return []


def _bare_parts(root: Path) -> dict[str, list[Path]]:
    folders: dict[str, list[Path]] = {}
    for folder in sorted(entry for entry in (root / "images").iterdir() if entry.is_dir()):
        part = part_of(folder, root)
        if part is not None:
            folders.setdefault(part, []).append(folder)
    return folders or {"train": [root / "images"]}


def _images(place: Path, listing: Path, left_out: LeftOut) -> list[Path]:
    """The images in a folder, or those that a text file lists."""
    if place.is_dir():
        return find_pictures(place, left_out)
    try:
        lines = place.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The list of images '{place}' cannot be read ({first_line(error)}).") from error
    return [place.parent / line.strip() for line in lines if line.strip()]


def labels_of(image: Path) -> Path:
    """The file of labels that belongs to an image."""
    parts = list(image.parts)
    places = [index for index, part in enumerate(parts[:-1]) if part == "images"]
    if places:
        parts[places[-1]] = "labels"
        beside = Path(*parts).with_suffix(".txt")
        if beside.is_file() or not image.with_suffix(".txt").is_file():
            return beside
    return image.with_suffix(".txt")


def _read(images: Sequence[Path], names: list[str], tally: Tally, outlines: bool) -> Part:
    part, used = Part(), set[Path]()
    for image in images:
        file = labels_of(image)
        used.add(file)
        boxes = BoxesOfImage((1.0, 1.0), tally, outlines=[] if outlines else None)
        if not image.is_file():
            tally.add("images are named and not there, left out", image.name)
            continue
        if file.is_file():
            _read_lines(file, names, boxes, tally)
        else:
            tally.add("images have no file of labels and are taken for background", image.name)
        part.add(image, boxes.done(are_shares=True))
    for folder in sorted({file.parent for file in used}):
        for file in sorted(folder.glob("*.txt")):
            if (
                file not in used
                and file.name not in ("classes.txt", "labels.txt")
                and folder.name != "images"
            ):
                tally.add("files of labels have no image, left out", file.name)
    return part


def _read_lines(file: Path, names: list[str], boxes: BoxesOfImage, tally: Tally) -> None:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The labels '{file}' cannot be read ({first_line(error)}).") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{file}, line {number}"
        columns = line.split()
        if len(columns) < 5 or (len(columns) > 5 and len(columns) % 2 == 0):
            raise InputError(
                f"{place}: it has {len(columns)} columns; expected the class and x, y, width and height of a box."
            )
        try:
            label, values = int(float(columns[0])), [float(value) for value in columns[1:]]
        except ValueError as error:
            raise InputError(f"{place}: {first_line(error)}; expected numbers.") from error
        if label < 0 or (names and label >= len(names)):
            raise InputError(f"{place}: there is no class {label}; the names are of 0 to {len(names) - 1}.")
        if any(value > _LARGEST_SHARE for value in values):
            raise InputError(
                f"{place}: {max(values):g} is no part of an image; write x, y, width and height in parts of its sides, "
                "from 0 to 1."
            )
        is_outline = len(columns) > 5
        boxes.add(_box(values), label, place, outline=[values] if is_outline else None)
        if is_outline and boxes.outlines is None:
            tally.add("outlines, whose boxes are taken", place)


def _box(values: Sequence[float]) -> tuple[float, float, float, float]:
    if len(values) == 4:
        x, y, width, height = values
        return x - width / 2, y - height / 2, x + width / 2, y + height / 2
    return min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])
