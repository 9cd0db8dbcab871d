"""The parts of a set with labels: which is trained on, which is measured on, and the set that they make."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from refold.errors import InputError, some
from refold.training.folders import TEST, TRAINING, VALIDATION, bare_name
from refold.training.images import LabelledImages, hold_out_labelled
from refold.training.labelled.tidying import Part, Tally


@dataclass
class Found:
    """What was read of a set: the names of its classes, its parts ("train", "val", "test"), and what was met."""

    class_names: list[str]
    parts: dict[str, Part]
    tally: Tally
    notes: list[str] = field(default_factory=list)


def part_of(path: Path, root: Path) -> str | None:
    """Which part a file or folder within ``root`` is, by its own name or that of the folder that it lies in."""
    names = [path.stem if path.suffix else path.name, path.parent.name if path.parent != root else ""]
    for name in names:
        for word in [name, *name.replace("-", "_").split("_")]:
            bare = bare_name(word)
            for part, words in (("train", TRAINING), ("val", VALIDATION), ("test", TEST)):
                if bare in words:
                    return part
    return None


def as_set(found: Found, root: Path, seed: int, task: str) -> LabelledImages:
    """The set: trained on "train", measured on "val" or else "test", or on a fifth of all that is drawn by the seed.

    Raises `InputError` where there is nothing to train on, a part has no labels, or too much had to be left out.
    """
    found.tally.check(str(root))
    parts = {name: part for name, part in found.parts.items() if part.sources}
    training = parts.get("train")
    if training is None:
        there = f"only {' and '.join(parts)}" if parts else "no images with labels"
        raise InputError(f"'{root}' holds {there}; there is nothing to train on.")
    notes = [*found.notes, *found.tally.notes()]
    held_out_name = next((name for name in ("val", "test") if name in parts), None)
    _check_labels(root, "train", training)
    base = root if root.is_dir() else root.parent
    if held_out_name is None:
        return hold_out_labelled(
            str(root),
            found.class_names,
            training.sources,
            training.targets,
            seed,
            task=task,
            notes=[*notes, *_background(training, None)],
            root=base,
        )
    held_out = parts[held_out_name]
    _check_labels(root, held_out_name, held_out)
    left = [name for name in parts if name not in ("train", held_out_name)]
    if left:
        notes.append(f"Left out: the part {some(left)}.")
    return LabelledImages(
        str(root),
        found.class_names,
        training.images(),
        held_out.images(),
        mirror=True,
        notes=(*notes, *_background(training, held_out)),
        root=base,
        task=task,
    )


def _check_labels(root: Path, name: str, part: Part) -> None:
    if part.background == len(part.sources):
        raise InputError(
            f"None of the {len(part.sources):,} images of the part '{name}' of '{root}' has a label; look whether the "
            "labels lie where they are looked for."
        )


def _background(training: Part, held_out: Part | None) -> list[str]:
    counts = [training.background, 0 if held_out is None else held_out.background]
    if not any(counts):
        return []
    behind = f" and {counts[1]:,} held-out" if held_out is not None else ""
    return [f"{counts[0]:,} training{behind} images have no box: they are background."]
