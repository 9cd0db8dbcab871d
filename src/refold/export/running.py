"""Running an exported file in its engine, in a worker process: `python -m refold.export.running`."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from refold.errors import InputError, RefoldError
from refold.export.apart import Apart, ProcessFailed, serve
from refold.export.engines import FORMATS, CannotRun, get_engine
from refold.export.request import Inputs

# Long enough for a few calls of the largest network on a slow machine; an engine that takes longer hangs.
TIME_LIMIT = 600.0

_lock = threading.Lock()
# One process for all files: starting it takes as long as importing PyTorch.
_kept: list[Apart] = []


def run_apart(engine: str, path: Path, calls: Sequence[Inputs]) -> list[list[Tensor]]:
    """The outputs of a file for several calls.

    Raises `CannotRun` where this machine cannot run such files, and `InputError` where the engine refuses the
    file, crashes, or is silent for `TIME_LIMIT` seconds.
    """
    with _lock, TemporaryDirectory() as folder:
        given, found = Path(folder) / "inputs.pt", Path(folder) / "outputs.pt"
        torch.save(list(calls), given)
        process = _process()
        try:
            # The process stays in the folder where it started.
            there = str(path.resolve())
            refusal = process.ask("run", engine=engine, path=there, inputs=str(given), outputs=str(found))
        except ProcessFailed as error:
            _end()
            raise InputError(f"{FORMATS[engine].title} cannot run '{path.name}': {error}.") from error
        except BaseException:
            _end()  # its answer would be taken for the next one's
            raise
        if refusal is not None:
            kind = CannotRun if refusal["kind"] == CannotRun.__name__ else InputError
            raise kind(refusal["message"])
        results: list[list[Tensor]] = torch.load(found, weights_only=True)
        return results


def start() -> None:
    """Let the process start while something else is done."""
    with _lock:
        _process()


def _process() -> Apart:
    if not (_kept and _kept[0].is_running):
        _end()
        _kept.append(Apart("refold.export.running", TIME_LIMIT))
    return _kept[0]


@atexit.register
def _end() -> None:
    while _kept:
        _kept.pop().close()


class Runner:
    """Answers the requests of `run_apart`."""

    def run(self, engine: str, path: str, inputs: str, outputs: str) -> dict[str, str] | None:
        """Run a file on the inputs and write its outputs; returns the reason where it is refused."""
        try:
            session = get_engine(engine).open(Path(path))
            results = [session(*arguments) for arguments in torch.load(inputs, weights_only=True)]
        except RefoldError as error:
            return {"kind": type(error).__name__, "message": str(error)}
        torch.save(results, outputs)
        return None


if __name__ == "__main__":
    serve(Runner())
