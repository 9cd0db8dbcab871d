"""What a training would learn from: images a class, their sizes, and a sample of them to look at."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, field
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
    """The images of each class in either part, the widths and heights that occur, and what is to be said of them.

    Where images have boxes or masks, ``marks`` counts the ``unit`` of each class in both parts.
    """

    title: str
    training_images: int
    held_out_images: int
    training: dict[str, int]
    held_out: dict[str, int]
    sizes: dict[str, int]
    notes: list[str]
    marks: dict[str, int] = field(default_factory=dict)
    unit: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON-able values."""
        return dataclasses.asdict(self)


def survey(images: LabelledImages, console: Console) -> Survey:
    """Count the images, and read each whole: one that cannot be read is named in the notes."""
    sizes: Counter[tuple[int, int]] = Counter()
    notes = list(images.notes)
    sources = [*images.training.sources, *images.held_out.sources]
    targets = [*images.training.targets, *images.held_out.targets]
    with progress(console) as shown:
        task = shown.add_task("Reading images", total=len(sources), note="")
        for source, target in zip(sources, targets, strict=True):
            try:
                image = read_image(source)
                if not isinstance(target, int):
                    target.on(image)
                sizes[image.size] += 1
            except InputError as error:
                notes.append(f"Left out: {error}")
            shown.advance(task)
    names, marks = images.class_names, Counter[int]()
    counts = []
    for part in (images.training, images.held_out):
        number: Counter[int] = Counter()
        for target in part.targets:
            found = images.classes_of(target)
            number.update(found.keys())
            marks.update(found)
        counts.append({name: number[index] for index, name in enumerate(names)})
    rare = [name for name, count in counts[0].items() if count < _RARE]
    if rare:
        more = ", ..." if len(rare) > 3 else ""
        notes.append(
            f"{len(rare):,} classes have fewer than {_RARE} training images ({', '.join(rare[:3])}{more})."
        )
    ordered = {f"{width} x {height}": count for (width, height), count in sizes.most_common()}
    unit = next((target.unit for target in targets if not isinstance(target, int)), "")
    return Survey(
        images.title,
        len(images.training),
        len(images.held_out),
        counts[0],
        counts[1],
        ordered,
        notes,
        {name: marks[index] for index, name in enumerate(names)} if unit else {},
        unit,
    )


def render_survey(found: Survey) -> Table:
    """A row a class, the rarest ones where there are many."""
    table = Table(title=escape(printable(found.title)), title_justify="left")
    table.add_column("class")
    table.add_column("training images", justify="right")
    table.add_column("held-out images", justify="right")
    if found.unit:
        table.add_column(found.unit, justify="right")
    names = list(found.training)
    if len(names) > _LONGEST_TABLE:
        names = sorted(names, key=found.training.__getitem__)[:_LONGEST_TABLE]
    for name in names:
        marks = [f"{found.marks[name]:,}"] if found.unit else []
        table.add_row(
            escape(printable(name)), f"{found.training[name]:,}", f"{found.held_out[name]:,}", *marks
        )
    if len(names) < len(found.training):
        table.add_row(f"{len(found.training) - len(names):,} classes with more images", "", "")
    table.add_section()
    # An image with several classes is there once.
    totals = [
        found.training_images,
        found.held_out_images,
        *([sum(found.marks.values())] if found.unit else []),
    ]
    table.add_row(f"{len(found.training):,} classes", *(f"{total:,}" for total in totals))
    return table


def sizes_in_words(found: Survey) -> str:
    """The commonest sizes in one line."""
    shown = [f"{size} ({count:,})" for size, count in list(found.sizes.items())[:4]]
    others = f" and {len(found.sizes) - 4:,} other sizes" if len(found.sizes) > 4 else ""
    return f"Width x height in pixels: {', '.join(shown)}{others}."


def draw_sample(images: LabelledImages, path: Path) -> None:
    """Draw a few training images of the first classes, one row a class, to a PNG file, or a few with their labels.

    Raises `InputError` where ``path`` cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if images.keeps_size:
        _draw_labelled(images, path)
        return
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


def _draw_labelled(images: LabelledImages, path: Path) -> None:
    """Draw training images with their labels in a grid, spread evenly over the set."""
    from PIL.Image import new as new_image

    columns, rows, side = 4, 6, 360
    step = max(1, len(images.training) // (columns * rows))
    chosen = list(zip(images.training.sources, images.training.targets, strict=True))[::step]
    pictures = []
    for source, target in chosen[: columns * rows]:
        try:
            picture = read_image(source)
            drawn = target.drawn(picture, images.class_names)
        except InputError:
            continue  # said by the survey, and by a training
        drawn.thumbnail((side, side))
        pictures.append(drawn)
    sheet = new_image("RGB", (columns * side, -(-len(pictures) // columns) * side or side), (255, 255, 255))
    for number, picture in enumerate(pictures):
        sheet.paste(picture, (number % columns * side, number // columns * side))
    with written_aside(path) as aside:
        sheet.save(aside, format="png")
