"""What is seen of a run while it lasts: the bar over images, and lines of text."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from refold.errors import printable


class _Speed(ProgressColumn):
    def get_table_column(self) -> Column:
        return Column(no_wrap=True)

    def render(self, task: Task) -> Text:
        return Text("" if not task.speed else f"{task.speed:,.0f} images/s")


def progress(console: Console) -> Progress:
    """A bar of images with their speed and the time left, on a terminal; tasks carry a ``note``."""
    return Progress(
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        _Speed(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True)),
        console=console,
        expand=True,
        disable=not (console.is_terminal or console.is_jupyter),
    )


def tell(console: Console, text: object) -> None:
    """Print a text as it is, in one line, whatever names are in it."""
    console.print(printable(text), markup=False, highlight=False, soft_wrap=True)
