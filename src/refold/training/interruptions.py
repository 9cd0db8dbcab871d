"""What ends a training from outside, and what Lightning would say beside it."""

from __future__ import annotations

import logging
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from refold.errors import InputError, RefoldError, first_line
from refold.training.processes import PeerEnded
from refold.training.settings import STATE, Settings

_PEER_ENDED = "Another process of the run ended; it says why."
_PEER_IS_GONE = ("Connection closed by peer", "Connection reset by peer", "NCCL")


@contextmanager
def interruptible(settings: Settings) -> Iterator[None]:
    """Lightning turns Ctrl-C and SIGTERM into an exit of the process; here it stays an interrupt.

    What ends a training from outside becomes an `InputError`, which says how to go on.
    """
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if in_main else None
    kept = (
        f" {settings.output} keeps the last whole epoch; go on with: refold train --resume {settings.output}"
    )
    try:
        yield
    except SystemExit as error:
        raise KeyboardInterrupt from error
    except (RefoldError, OSError, RuntimeError) as error:
        reason = _reason(error, settings)
        if reason is None:
            raise
        kind = PeerEnded if reason == _PEER_ENDED else InputError
        raise kind(reason + (kept if (settings.output / STATE).is_file() else "")) from error
    finally:
        if in_main:
            signal.signal(signal.SIGINT, handler)


def _reason(error: BaseException, settings: Settings) -> str | None:
    """Why a training cannot go on, where it is known and not a defect of the program."""
    said = str(error)
    if isinstance(error, RefoldError):
        return said
    if isinstance(error, OSError):
        return f"The training cannot go on: {error.strerror or error}."
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in said:
        size = settings.recipe.recipe.batch_size
        return (
            f"The memory does not hold this training at batch_size {size}; lower it, or raise --accumulate."
        )
    if "DataLoader worker" in said:
        return f"A process that prepares images was ended ({first_line(error)}); give fewer --workers."
    if settings.devices * settings.nodes > 1 and any(sign in said for sign in _PEER_IS_GONE):
        return _PEER_ENDED
    return None


@contextmanager
def lightning_quiet() -> Iterator[None]:
    """Keep Lightning's advice off the terminal; what concerns the run is said here."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning.*")
            for said in ("lr_scheduler.step", "all_reduce is deprecated"):
                warnings.filterwarnings("ignore", message=f".*{said}.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
