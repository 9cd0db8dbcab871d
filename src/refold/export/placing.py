"""Where an exported network goes: its files are written aside and take their places together, checked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from refold.errors import InputError
from refold.export.engines import Format
from refold.files import PathLike, check_writable, path_aside


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
    """Give a path in a new folder, and move all that was written beside it to ``path`` at the end.

    The file itself comes last. If the block raises, or is interrupted, nothing stays and what was at ``path``
    is untouched. Raises `InputError` where ``path`` cannot be written.
    """
    target = check_destination(path, form)
    try:
        aside = path_aside(target)
        aside.mkdir()
        try:
            yield aside / target.name
            for written in sorted(aside.iterdir(), key=lambda file: file.name == target.name):
                _move(written, target.with_name(written.name), aside)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise InputError(f"'{target}' cannot be written: {error.strerror or error}.") from error


def _move(written: Path, target: Path, aside: Path) -> None:
    if written.is_dir():
        if target.is_dir():
            target.rename(aside / f"{target.name}.previous")
    else:
        # Some writers make their files private; the user's own default holds instead.
        default = aside / ".mode"
        default.touch()
        written.chmod(default.stat().st_mode)
        default.unlink()
    written.replace(target)


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
