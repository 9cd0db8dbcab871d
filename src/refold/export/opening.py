"""Opening an exported file by its name alone: the engine from its suffix, and what it says of itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from refold.errors import InputError, RefoldError, first_line
from refold.export.engines import FORMATS, Session, engine_of, get_engine
from refold.export.metadata import Description, read_description
from refold.export.running import run_apart

T = TypeVar("T")


@dataclass(frozen=True)
class ExportedFile:
    """A file that is ready to run: ``run`` maps tensors to the list of outputs."""

    path: Path
    description: Description
    run: Session


def open_exported(path: Path, *, threads: int | None = None) -> ExportedFile:
    """Read what an exported file says of itself and load it in its engine, with ``threads`` threads if given.

    Raises `InputError` where there is no such file, its engine is not installed, or the file is damaged; a call
    raises it where the engine cannot run the file on its arguments.
    """
    name = engine_of(path)
    if name is None:
        known = ", ".join(form.suffix for form in FORMATS.values())
        raise InputError(f"'{path}' is no exported file by its name; those of the engines end in {known}.")
    kind = FORMATS[name]
    if not (path.is_dir() if kind.is_folder else path.is_file()):
        raise InputError(f"There is no {'folder' if kind.is_folder else 'file'} '{path}'; check the path.")
    engine = get_engine(name)
    if kind.ends_its_process:
        run_apart(name, path, [])
    failure = f"{kind.title} cannot read '{path}'; export it again"
    metadata = _or_sentence(lambda: engine.read_metadata(path), failure)
    description = read_description(metadata, path)
    session = (
        _apart(name, path)
        if kind.ends_its_process
        else _or_sentence(lambda: engine.open(path, threads=threads), failure)
    )

    def run(*arguments: Tensor) -> list[Tensor]:
        shapes = ", ".join(str(tuple(argument.shape)) for argument in arguments)
        return _or_sentence(
            lambda: session(*arguments), f"{kind.title} cannot run '{path}' on an input of shape {shapes}"
        )

    return ExportedFile(path, description, run)


def _apart(name: str, path: Path) -> Session:
    """Each call in a worker process, where the end of the engine costs an answer and not the program."""
    return lambda *arguments: run_apart(name, path, [arguments])[0]


def _or_sentence(action: Callable[[], T], failure: str) -> T:
    """Engines raise what they like for a damaged file; all of it becomes one sentence."""
    try:
        return action()
    except RefoldError:
        raise
    except Exception as error:
        raise InputError(f"{failure} ({first_line(error)}).") from error
