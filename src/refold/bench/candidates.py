"""What takes turns in a benchmark: a model in one form, opened in one engine in a process of its own."""

from __future__ import annotations

import json
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

from refold.errors import RefoldError

# A turn of a fast model is several calls, so that it lasts about this long.
_TURN_MILLISECONDS = 10.0
_MOST_CALLS = 100

Key = TypeVar("Key")


class CandidateFailed(RefoldError):
    """A model could not be prepared, opened or run; the message is the reason."""


class Candidate(Protocol):
    """Something that can be timed in turn with others."""

    def warm_up(self) -> None:
        """Run once, untimed; raises `CandidateFailed` where that fails."""

    def sample(self) -> float:
        """Milliseconds of one call; raises `CandidateFailed` where it fails."""

    def close(self) -> None:
        """Free what it holds; harmless when called again."""


class WorkerProcess:
    """A running `refold.bench.worker`, asked line by line, each question with a time limit in seconds."""

    def __init__(self, threads: int, time_limit: float) -> None:
        self._time_limit = time_limit
        self._calls = 1
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the process
        environment = {
            **os.environ,
            **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads)),
            # A model's class is found wherever this process found it.
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        }
        # A session of its own: Ctrl-C reaches the parent alone, which ends its workers in order.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "refold.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        self._answers: queue.Queue[str | None] = queue.Queue()
        assert self._process.stdout is not None
        threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True).start()

    def _read(self, pipe: IO[str]) -> None:
        for line in pipe:
            self._answers.put(line)
        self._answers.put(None)

    def ask(self, do: str, **arguments: Any) -> Any:
        """The answer to one request; raises `CandidateFailed` for an error, a crash or silence."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            raise CandidateFailed(self._how_it_ended()) from None
        try:
            line = self._answers.get(timeout=self._time_limit)
        except queue.Empty:
            self.close()
            raise CandidateFailed(f"no answer within {self._time_limit:g} s; its process was ended") from None
        if line is None:
            raise CandidateFailed(self._how_it_ended())
        answer = json.loads(line)
        if "error" in answer:
            raise CandidateFailed(answer["error"])
        return answer["value"]

    def warm_up(self) -> None:
        """Run once, and choose how many calls make up a turn."""
        milliseconds = self.ask("time", calls=1)
        self._calls = min(_MOST_CALLS, max(1, math.ceil(_TURN_MILLISECONDS / max(milliseconds, 1e-3))))

    def sample(self) -> float:
        """Milliseconds a call, over the calls of one turn."""
        return float(self.ask("time", calls=self._calls))

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue
        self._errors.close()

    def _how_it_ended(self) -> str:
        code = self._process.wait()
        if code >= 0:
            self._errors.seek(0)
            lines = self._errors.read().decode(errors="replace").strip().splitlines()
            return f"its process ended with exit code {code}" + (f": {lines[-1][:300]}" if lines else "")
        hint = "; the memory may not suffice" if -code == signal.SIGKILL else ""
        return f"its process ended with {signal.Signals(-code).name}{hint}"


def open_worker(
    engine: str, path: Path, *, threads: int, shape: tuple[int, ...], dtype: str, time_limit: float
) -> WorkerProcess:
    """Open a model's file in a process of its own; raises `CandidateFailed` where that fails."""
    worker = WorkerProcess(threads, time_limit)
    try:
        worker.ask("open", engine=engine, path=str(path), threads=threads, shape=list(shape), dtype=dtype)
    except BaseException:
        worker.close()
        raise
    return worker


def interleave(
    candidates: Mapping[Key, Candidate],
    *,
    rounds: int,
    warm_up: int,
    samples: dict[Key, list[float]],
    failures: dict[Key, str],
    on_round: Callable[[], None] = lambda: None,
) -> None:
    """Let candidates take turns (A B C, A B C, …): `warm_up` rounds untimed, then `rounds` rounds into `samples`.

    `samples` may hold rounds of before, the same number for all. A candidate that fails is closed, its samples go,
    and its reason stands in `failures`. However this ends, all have the same number of samples: those of whole
    rounds.
    """
    running = dict(candidates)

    def turn(action: Callable[[Key, Candidate], None]) -> None:
        for key, candidate in list(running.items()):
            try:
                action(key, candidate)
            except CandidateFailed as error:
                failures[key] = str(error)
                samples[key].clear()
                running.pop(key).close()
        on_round()

    try:
        for _ in range(warm_up):
            turn(lambda _, candidate: candidate.warm_up())
        for _ in range(rounds):
            turn(lambda key, candidate: samples[key].append(candidate.sample()))
    finally:
        complete = min((len(samples[key]) for key in running), default=0)
        for key in running:
            del samples[key][complete:]
