"""Folders of images and masks: a picture of class numbers for each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from refold.errors import InputError, some
from refold.training.folders import TEST, TRAINING, VALIDATION, bare_name
from refold.training.images import Images, LabelledImages, hold_out_labelled
from refold.training.labelled import voc
from refold.training.labels import IGNORED, MaskFile
from refold.training.pictures import LeftOut, find_pictures, size_of

_IMAGES = ("images", "image", "imgs", "img", "jpegimages", "leftimg8bit")
_MASKS = ("masks", "mask", "labels", "annotations", "segmentationclass", "gtfine", "segmentation")
# Classes of these names are none.
_NO_CLASS = ("unlabeled", "unlabelled", "void", "ignore", "ignored", "unknown", "255")
_MOST_LOOKED_AT = 2000
_VOC_NAMES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


@dataclass
class Folders:
    """Where the images and masks of each part lie, and the names of the classes by their number if they are told."""

    parts: dict[str, tuple[Path, Path]]
    names: dict[int, str] | None = None
    listed: dict[str, list[str]] = field(default_factory=dict)


def find_masks(root: Path) -> Folders | None:
    """The parts of a set of masks: described by a YAML file, in VOC's layout, or in folders of images and masks."""
    if root.suffix in (".yaml", ".yml"):
        return _described(root)
    if not root.is_dir():
        return None
    for file in sorted([*root.glob("*.yaml"), *root.glob("*.yml")]):
        found = _described(file)
        if found is not None:
            return found
    if (root / "SegmentationClass").is_dir() and (root / voc.IMAGES).is_dir():
        listed = voc.parts_listed(root, "Segmentation")
        place = (root / voc.IMAGES, root / "SegmentationClass")
        return Folders(dict.fromkeys(listed or ("train",), place), dict(enumerate(_VOC_NAMES)), listed)
    return _in_folders(root)


def _described(path: Path) -> Folders | None:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    if not isinstance(document, dict) or not isinstance(document.get("train"), dict):
        return None
    parts = {}
    for key, part in (("train", "train"), ("val", "val"), ("validation", "val"), ("test", "test")):
        given = document.get(key)
        if isinstance(given, dict) and {"images", "masks"} <= given.keys():
            parts[part] = (path.parent / str(given["images"]), path.parent / str(given["masks"]))
    names: Any = document.get("classes") or document.get("names")
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not parts or not isinstance(names, (dict, type(None))):
        return None
    return Folders(parts, None if names is None else {int(k): str(v) for k, v in names.items()})


def _in_folders(root: Path) -> Folders | None:
    names = _names_beside(root)
    images, masks = _child(root, _IMAGES), _child(root, _MASKS)
    if images is not None and masks is not None and _holds_pictures(masks):
        inside = _parts_in(images)
        parts = {part: (folder, masks / folder.name) for part, folder in inside.items()}
        parts = {part: pair for part, pair in parts.items() if pair[1].is_dir()}
        return Folders(parts or {"train": (images, masks)}, names)
    parts = {}
    for part, folder in _parts_in(root).items():
        images, masks = _child(folder, _IMAGES), _child(folder, _MASKS)
        if images is not None and masks is not None and _holds_pictures(masks):
            parts[part] = (images, masks)
    return Folders(parts, names) if parts else None


def _child(root: Path, names: Sequence[str]) -> Path | None:
    return next(
        (entry for entry in sorted(root.iterdir()) if entry.is_dir() and entry.name.lower() in names), None
    )


def _holds_pictures(folder: Path) -> bool:
    return any(folder.rglob("*.png"))


def _parts_in(root: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for folder in sorted(entry for entry in root.iterdir() if entry.is_dir()):
        for part, words in (("train", TRAINING), ("val", VALIDATION), ("test", TEST)):
            if bare_name(folder.name) in words:
                found.setdefault(part, folder)
    return found


def _names_beside(root: Path) -> dict[int, str] | None:
    file = root / "classes.txt"
    if not file.is_file():
        return None
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    return dict(enumerate(line for line in lines if line))


def read_masks(folders: Folders, root: Path, seed: int) -> LabelledImages:
    """The set: trained on "train", measured on "val" or else "test", or on a fifth of all that is drawn by the seed.

    Values of the masks that belong to no class, and classes named "unlabeled" or "void", count nowhere.
    Raises `InputError` where a mask has another size than its image, or there is nothing to train on.
    """
    if "train" not in folders.parts:
        raise InputError(f"'{root}' holds no images and masks to train on.")
    notes: list[str] = []
    pairs = {part: _pairs(part, *place, folders, notes) for part, place in folders.parts.items()}
    held_out = next((part for part in ("val", "test") if pairs.get(part)), None)
    used = [pair for part in ("train", held_out) if part for pair in pairs[part]]
    if not pairs["train"]:
        raise InputError(
            f"No image of '{folders.parts['train'][0]}' has a mask in '{folders.parts['train'][1]}'."
        )
    names, classes = _classes(folders.names, used, notes)
    sources, targets = ({p: [_of(pair, i, classes) for pair in pairs[p]] for p in pairs} for i in (0, 1))
    title, base = str(root), root if root.is_dir() else root.parent
    if held_out is None:
        return hold_out_labelled(
            title, names, sources["train"], targets["train"], seed, task="segment", notes=notes, root=base
        )
    return LabelledImages(
        title,
        names,
        Images(sources["train"], targets["train"]),
        Images(sources[held_out], targets[held_out]),
        mirror=True,
        notes=tuple(notes),
        task="segment",
    )


def _of(pair: tuple[Path, Path], which: int, classes: Mapping[int, int]) -> Any:
    return pair[0] if which == 0 else MaskFile(pair[1], classes)


def _pairs(
    part: str, images: Path, masks: Path, folders: Folders, notes: list[str]
) -> list[tuple[Path, Path]]:
    """Images and their masks of a part, found by their names."""
    for folder in (images, masks):
        if not folder.is_dir():
            raise InputError(f"There is no folder '{folder}' with the images or masks of the part '{part}'.")
    left_out = LeftOut()
    by_stem = {path.relative_to(masks).with_suffix(""): path for path in find_pictures(masks, left_out)}
    found, without = [], []
    listed = folders.listed.get(part)
    for image in find_pictures(images, left_out):
        stem = image.relative_to(images).with_suffix("")
        if listed is not None and stem.name not in listed:
            continue
        mask = by_stem.pop(stem, None)
        if mask is None:
            without.append(image.name)
            continue
        _check_size(image, mask)
        found.append((image, mask))
    if without:
        notes.append(f"Left out: {len(without):,} images of '{part}' without a mask ({some(without)}).")
    if by_stem and listed is None:
        stems = [path.name for path in by_stem.values()]
        notes.append(f"Left out: {len(stems):,} masks of '{part}' without an image ({some(stems)}).")
    return found


def _check_size(image: Path, mask: Path) -> None:
    sizes = size_of(image), size_of(mask)
    # An image that is turned as its EXIF says has its sides exchanged; the whole check comes when it is read.
    if None not in sizes and sorted(sizes[0] or ()) != sorted(sizes[1] or ()):
        own, theirs = (" x ".join(map(str, size or ())) for size in sizes)
        raise InputError(
            f"The mask '{mask}' has {theirs} pixels and its image '{image}' {own}; make the mask anew, at the size of "
            "the image."
        )


def _classes(
    given: Mapping[int, str] | None, pairs: Sequence[tuple[Path, Path]], notes: list[str]
) -> tuple[list[str], dict[int, int]]:
    """The names of the classes, and the place of each value among them."""
    looked_at = pairs[:: max(1, -(-len(pairs) // _MOST_LOOKED_AT))]
    values: Counter[int] = Counter()
    for _, mask in looked_at:
        values.update(_values_in(mask))
    if len(looked_at) < len(pairs):
        notes.append(f"The values of {len(looked_at):,} of {len(pairs):,} masks were looked at.")
    if given is None:
        found = sorted(value for value in values if value != IGNORED)
        notes.append(
            f"The masks' {len(found):,} values are taken for the classes; name them in a classes.txt."
        )
        given = {value: str(value) for value in found}
    none = [value for value, name in given.items() if name.lower() in _NO_CLASS]
    names = {value: name for value, name in sorted(given.items()) if value not in none}
    if len(names) > IGNORED:
        raise InputError(f"The masks have {len(names):,} classes; at most {IGNORED} are possible.")
    if none:
        notes.append(f"Not learnt and not counted: the class {some([given[value] for value in none])}.")
    strangers = {value: count for value, count in values.items() if value not in given and value != IGNORED}
    if strangers:
        shown = some([str(value) for value in sorted(strangers)])
        notes.append(
            f"Not learnt and not counted: values of no class ({shown}), one of them in {max(strangers.values()):,} "
            "masks."
        )
    return list(names.values()), {value: place for place, value in enumerate(names)}


def _values_in(mask: Path) -> set[int]:
    return set(MaskFile(mask, {}).found())
