"""One run at a time in a folder."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from refold.errors import InputError
from refold.files import make_folder

_LOCK, _OWNER = ".lock", ".lock.owner"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder, which is made if it is missing, as long as the block runs.

    The operating system ends the lock with its process, so one that was killed leaves none behind that counts.
    Raises `InputError`, naming the process, where another run has the folder, and where it cannot be made.
    """
    make_folder(folder)
    lock, owner = FileLock(folder / _LOCK, blocking=False), folder / _OWNER
    try:
        lock.acquire()
    except Timeout:
        raise InputError(
            f"'{folder}' is in use by another run{_described(owner)}; wait until it ends, or give another folder."
        ) from None
    except OSError as error:
        raise InputError(f"'{folder}' cannot be written: {error.strerror or error}.") from error
    try:
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        owner.write_text(json.dumps([os.getpid(), socket.gethostname(), started]), encoding="utf-8")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()
        (folder / _LOCK).unlink(missing_ok=True)


def _described(owner: Path) -> str:
    try:
        process, host, started = json.loads(owner.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return f" (process {process} on {host} since {started})"
