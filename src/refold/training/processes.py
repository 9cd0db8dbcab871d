"""The processes of one run: which of them this one is, and starting them where torchrun did not."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch.distributed import is_torchelastic_launched
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.multiprocessing import get_context

from refold.errors import InputError, RefoldError, first_line
from refold.system import signal_name

# Seconds between two looks at the processes.
_INTERVAL = 0.1
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
        config = LaunchConfig(
            min_nodes=nodes,
            max_nodes=nodes,
            nproc_per_node=devices,
            run_id="refold",
            max_restarts=0,
            monitor_interval=_INTERVAL,
            # Started anew: a fork of a process in which a backward pass ran cannot run one.
            start_method="spawn",
            logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
            **_meeting(nodes),
        )
        # The launcher passes errors on as text; what was raised comes this way.
        raised = get_context("spawn").SimpleQueue()
        try:
            with _quiet(), _signals_restored():
                answers = elastic_launch(config, _enter)(raised, work, arguments)
        except SignalException:
            raise KeyboardInterrupt from None
        except ChildFailedError as error:
            said = []
            while not raised.empty():
                said.append(raised.get())
            for reason in sorted(said, key=lambda each: isinstance(each, PeerEnded)):
                raise reason from None
            rank, failure = error.get_first_failure()
            how = signal_name(failure.exitcode) or f"exit code {failure.exitcode}"
            raise InputError(f"Process {rank} of {devices * nodes} was ended from outside ({how}).") from None
        return answers.get(0)


def _meeting(nodes: int) -> dict[str, Any]:
    """Where the launchers of all machines find each other, in the words of `LaunchConfig`."""
    if sys.platform == "win32":
        os.environ.setdefault("USE_LIBUV", "0")  # PyTorch for Windows is built without it
    if nodes == 1:
        return {"rdzv_backend": "c10d", "rdzv_endpoint": "127.0.0.1:0", "local_addr": "127.0.0.1"}
    missing = [name for name in _MEETING if name not in os.environ]
    if missing:
        raise InputError(
            f"{nodes} machines find each other by {', '.join(_MEETING)}; set {', '.join(missing)} on each, or "
            "start with torchrun."
        )
    address, port, node = (os.environ[name] for name in _MEETING)
    if not 0 <= int(node) < nodes:
        raise InputError(f"NODE_RANK is {node}; the {nodes} machines are numbered from 0.")
    return {
        "rdzv_backend": "static",
        "rdzv_endpoint": f"{address}:{port}",
        "rdzv_configs": {"rank": int(node)},
    }


def _enter(raised: Any, work: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    try:
        answer = work(*arguments)
    except PeerEnded as error:
        raised.put(error)
        # The process that this one missed has to be noticed first.
        time.sleep(10 * _INTERVAL)
        raise SystemExit(2) from None
    except (RefoldError, KeyboardInterrupt) as error:
        raised.put(error)
        raise SystemExit(2) from None
    except Exception as error:
        # As text: not every exception survives the way, and the place in the program would be lost.
        raised.put(RuntimeError(f"{first_line(error)}\n{traceback.format_exc()[-10_000:]}"))
        raise SystemExit(1) from None
    return answer if os.environ["RANK"] == "0" else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the launcher's log off the terminal; what ends the processes is said once, by its exception."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def _signals_restored() -> Iterator[None]:
    """Put back the handlers of the signals that the launcher takes over and keeps."""
    taken = [
        getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT") if hasattr(signal, name)
    ]
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in taken}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
