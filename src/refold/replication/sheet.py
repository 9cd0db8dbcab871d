"""A table with remarks below, for the terminal, as Markdown and in files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from refold.bench.papers.published import Exhibit
from refold.errors import InputError
from refold.files import PathLike, check_writable, write_text


@dataclass(frozen=True)
class Sheet:
    """Headings and cells of an exhibit, remarks, and all of it as ``content``, JSON-able values.

    Columns from ``numbers`` on are figures.
    """

    exhibit: Exhibit
    headings: list[str]
    rows: list[list[str]]
    numbers: int
    remarks: list[str]
    content: Mapping[str, Any]

    def to_rich(self) -> Group:
        """The table for the terminal."""
        table = Table()
        for place, heading in enumerate(self.headings):
            table.add_column(heading, justify="left" if place < self.numbers else "right", overflow="fold")
        for cells in self.rows:
            table.add_row(*map(escape, cells))
        title = f"[bold]{escape(self.exhibit.source)}[/]: {escape(self.exhibit.title)}"
        return Group(title, table, *(escape(f"- {line}") for line in self.remarks))

    def to_markdown(self) -> str:
        """The table as Markdown."""
        marks = "|".join("---" if place < self.numbers else "--:" for place in range(len(self.headings)))
        lines = [
            f"**{self.exhibit.source}**: {self.exhibit.title}.",
            "",
            f"| {' | '.join(self.headings)} |",
            f"|{marks}|",
        ]
        lines += [f"| {' | '.join(cells)} |" for cells in self.rows]
        return "\n".join([*lines, "", *(f"- {line}" for line in self.remarks)]) + "\n"

    def to_json(self) -> str:
        """The content as JSON."""
        return json.dumps({**self.content, "report": self.to_markdown()}, indent=1)

    def save(self, path: PathLike) -> None:
        """Write it by the file's suffix, .json or .md; raises `InputError` for another."""
        is_markdown = check_suffix(path).suffix.lower() == ".md"
        write_text(path, self.to_markdown() if is_markdown else self.to_json())


def check_suffix(path: PathLike) -> Path:
    """The path of a file to write; raises `InputError` where it is neither .json nor .md."""
    if Path(path).suffix.lower() not in (".json", ".md"):
        raise InputError(f"'{path}' ends in neither .json nor .md, in which accuracies are written.")
    return check_writable(path)
