"""Where an exported network goes: its files are written aside and take their places together, checked."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from refold.errors import InputError
from refold.export.engines import Format
from refold.files import PathLike, check_writable, written_together


def check_destination(path: PathLike, form: Format) -> Path:
    """The path, if an engine's file can go there; raises `InputError` where it cannot or is named otherwise."""
    target = Path(path)
    if form.is_folder and target.is_dir():
        check_writable(target / "contents")
    else:
        check_writable(target)
    if not target.name.endswith(form.suffix) or target.name == form.suffix:
        raise InputError(
            f"'{target}' cannot be a file of {form.title}; give a name that ends in {form.suffix}, "
            f"such as '{target.with_suffix('')}{form.suffix}'."
        )
    return target


@contextmanager
def placed_together(path: PathLike, form: Format) -> Iterator[Path]:
    """`refold.files.written_together` for an engine's file; raises `InputError` where ``path`` is named otherwise."""
    with written_together(check_destination(path, form)) as aside:
        yield aside


def files_of(path: Path) -> list[Path]:
    """All files of an export that was written to a folder of its own."""
    return sorted(file for file in path.parent.rglob("*") if file.is_file())


def write_beside(path: Path, metadata: Mapping[str, str]) -> None:
    """Write the metadata of a file whose format has no room for it, into a file named after it."""
    _beside(path).write_text(json.dumps(dict(metadata), indent=1, ensure_ascii=False), encoding="utf-8")


def read_beside(path: Path) -> dict[str, str]:
    """What `write_beside` wrote; empty where there is nothing."""
    beside = _beside(path)
    return dict(json.loads(beside.read_text(encoding="utf-8"))) if beside.is_file() else {}


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")
