"""What a training would learn from: images a class, their sizes, and a sample of them to look at."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from refold.errors import InputError, printable
from refold.files import written_aside
from refold.training.images import LabelledImages
from refold.training.pictures import read_image
from refold.training.progress import progress

_MOST_CLASSES, _A_CLASS = 16, 8
_LONGEST_TABLE = 40
_RARE = 10


@dataclass(frozen=True)
class Survey:
    """The images of each class in either part, the widths and heights that occur, and what is to be said of them."""

    title: str
    training: dict[str, int]
    held_out: dict[str, int]
    sizes: dict[str, int]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON-able values."""
        return dataclasses.asdict(self)


def survey(images: LabelledImages, console: Console) -> Survey:
    """Count the images, and read each whole: one that cannot be read is named in the notes."""
    sizes: Counter[tuple[int, int]] = Counter()
    notes = list(images.notes)
    sources = [*images.training.sources, *images.held_out.sources]
    with progress(console) as shown:
        task = shown.add_task("Reading images", total=len(sources), note="")
        for source in sources:
            try:
                sizes[read_image(source).size] += 1
            except InputError as error:
                notes.append(f"Left out: {error}")
            shown.advance(task)
    counts = [
        {name: Counter(part.targets)[index] for index, name in enumerate(images.class_names)}
        for part in (images.training, images.held_out)
    ]
    rare = [name for name, count in counts[0].items() if count < _RARE]
    if rare:
        more = ", ..." if len(rare) > 3 else ""
        notes.append(
            f"{len(rare):,} classes have fewer than {_RARE} training images ({', '.join(rare[:3])}{more})."
        )
    ordered = {f"{width} x {height}": count for (width, height), count in sizes.most_common()}
    return Survey(images.title, counts[0], counts[1], ordered, notes)


def render_survey(found: Survey) -> Table:
    """A row a class, the rarest ones where there are many."""
    table = Table(title=escape(printable(found.title)), title_justify="left")
    table.add_column("class")
    table.add_column("training images", justify="right")
    table.add_column("held-out images", justify="right")
    names = list(found.training)
    if len(names) > _LONGEST_TABLE:
        names = sorted(names, key=found.training.__getitem__)[:_LONGEST_TABLE]
    for name in names:
        table.add_row(escape(printable(name)), f"{found.training[name]:,}", f"{found.held_out[name]:,}")
    if len(names) < len(found.training):
        table.add_row(f"{len(found.training) - len(names):,} classes with more images", "", "")
    table.add_section()
    totals = (sum(found.training.values()), sum(found.held_out.values()))
    table.add_row(f"{len(found.training):,} classes", *(f"{total:,}" for total in totals))
    return table


def sizes_in_words(found: Survey) -> str:
    """The commonest sizes in one line."""
    shown = [f"{size} ({count:,})" for size, count in list(found.sizes.items())[:4]]
    others = f" and {len(found.sizes) - 4:,} other sizes" if len(found.sizes) > 4 else ""
    return f"Width x height in pixels: {', '.join(shown)}{others}."


def draw_sample(images: LabelledImages, path: Path) -> None:
    """Draw a few training images of the first classes, one row a class, to a PNG file.

    Raises `InputError` where ``path`` cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = images.class_names[:_MOST_CLASSES]
    rows: list[list[Image]] = [[] for _ in names]
    for source, target in zip(images.training.sources, images.training.targets, strict=True):
        if target < len(names) and len(rows[target]) < _A_CLASS:
            try:
                rows[target].append(read_image(source))
            except InputError:
                continue  # said by the survey, and by a training
    figure = Figure(figsize=(1.1 * _A_CLASS, 1.3 * len(names)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(names), _A_CLASS, squeeze=False)
    for row, (name, pictures) in enumerate(zip(names, rows, strict=True)):
        for column, axes in enumerate(grid[row]):
            axes.axis("off")
            if column < len(pictures):
                axes.imshow(pictures[column])
        # Dollar signs would be taken for formulas.
        grid[row][0].set_title(printable(name)[:40], loc="left", fontsize=9, parse_math=False)
    left = len(images.class_names) - len(names)
    title = images.title + (
        f": the first {len(names)} of {len(images.class_names):,} classes" if left else ""
    )
    figure.suptitle(printable(title), fontsize=10, parse_math=False)
    with written_aside(path) as aside:
        figure.savefig(aside, format="png")
