"""Boxes in Pascal VOC's XML."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from refold.errors import InputError, first_line
from refold.training.labelled.splits import Found
from refold.training.labelled.tidying import BoxesOfImage, Part, Tally
from refold.training.pictures import SUFFIXES

IMAGES, BOXES, LISTS = "JPEGImages", "Annotations", "ImageSets"
# A list is taken whole where a part has none of its own.
_LISTS = {"train": ("train", "trainval"), "val": ("val",), "test": ("test",)}


def find_voc(root: Path) -> bool:
    """Whether a folder holds images with boxes in Pascal VOC's layout."""
    return (root / BOXES).is_dir() and (root / IMAGES).is_dir() and any((root / BOXES).glob("*.xml"))


def read_voc(root: Path) -> Found:
    """The images of the parts that the lists in ``ImageSets/Main`` name, or of all XML files where there are none.

    Boxes count pixels from 1, as VOC's do. Objects that are "difficult" are not learnt and not counted as missed.
    Raises `InputError`, naming the file, where one is not understood.
    """
    tally, labels = Tally(), dict[str, int]()
    parts: dict[str, Part] = {}
    for part, stems in parts_listed(root, "Main").items():
        parts[part] = _read(root, stems, labels, tally)
    if not parts:
        parts["train"] = _read(
            root, sorted(file.stem for file in (root / BOXES).glob("*.xml")), labels, tally
        )
    return Found(list(labels), parts, tally)


def parts_listed(root: Path, kind: str) -> dict[str, list[str]]:
    """The names of the images of each part, by the lists in ``ImageSets/KIND``."""
    found: dict[str, list[str]] = {}
    for part, names in _LISTS.items():
        file = next((f for f in (root / LISTS / kind / f"{n}.txt" for n in names) if f.is_file()), None)
        if file is not None:
            found[part] = [line.split()[0] for line in file.read_text().splitlines() if line.split()]
    return found


def image_of(root: Path, stem: str) -> Path | None:
    """The image of a name."""
    candidates = (root / IMAGES / f"{stem}{suffix}" for suffix in SUFFIXES)
    return next((path for path in candidates if path.is_file()), None)


def _read(root: Path, stems: Sequence[str], labels: dict[str, int], tally: Tally) -> Part:
    part = Part()
    for stem in stems:
        file, image = root / BOXES / f"{stem}.xml", image_of(root, stem)
        if image is None:
            tally.add("images are named and not there, left out", stem)
        elif not file.is_file():
            tally.add("images have no file of labels, left out", stem)
        else:
            _add(file, image, part, labels, tally)
    return part


def _add(file: Path, image: Path, part: Part, labels: dict[str, int], tally: Tally) -> None:
    try:
        tree = ElementTree.parse(file).getroot()
        width, height = (int(tree.findtext(f"size/{side}") or 0) for side in ("width", "height"))
    except (ElementTree.ParseError, OSError, ValueError) as error:
        raise InputError(f"The labels '{file}' are no XML of Pascal VOC ({first_line(error)}).") from error
    size = (width, height) if width and height else None
    boxes = BoxesOfImage(size, tally)
    for number, entry in enumerate(tree.iter("object"), start=1):
        place, name = f"{file.name}, object {number}", (entry.findtext("name") or "").strip()
        try:
            corners = [
                float(entry.findtext(f"bndbox/{side}") or "") for side in ("xmin", "ymin", "xmax", "ymax")
            ]
        except ValueError as error:
            raise InputError(
                f"{place}: its box has no xmin, ymin, xmax and ymax; correct '{file}'."
            ) from error
        if not name:
            raise InputError(f"{place}: it has no name; correct '{file}'.")
        box = (corners[0] - 1, corners[1] - 1, corners[2], corners[3])
        difficult = (entry.findtext("difficult") or "0").strip() == "1"
        boxes.add(box, labels.setdefault(name, len(labels)), place, crowd=difficult)
    part.add(image, boxes.done(size))
