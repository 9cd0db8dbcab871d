"""A table with remarks below, for the terminal, as Markdown and in files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group

from refold.bench.papers.grids import Grid, markdown_page, rich_page
from refold.bench.papers.published import Exhibit
from refold.errors import InputError
from refold.files import PathLike, check_writable, write_text


@dataclass(frozen=True)
class Sheet:
    """The table of an exhibit, remarks, and all of it as ``content``, JSON-able values."""

    exhibit: Exhibit
    grid: Grid
    remarks: list[str]
    content: Mapping[str, Any]

    def to_rich(self) -> Group:
        """The table for the terminal."""
        return rich_page(self.exhibit, [self.grid], self.remarks)

    def to_markdown(self) -> str:
        """The table as Markdown."""
        return markdown_page(self.exhibit, [self.grid], self.remarks)

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
