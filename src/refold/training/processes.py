"""The processes of one run: which of them this one is, and starting them where torchrun did not."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch.distributed import is_torchelastic_launched
from torch.multiprocessing import get_context
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes

from refold.errors import InputError, RefoldError

_GRACE = 5.0
_MEETING = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")


class PeerEnded(InputError):
    """Another process of the run ended, which knows the reason."""


@dataclass(frozen=True)
class Place:
    """This process, the ``rank``-th from 0, among those of ``nodes`` machines with ``devices`` processes each."""

    rank: int = 0
    devices: int = 1
    nodes: int = 1

    @property
    def processes(self) -> int:
        """How many processes there are on all machines."""
        return self.devices * self.nodes

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0


class Launcher(Protocol):
    """What brings a run into the processes that it trains in."""

    def place(self) -> Place | None:
        """Where this process is among those of a run; None where they are still to be started."""

    def start(self, work: Callable[..., Any], arguments: tuple[Any, ...], *, devices: int, nodes: int) -> Any:
        """Call ``work`` in ``devices`` processes on this machine, which find their `place`; what the first one gave."""


class ProcessLauncher:
    """Takes the processes that torchrun started, and starts them itself where it did not."""

    def place(self) -> Place | None:
        """The place that torchrun, or `start`, gave this process.

        Raises `InputError` where the machines do not have equally many processes.
        """
        if not is_torchelastic_launched():
            return None
        rank, processes, devices = (
            int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
        )
        if processes % devices:
            raise InputError(
                f"torchrun started {devices} of {processes} processes here; start equally many on each machine."
            )
        return Place(rank, devices, processes // devices)

    def start(self, work: Callable[..., Any], arguments: tuple[Any, ...], *, devices: int, nodes: int) -> Any:
        """Call ``work`` in ``devices`` new processes, which find their `place`, and return what the first gave.

        With several ``nodes`` the same is called on each, where MASTER_ADDR, MASTER_PORT and NODE_RANK name the meeting
        point and the machine; what the first process gave is returned on its machine, elsewhere None.
        Raises what a process raised of `RefoldError`, and `InputError` where a process was ended from outside. The
        other processes are ended then.
        """
        environment, first_rank = _environment(devices, nodes)
        # Started anew: a fork of a process in which a backward pass ran cannot run one.
        context = get_context("spawn")
        logging.getLogger("torch.multiprocessing.spawn").setLevel(
            logging.ERROR
        )  # what ends them is said once
        answers = context.SimpleQueue()
        with _ended_by_sigterm():
            running = start_processes(
                _enter,
                (first_rank, environment, answers, work, arguments),
                nprocs=devices,
                join=False,
                start_method="spawn",
            )
            try:
                while not running.join(grace_period=_GRACE):
                    pass
            except (ProcessExitedException, ProcessRaisedException) as error:
                said = []
                while not answers.empty():
                    said.append(answers.get())
                for answer in said:
                    if isinstance(answer, BaseException) and not isinstance(answer, PeerEnded):
                        raise answer from None
                if isinstance(error, ProcessExitedException):
                    raise InputError(
                        f"Process {first_rank + error.error_index} of {devices * nodes} was ended from outside "
                        f"({error.signal_name or f'exit code {error.exit_code}'})."
                    ) from None
                raise
            finally:
                _end(running.processes)
        return answers.get() if first_rank == 0 else None


def _environment(devices: int, nodes: int) -> tuple[dict[str, str], int]:
    """What torchrun would set, and the rank of the first process of this machine."""
    if nodes == 1:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        node = 0
    else:
        missing = [name for name in _MEETING if name not in os.environ]
        if missing:
            raise InputError(
                f"{nodes} machines find each other by {', '.join(_MEETING)}; set {', '.join(missing)} on each, or "
                "start with torchrun."
            )
        meeting = {name: os.environ[name] for name in _MEETING[:2]}
        node = int(os.environ["NODE_RANK"])
        if not 0 <= node < nodes:
            raise InputError(f"NODE_RANK is {node}; the {nodes} machines are numbered from 0.")
    return {
        **meeting,
        "WORLD_SIZE": str(devices * nodes),
        "LOCAL_WORLD_SIZE": str(devices),
        "GROUP_RANK": str(node),
        "TORCHELASTIC_RUN_ID": "refold",
    }, node * devices


def _enter(
    local_rank: int,
    first_rank: int,
    environment: dict[str, str],
    answers: Any,
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    rank = first_rank + local_rank
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(local_rank))
    try:
        answer = work(*arguments)
    except (RefoldError, KeyboardInterrupt) as error:
        answers.put(error)
        raise SystemExit(2) from None
    if rank == 0:
        answers.put(answer)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _end(processes: list[Any]) -> None:
    deadline = time.monotonic() + _GRACE
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the processes as Ctrl-C does, not leave them behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
