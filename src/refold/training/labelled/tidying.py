"""Boxes as they are found, made usable: what was changed or left out is counted, and too much of it is an error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from refold.errors import InputError, some
from refold.training.images import Images
from refold.training.labels import BoxLabels, Outline, OutlinedLabels
from refold.training.pictures import Source

_MOST_WITHOUT_AREA = 0.1


@dataclass
class Tally:
    """What was met among the boxes of a set, by kind; ``notes`` says it."""

    boxes: int = 0
    counts: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, place: str) -> None:
        """Count something by its kind, such as "boxes without area, left out", and where it is."""
        self.counts.setdefault(kind, []).append(place)

    def notes(self) -> list[str]:
        """One sentence a kind: how many, and where the first are."""
        return [f"{len(places):,} {kind} ({some(places)})." for kind, places in self.counts.items()]

    def check(self, title: str) -> None:
        """Raise `InputError` where more than a tenth of all boxes have no area."""
        empty = self.counts.get(_WITHOUT_AREA, [])
        if len(empty) > _MOST_WITHOUT_AREA * max(self.boxes, 1):
            raise InputError(
                f"{len(empty):,} of the {self.boxes:,} boxes of '{title}' have no area ({some(empty)}); look whether "
                "they are written as x, y, width and height or as two corners."
            )


_WITHOUT_AREA = "boxes without area, left out"
_CLIPPED = "boxes reach beyond their image, clipped to it"
_TWICE = "boxes are there twice, the second left out"
_CROWDS = "boxes are crowds or difficult: not learnt, and neither right nor wrong where they are found"


@dataclass
class BoxesOfImage:
    """The boxes of one image as they are collected, within ``limits`` (width, height).

    ``outlines`` None asks for none.
    """

    limits: tuple[float, float] | None
    tally: Tally
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    crowds: list[bool] = field(default_factory=list)
    outlines: list[Outline] | None = None

    def add(
        self,
        box: Sequence[float],
        label: int,
        place: str,
        *,
        crowd: bool = False,
        outline: Outline | None = None,
    ) -> None:
        """Take in a box x1, y1, x2, y2; raises `InputError` where it holds what is no number.

        Where outlines are asked for, one without is left out and counted.
        """
        if not all(map(math.isfinite, box)):
            raise InputError(f"{place}: the box {list(box)} holds what is no number; correct it.")
        self.tally.boxes += 1
        x1, y1, x2, y2 = box
        if self.limits is not None:
            width, height = self.limits
            inside = (max(x1, 0.0), max(y1, 0.0), min(x2, width), min(y2, height))
            # A thousandth of the image is rounding.
            if any(abs(a - b) > 1e-3 * max(self.limits) for a, b in zip(inside, box, strict=True)):
                self.tally.add(_CLIPPED, place)
            x1, y1, x2, y2 = inside
        if x2 <= x1 or y2 <= y1:
            self.tally.add(_WITHOUT_AREA, place)
            return
        if self.outlines is not None and outline is None:
            self.tally.add("boxes without an outline, left out", place)
            return
        found = (x1, y1, x2, y2)
        if any(own == found and known == label for own, known in zip(self.boxes, self.labels, strict=True)):
            self.tally.add(_TWICE, place)
            return
        if crowd:
            self.tally.add(_CROWDS, place)
        self.boxes.append(found)
        self.labels.append(label)
        self.crowds.append(crowd)
        if self.outlines is not None and outline is not None:
            self.outlines.append(outline)

    def done(self, size: tuple[int, int] | None = None, *, are_shares: bool = False) -> BoxLabels:
        """The labels of the image."""
        given = (tuple(self.boxes), tuple(self.labels), tuple(self.crowds), size, are_shares)
        return BoxLabels(*given) if self.outlines is None else OutlinedLabels(*given, tuple(self.outlines))


@dataclass
class Part:
    """The images of a part of a set with their labels, in the order of their paths."""

    sources: list[Source] = field(default_factory=list)
    targets: list[BoxLabels] = field(default_factory=list)

    def add(self, path: Path, labels: BoxLabels) -> None:
        """Take in an image."""
        self.sources.append(path)
        self.targets.append(labels)

    @property
    def background(self) -> int:
        """How many images have no box."""
        return sum(not labels.labels for labels in self.targets)

    def images(self) -> Images:
        """The same as `Images`."""
        return Images(self.sources, self.targets)
