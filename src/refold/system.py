"""What differs between operating systems."""

from __future__ import annotations

import ctypes
import signal
import sys


def c_library() -> ctypes.CDLL | None:
    """The C library that this process runs with; None where it cannot be had."""
    try:
        return ctypes.CDLL("ucrtbase" if sys.platform == "win32" else None)
    except (OSError, TypeError):
        return None


def signal_name(code: int) -> str | None:
    """The signal that ended a process of this exit code; None where none did, as always on Windows."""
    try:
        return signal.Signals(-code).name if code < 0 else None
    except ValueError:
        return f"signal {-code}"
