"""Writing files so that either the whole new file is there or the old state is."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from refold.errors import InputError

PathLike = str | os.PathLike[str]

_ASIDE = ".part"


def check_writable(path: PathLike) -> Path:
    """The path, if a file can be written there as far as can be told; for finding out before long work.

    Raises `InputError` where ``path`` is a folder or its folder does not exist.
    """
    target = Path(path)
    if target.is_dir():
        raise InputError(f"'{target}' is a folder; give the path of a file to write.")
    if not target.parent.is_dir():
        raise InputError(
            f"'{target}' cannot be written: the folder '{target.parent}' does not exist; create it first."
        )
    if not os.access(target.parent, os.W_OK):
        raise InputError(f"'{target}' cannot be written: the folder '{target.parent}' is read-only.")
    return target


@contextmanager
def written_aside(path: PathLike) -> Iterator[Path]:
    """Give a path to write to, and rename it to ``path`` once the block ends without an error.

    If the block raises, or is interrupted, nothing stays and a file that was at ``path`` is untouched.
    Raises `InputError` where ``path`` cannot be written.
    """
    target = check_writable(path)
    try:
        aside = path_aside(target)
        try:
            aside.touch()
            mode = aside.stat().st_mode
            yield aside
            # Some writers make their files private; the user's own default holds instead.
            aside.chmod(mode)
            aside.replace(target)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"'{target}' cannot be written: {error.strerror or error}.") from error


@contextmanager
def written_together(path: PathLike) -> Iterator[Path]:
    """Give a path in a new folder, and move all that was written beside it to ``path`` at the end.

    The file itself, or the folder, comes last. If the block raises, or is interrupted, nothing stays and what was at
    ``path`` is untouched. Raises `InputError` where ``path`` cannot be written.
    """
    target = Path(path)
    check_writable(target / "contents" if target.is_dir() else target)
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


def remove_leftovers(folder: Path) -> None:
    """Remove what writers that were killed left half-written in a folder that nobody else writes into."""
    for path in folder.glob(f".*{_ASIDE}"):
        _remove(path)


def path_aside(target: Path) -> Path:
    """Where to write what is to become ``target``; what killed processes left there is removed.

    The name says which process writes, so that two of them do not write into each other's.
    """
    import psutil  # here, for folding runs where only torch is installed

    name = re.compile(rf"\.{re.escape(target.name)}\.(\d+){re.escape(_ASIDE)}")
    for path in target.parent.iterdir():
        left = name.fullmatch(path.name)
        if left and (int(left[1]) == os.getpid() or not psutil.pid_exists(int(left[1]))):
            _remove(path)
    return target.with_name(f".{target.name}.{os.getpid()}{_ASIDE}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_text(path: PathLike, text: str) -> None:
    """Write ``text`` as UTF-8, aside and renamed; raises `InputError` where ``path`` cannot be written."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def make_folder(path: PathLike) -> Path:
    """Make a folder and its parents if they are missing; raises `InputError` where that is not possible."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"The folder '{folder}' cannot be made: {error.strerror or error}.") from error
    return folder
