"""Boxes in COCO's JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from refold.errors import InputError, first_line
from refold.training.labelled.splits import Found, part_of
from refold.training.labelled.tidying import BoxesOfImage, Part, Tally
from refold.training.labels import Outline
from refold.training.pictures import is_file

_OTHER_TASKS = ("caption", "keypoint", "panoptic", "stuff", "image_info")


def find_coco(root: Path) -> list[Path]:
    """The files of annotations in a folder, or the one that is named; empty where there is none."""
    if root.is_file():
        return [root] if root.suffix == ".json" and _is_coco(root) else []
    places = [root, *(p for p in sorted(root.iterdir()) if p.is_dir())] if root.is_dir() else []
    found = [file for place in places for file in sorted(place.glob("*.json"))]
    found = [file for file in found if not any(word in file.stem.lower() for word in _OTHER_TASKS)]
    return [file for file in found if _is_coco(file)]


def _is_coco(path: Path) -> bool:
    """Whether a file of JSON names images and annotations, by a look at it."""
    try:
        with path.open("rb") as file:
            head = file.read(1 << 16)
            file.seek(max(0, path.stat().st_size - (1 << 16)))
            ends = head + file.read()
    except OSError:
        return False
    small = path.stat().st_size <= 1 << 16
    words = (b'"images"', b'"annotations"', b'"categories"')
    return head.lstrip()[:1] == b"{" and (all if small else any)(word in ends for word in words)


def read_coco(files: Sequence[Path], root: Path, *, outlines: bool = False) -> Found:
    """The images that the files name, each file a part of the set.

    Category ids may have gaps and begin anywhere: classes are in the order of the first file's ids, and another file's
    are found by name. With ``outlines`` those of the objects are read, too.
    Raises `InputError` where a file is not understood.
    """
    tally, parts, names = Tally(), dict[str, Part](), list[str]()
    documents = {file: _document(file) for file in files}
    for file, document in documents.items():
        names += [name for name in _names(file, document).values() if name not in names]
    for file, document in documents.items():
        part = part_of(file, root) or "train"
        parts.setdefault(part, Part())
        _read(file, document, root, names, parts[part], tally, outlines)
    return Found(names, parts, tally)


def _document(path: Path) -> Mapping[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        for key in ("images", "annotations", "categories"):
            if not isinstance(document[key], list):
                raise ValueError(f"'{key}' is no list")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"'{path}' is no whole file of COCO's annotations ({type(error).__name__}: {first_line(error)}); it needs "
            "the lists images, annotations and categories."
        ) from error
    return document  # type: ignore[no-any-return]  # of JSON


def _names(path: Path, document: Mapping[str, Any]) -> dict[Any, str]:
    """The names of categories by their id, in the order of these."""
    try:
        named = {entry["id"]: str(entry["name"]) for entry in document["categories"]}
        ordered = dict(sorted(named.items()))
    except (KeyError, TypeError) as error:
        raise InputError(f"'{path}': a category has no {error}; each needs id and name.") from error
    if len(set(ordered.values())) < len(ordered):
        double = next(name for name in ordered.values() if list(ordered.values()).count(name) > 1)
        raise InputError(f"'{path}' has two categories named '{double}'; give each a name of its own.")
    return ordered


def _read(
    path: Path,
    document: Mapping[str, Any],
    root: Path,
    names: list[str],
    part: Part,
    tally: Tally,
    outlines: bool,
) -> None:
    own_names, images = _names(path, document), dict[Any, tuple[Path, BoxesOfImage, tuple[int, int] | None]]()
    seen: set[Path] = set()
    folders = _folders(path, root)
    for entry in document["images"]:
        try:
            identity, name = entry["id"], str(entry["file_name"])
            size = (int(entry["width"]), int(entry["height"])) if entry.get("width") else None
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"'{path}': an image lacks {error}; each needs id and file_name.") from error
        image = _image(name, folders, root)
        if image is None:
            tally.add("images are named and not there, left out", name)
        elif image in seen or identity in images:
            tally.add("images are named twice, the second left out", name)
        else:
            seen.add(image)
            images[identity] = (image, BoxesOfImage(size, tally, outlines=[] if outlines else None), size)
    known = {entry["id"] for entry in document["images"]}
    for number, entry in enumerate(document["annotations"]):
        _add(path, number, entry, images, known, own_names, names, tally)
    if not images:
        raise InputError(
            f"None of the {len(document['images']):,} images that '{path}' names are there; put them beside it, into "
            f"'{root / 'images'}', or into a folder named like its part."
        )
    for image, boxes, size in images.values():
        part.add(image, boxes.done(size))


def _add(
    path: Path,
    number: int,
    entry: Mapping[str, Any],
    images: Mapping[Any, tuple[Path, BoxesOfImage, Any]],
    known: set[Any],
    own_names: Mapping[Any, str],
    names: list[str],
    tally: Tally,
) -> None:
    place = f"{path.name}, annotation {entry.get('id', number)}"
    try:
        identity, category = entry["image_id"], entry["category_id"]
        x, y, width, height = map(float, entry["bbox"])
    except KeyError as error:
        if error.args == ("bbox",):
            tally.add("annotations without a box, left out", place)
            return
        raise InputError(f"{place}: it lacks {error}; correct '{path}'.") from error
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{place}: the box is {entry.get('bbox')!r:.60}, not x, y, width and height; correct '{path}'."
        ) from error
    if category not in own_names:
        raise InputError(f"{place}: there is no category {category!r}; correct '{path}'.")
    if identity in images:
        label = names.index(own_names[category])
        box = (x, y, x + width, y + height)
        collected = images[identity][1]
        outline = None if collected.outlines is None else _outline(path, place, entry.get("segmentation"))
        collected.add(box, label, place, crowd=bool(entry.get("iscrowd", 0)), outline=outline)
    elif identity not in known:
        tally.add("annotations of images that are not named, left out", place)


def _outline(path: Path, place: str, given: Any) -> Outline | None:
    """The polygons or run lengths of an object, None where there are none."""
    if not given:
        return None
    if isinstance(given, dict):
        size, counts = given.get("size"), given.get("counts")
        if isinstance(size, list) and len(size) == 2 and isinstance(counts, (str, list)):
            return given
        raise InputError(f"{place}: the run lengths have no size and counts; correct '{path}'.")
    polygons = [part for part in given if isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0]
    numbers = [value for part in polygons for value in part]
    if len(polygons) < len(given) or not all(
        isinstance(v, (int, float)) and math.isfinite(v) for v in numbers
    ):
        raise InputError(
            f"{place}: the segmentation is {given!r:.60}, not polygons of x and y of three corners at least; correct "
            f"'{path}'."
        )
    return polygons


def _folders(path: Path, root: Path) -> list[Path]:
    """Where the images of a file of annotations may lie."""
    home = root if root.is_dir() else path.parent
    stem = path.stem.lower().removeprefix("instances_")
    part = part_of(path, root)
    named = [name for name in (stem, part) if name]
    bases = [path.parent, home, path.parent.parent]
    return [
        base / inner for base in bases for inner in ("", "images", *named, *(f"images/{n}" for n in named))
    ]


def _image(name: str, folders: Sequence[Path], root: Path) -> Path | None:
    """The file of an image; none that a name with ``..`` or an absolute one points to."""
    relative = Path(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise InputError(f"The image '{name}' lies outside of the data; give paths within '{root}'.")
    return next((folder / relative for folder in folders if is_file(folder / relative)), None)
