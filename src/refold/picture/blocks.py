"""What the picture shows: the regions of a report by block, and equal blocks together."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from refold.folding import FoldedRegion

_LAYER = re.compile(
    r"(?:(?P<size>\d+(?:×\d+)*) )?(?P<kind>\D.*), (?P<read>\d+) to (?P<written>\d+) channels"
    r"(?:, (?P<groups>\d+) groups)?"
)


class Layer(NamedTuple):
    """The text of a region's layer in parts: what is the same for all layers of one drawing, and then its sizes."""

    kind: str
    grouping: str = ""
    size: str = ""
    read: int = 0
    written: int = 0
    groups: int = 1

    @classmethod
    def of(cls, text: str) -> Layer:
        """The layer that a report calls `text`; all of it is the kind where it does not tell channels."""
        found = _LAYER.fullmatch(text)
        if found is None:
            return cls(text)
        read, written, groups = int(found["read"]), int(found["written"]), int(found["groups"] or 1)
        grouping = "" if groups == 1 else "depthwise" if groups == read else "grouped"
        return cls(found["kind"], grouping, found["size"] or "", read, written, groups)


@dataclass(frozen=True)
class Part:
    """Regions of a block that had the same operators and became the same kind of layer.

    `names` are their paths within the block, `layers` are those of all blocks that are drawn together.
    """

    names: tuple[str, ...]
    operators: tuple[tuple[str, int], ...]
    layers: tuple[Layer, ...]

    @property
    def kind(self) -> str:
        """What the layers are, with all their kernel sizes."""
        sizes = dict.fromkeys(layer.size for layer in self.layers if layer.size)
        return f"{', '.join(sizes)} {self.layers[0].kind}".lstrip()

    @property
    def details(self) -> str:
        """The channels and groups of the layers, from the least to the most where they differ."""
        first = self.layers[0]
        if not first.read:
            return ""
        channels = _span(layer.read for layer in self.layers)
        if any(layer.read != layer.written for layer in self.layers):
            channels += f" → {_span(layer.written for layer in self.layers)}"
        grouped = first.grouping == "grouped"
        groups = f"{_span(layer.groups for layer in self.layers)} groups" if grouped else first.grouping
        return f"{groups}{', ' if groups else ''}{channels} channels"

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for parts that are drawn alike, but for channels, and sizes of depthwise kernels."""
        first = self.layers[0]
        size = "" if first.grouping == "depthwise" else first.size
        return self.names, self.operators, first.kind, first.grouping, size

    @property
    def label(self) -> str:
        """Its paths within the block, with how many they are."""
        names = ", ".join(dict.fromkeys(filter(None, self.names)))
        return f"{len(self.names)} of these: {names}".rstrip(": ") if len(self.names) > 1 else names


@dataclass(frozen=True)
class Drawing:
    """Equal blocks, drawn once: their paths in order, and their parts."""

    paths: tuple[str, ...]
    parts: tuple[Part, ...]

    @property
    def regions(self) -> int:
        """How many regions of the report it stands for."""
        return len(self.paths) * sum(len(part.names) for part in self.parts)


def drawings(regions: Iterable[FoldedRegion]) -> list[Drawing]:
    """The blocks of a report, those together that are equal but for the sizes of their layers."""
    blocks: dict[str, list[FoldedRegion]] = {}
    for region in regions:
        blocks.setdefault(block_of(region.path), []).append(region)
    alike: dict[tuple[object, ...], list[tuple[str, tuple[Part, ...]]]] = {}
    for path, found in blocks.items():
        parts = _parts(path, found)
        alike.setdefault(tuple(part.key for part in parts), []).append((path, parts))
    return [_together(group) for group in alike.values()]


def block_of(path: str) -> str:
    """The block that a path is in.

    Numbers behind a plural name count blocks (`stages.0.blocks.2`, `stages.1.0`), so what a block numbers within
    itself (`stages.1.0.shortcut.0`) stays in it. Without such a name the first numbers count (`layer1.0`), and
    without numbers a block is what the last name is in.
    """
    names = path.split(".")
    ends = [
        end
        for end in range(2, len(names) + 1)
        if names[end - 1].isdigit() and (end == len(names) or not names[end].isdigit())
    ]
    plural = [end for end in ends if _counted(names[:end]).endswith("s")]
    if ends:
        return ".".join(names[: plural[-1] if plural else ends[0]])
    return ".".join(names[:-1]) or path


def shortened(paths: Iterable[str]) -> str:
    """The paths in one line, those that are numbered one after the other as a range: `stages.2.1–13`."""
    runs: list[
        tuple[list[str], int | None, str]
    ] = []  # what the first is made of, which number grows, and the last
    for path in paths:
        pieces = re.split(r"(\d+)", path)
        if runs:
            first, place, last = runs[-1]
            grown = _grown(re.split(r"(\d+)", last), pieces)
            if grown is not None and place in (None, grown):
                runs[-1] = (first, grown, path)
                continue
        runs.append((pieces, None, path))
    return ", ".join(_run(*run) for run in runs)


def named(path: str) -> str:
    """The path, or words for that of the whole network."""
    return path or "the network itself"


def before_words(operators: Iterable[tuple[str, int]]) -> str:
    """The operators of a region in one line."""
    return ", ".join(f"{count} {word}" for word, count in operators)


def _counted(names: list[str]) -> str:
    """The name that the numbers at the end count."""
    return next((name for name in reversed(names) if not name.isdigit()), "")


def _parts(block: str, regions: list[FoldedRegion]) -> tuple[Part, ...]:
    found: dict[tuple[object, ...], Part] = {}
    for region in regions:
        name = region.path[len(block) :].lstrip(".")
        new = Part((name,), _shown(region.operators), (Layer.of(region.layer),))
        old = found.get(new.key[1:])
        found[new.key[1:]] = (
            new if old is None else Part(old.names + new.names, old.operators, old.layers + new.layers)
        )
    return tuple(found.values())


def _together(group: list[tuple[str, tuple[Part, ...]]]) -> Drawing:
    parts = [
        Part(same[0].names, same[0].operators, tuple(layer for part in same for layer in part.layers))
        for same in zip(*(parts for _, parts in group), strict=True)
    ]
    return Drawing(tuple(path for path, _ in group), tuple(parts))


def _shown(operators: dict[str, int]) -> tuple[tuple[str, int], ...]:
    """The operators in order, without those that compute nothing in evaluation mode where there are others."""
    computing = [pair for pair in operators.items() if not pair[0].lower().startswith(("identity", "drop"))]
    return tuple(computing or operators.items())


def _span(numbers: Iterable[int]) -> str:
    found = sorted(set(numbers))
    return str(found[0]) if len(found) == 1 else f"{found[0]}…{found[-1]}"


def _grown(pieces: list[str], following: list[str]) -> int | None:
    """The place of the number that is one more than before, if all else is the same and no number stands next to it."""
    places = [place for place, pair in enumerate(zip(pieces, following, strict=False)) if pair[0] != pair[1]]
    if len(pieces) != len(following) or len(places) != 1 or places[0] % 2 == 0:
        return None
    (place,) = places
    grows = following[place] == str(int(pieces[place]) + 1)
    return place if grows and pieces[place + 1] != "." else None


def _run(first: list[str], place: int | None, last: str) -> str:
    if place is None:
        return named(last)
    end = re.split(r"(\d+)", last)[place]
    return "".join([*first[: place + 1], f"–{end}", *first[place + 1 :]])
