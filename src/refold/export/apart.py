"""A process that is asked line by line: a crash or a hang of native code costs an answer, not the program."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from typing import IO, Any

from refold.errors import RefoldError
from refold.system import signal_name


class ProcessFailed(RefoldError):
    """The process gave an error for an answer, crashed or was silent; the message is the reason."""


class Apart:
    """A running ``python -m module``, whose `main` is `serve`; each question has a time limit in seconds."""

    def __init__(self, module: str, time_limit: float, environment: Mapping[str, str] | None = None) -> None:
        self._time_limit = time_limit
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the process
        # A session of its own: Ctrl-C reaches the parent alone, which ends its processes in order.
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={
                **os.environ,
                **(environment or {}),
                # A model's class is found wherever this process found it.
                "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            },
            text=True,
            encoding="utf-8",
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # the same on Windows
        )
        self._answers: queue.Queue[str | None] = queue.Queue()
        assert self._process.stdout is not None
        threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True).start()

    def _read(self, pipe: IO[str]) -> None:
        for line in pipe:
            self._answers.put(line)
        self._answers.put(None)

    def ask(self, do: str, **arguments: Any) -> Any:
        """The answer to one request; raises `ProcessFailed` for an error, a crash or silence."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            raise ProcessFailed(self._how_it_ended()) from None
        try:
            line = self._answers.get(timeout=self._time_limit)
        except queue.Empty:
            self.close()
            raise ProcessFailed(f"no answer within {self._time_limit:g} s; its process was ended") from None
        if line is None:
            raise ProcessFailed(self._how_it_ended())
        answer = json.loads(line)
        if "error" in answer:
            raise ProcessFailed(answer["error"])
        return answer["value"]

    @property
    def is_running(self) -> bool:
        """Whether the process can be asked."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the process."""
        if self.is_running:
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
        name = signal_name(code)
        if name is None:
            self._errors.seek(0)
            lines = self._errors.read().decode(errors="replace").strip().splitlines()
            return f"its process ended with exit code {code}" + (f": {lines[-1][:300]}" if lines else "")
        hint = "; the memory may not suffice" if name == "SIGKILL" else ""
        return f"its process ended with {name}{hint}"


def serve(receiver: object) -> None:
    """Answer requests with the methods of ``receiver`` until the input ends."""
    # Engines print as they like; the answers keep the pipe for themselves.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"value": getattr(receiver, request.pop("do"))(**request)}
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            answer = {"error": f"{type(error).__name__}: {text}".rstrip(".")}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
