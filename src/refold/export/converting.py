"""What the engines' converters have in common: own processes, silence, short errors."""

from __future__ import annotations

import logging
import os
import subprocess
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

from refold.errors import InputError
from refold.system import c_library, signal_name

# Long enough for the largest network on a slow machine; a converter that takes longer hangs.
_TIME_LIMIT = 1800


def run_converter(command: Sequence[str], title: str, written: Path) -> None:
    """Run a converter in a worker process, so that its crash or its chatter is not ours.

    Raises `InputError` where it fails, hangs or leaves no file ``written``.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_TIME_LIMIT, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise InputError(f"{title} did not convert the model within {_TIME_LIMIT // 60} minutes.") from error
    if done.returncode == 0 and written.is_file() and written.stat().st_size:
        return
    if (name := signal_name(done.returncode)) is not None:
        reason = f"it crashed with {name}"
    else:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        reason = lines[-1] if lines else f"it ended with code {done.returncode} and no message"
    raise InputError(f"{title} cannot convert the model: {reason.rstrip('.')}.")


@contextmanager
def silent_stdout() -> Iterator[None]:
    """Keep what C code prints off the standard output, where it would spoil what the command prints."""
    _flush()
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        _flush()
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _flush() -> None:
    library = c_library()
    if library is not None:
        library.fflush(None)


@contextmanager
def muted() -> Iterator[None]:
    """Keep what a converter written in Python tells of its steps off both streams."""
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere), quiet():
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Converters warn about themselves; what concerns the user arrives as an exception."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
