"""Tables of text with remarks below, as a paper's exhibit is shown: on the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from refold.bench.papers.published import Exhibit


@dataclass(frozen=True)
class Grid:
    """Headings and cells; columns from `numbers` on are figures. One alone needs no title (empty)."""

    title: str
    headings: list[str]
    rows: list[list[str]]
    numbers: int

    def to_rich(self) -> Table:
        """The table for the terminal."""
        table = Table(title=self.title or None, title_justify="left")
        for place, heading in enumerate(self.headings):
            table.add_column(heading, justify="left" if place < self.numbers else "right", overflow="fold")
        for cells in self.rows:
            table.add_row(*map(escape, cells))
        return table

    def to_markdown(self) -> list[str]:
        """The lines of the table as Markdown."""
        marks = "|".join("---" if place < self.numbers else "--:" for place in range(len(self.headings)))
        return [
            *([f"{self.title}:", ""] if self.title else []),
            f"| {' | '.join(self.headings)} |",
            f"|{marks}|",
            *(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |" for cells in self.rows),
        ]


def rich_page(exhibit: Exhibit, grids: Sequence[Grid], remarks: Sequence[str]) -> Group:
    """The tables of an exhibit for the terminal, with the remarks below the last."""
    head = f"[bold]{escape(exhibit.source)}[/]: {escape(exhibit.title)}"
    return Group(head, *(grid.to_rich() for grid in grids), *(escape(f"- {line}") for line in remarks))


def markdown_page(exhibit: Exhibit, grids: Sequence[Grid], remarks: Sequence[str]) -> str:
    """The tables of an exhibit and the remarks as Markdown."""
    lines = [f"**{exhibit.source}**: {exhibit.title}."]
    for grid in grids:
        lines += ["", *grid.to_markdown()]
    return "\n".join([*lines, "", *(f"- {line}" for line in remarks)]) + "\n"
