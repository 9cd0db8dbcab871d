"""Which images a run trains on and which it measures on, kept in its folder so that going on finds the same."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from refold.errors import InputError
from refold.files import write_text
from refold.training.contents import digest_of
from refold.training.images import LABELLED, Images, LabelledImages
from refold.training.pictures import Source

_TRAINING, _HELD_OUT = "training", "held-out"
_COLUMNS = ("part", "class", "image", "digest")
_NAMED = 3


@dataclass(frozen=True)
class _Entry:
    part: str
    class_name: str
    digest: str


def write_split(images: LabelledImages, path: Path) -> None:
    """Write a line for each image: its part, its class, its name within the data and a digest of what it holds."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows((e.part, e.class_name, name, e.digest) for name, e in _entries(images).items())
    # Names of files may hold what is no text.
    write_text(path, text.getvalue().encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"))


def same_split(
    images: LabelledImages, path: Path, *, changes_allowed: bool
) -> tuple[LabelledImages, list[str]]:
    """The images in the parts that `write_split` wrote down, and what changed since then.

    Where changes are allowed, an image that was held out stays so, and a new one is trained on unless the data are
    split on disk.
    Raises `InputError` where the classes are others, where images changed and that is not allowed, and where the file
    is not understood.
    """
    before, now = _read(path), _entries(images)
    classes = sorted({entry.class_name for entry in before.values()})
    strangers = sorted(
        {*classes} ^ {images.label_of(t) for t in (*images.training.targets, *images.held_out.targets)}
    )
    strangers = [name for name in strangers if not name.startswith(LABELLED)]
    if strangers:
        raise InputError(
            f"The classes of '{images.title}' are no longer those that the run began with: '{strangers[0]}' is only "
            "in one of them; put the data back, or start a new run."
        )
    changes = _changes(before, now)
    if changes and not changes_allowed:
        raise InputError(
            f"The data '{images.title}' changed since the run began: {'; '.join(changes)}. Put it back, or go on with "
            "it as it is (--data-changed): held-out images then stay held out, and new ones are trained on."
        )
    parts = {
        name: before[name].part if name in before else _TRAINING if images.is_drawn else entry.part
        for name, entry in now.items()
    }
    training, held_out = (_part(images, parts, part) for part in (_TRAINING, _HELD_OUT))
    if not len(training) or not len(held_out):
        raise InputError(
            f"Nothing is left of a part of '{images.title}'; put the data back, or start a new run."
        )
    return replace(images, training=training, held_out=held_out), changes


def _entries(images: LabelledImages) -> dict[str, _Entry]:
    entries = {}
    for part, members in ((_TRAINING, images.training), (_HELD_OUT, images.held_out)):
        for index, (source, target) in enumerate(zip(members.sources, members.targets, strict=True)):
            name = _name(source, images.root, f"{part} {index}")
            entries[name] = _Entry(part, images.label_of(target), digest_of(source))
    return entries


def _name(source: Source, root: Path | None, otherwise: str) -> str:
    if isinstance(source, Image.Image):
        return otherwise
    name = str(source)
    if isinstance(source, Path) and root is not None:
        name = source.relative_to(root).as_posix()
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _read(path: Path) -> dict[str, _Entry]:
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            rows = list(csv.DictReader(lines))
        entries = {row["image"]: _Entry(row["part"], row["class"], row["digest"]) for row in rows}
        if not entries:
            raise ValueError("it is empty")
        strangers = {entry.part for entry in entries.values()} - {_TRAINING, _HELD_OUT}
        if strangers:
            raise ValueError(f"there is no part '{strangers.pop()}'")
        return entries
    except (OSError, ValueError, csv.Error, KeyError) as error:
        raise InputError(
            f"'{path}', which says what the run trains on, cannot be read ({error}); start a new run."
        ) from error


def _changes(before: Mapping[str, _Entry], now: Mapping[str, _Entry]) -> list[str]:
    shared = [name for name in now if name in before]
    relabelled = [name for name in shared if before[name].class_name != now[name].class_name]
    kinds = {
        "new": [name for name in now if name not in before],
        "gone": [name for name in before if name not in now],
        "of another class": [name for name in relabelled if not before[name].class_name.startswith(LABELLED)],
        "with other labels": [name for name in relabelled if before[name].class_name.startswith(LABELLED)],
        "of another content": [name for name in shared if before[name].digest != now[name].digest],
    }
    return [
        f"{len(names):,} {'image' if len(names) == 1 else 'images'} {kind} ({', '.join(sorted(names)[:_NAMED])}"
        f"{', ...' if len(names) > _NAMED else ''})"
        for kind, names in kinds.items()
        if names
    ]


def _part(images: LabelledImages, parts: Mapping[str, str], wanted: str) -> Images:
    sources: list[Source] = []
    targets: list[Any] = []
    for part, members in ((_TRAINING, images.training), (_HELD_OUT, images.held_out)):
        for index, (source, target) in enumerate(zip(members.sources, members.targets, strict=True)):
            if parts[_name(source, images.root, f"{part} {index}")] == wanted:
                sources.append(source)
                targets.append(target)
    return Images(sources, targets)
