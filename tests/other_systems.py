"""Run in a process of its own: what refold imports and does where Linux's own modules and functions are missing."""

import builtins
import contextlib
import ctypes
import io
import os
import pkgutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

# What refold stands on is there on every system in a build of its own; only refold is to go without.
import lightning.pytorch
import matplotlib.pyplot
import onnx
import onnxruntime
import onnxscript
import psutil
import sklearn
import timm
import torch
import torch.onnx
import torchvision
import typer
from torch.distributed.launcher import api

for engine in ("openvino", "ncnn", "MNN"):
    with contextlib.suppress(ModuleNotFoundError):
        import_module(engine)

_ONLY_UNIX = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "termios", "tty"}
_MISSING = {
    os: ("fork", "getuid", "killpg", "register_at_fork", "sched_getaffinity", "setsid", "sysconf", "uname"),
    signal: ("SIGHUP", "SIGKILL", "SIGQUIT", "SIGUSR1"),
}
_READY = (
    api,
    lightning,
    matplotlib,
    onnx,
    onnxruntime,
    onnxscript,
    psutil,
    sklearn,
    timm,
    torchvision,
    typer,
)


@contextlib.contextmanager
def elsewhere(platform: str) -> Iterator[None]:
    """Let refold find itself on another system; what comes with Python and other packages stays as it is."""
    real_import, real_open, real_library = builtins.__import__, io.open, ctypes.CDLL
    real_path = Path.open

    def imported(name: str, globals: Any = None, *others: Any, **named: Any) -> Any:
        if name in _ONLY_UNIX and str((globals or {}).get("__name__")).startswith("refold"):
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
        return real_import(name, globals, *others, **named)

    def opened(file: Any, *others: Any, **named: Any) -> Any:
        if str(file).startswith("/proc/"):
            raise FileNotFoundError(file)
        return real_open(file, *others, **named)

    def opened_path(path: Path, *others: Any, **named: Any) -> Any:
        if str(path).startswith("/proc/"):
            raise FileNotFoundError(path)
        return real_path(path, *others, **named)

    def library(name: Any, *others: Any, **named: Any) -> Any:
        if name is None:
            raise TypeError("argument of type 'NoneType' is not iterable")
        return real_library(name, *others, **named)

    taken = [(owner, name, getattr(owner, name)) for owner, names in _MISSING.items() for name in names]
    kept = sys.platform
    for owner, name, _ in taken:
        delattr(owner, name)
    builtins.__import__, io.open, ctypes.CDLL = imported, opened, library  # type: ignore[assignment,misc]
    Path.open = opened_path  # type: ignore[method-assign]  # what pathlib reads with differs from version to version
    sys.platform = platform  # type: ignore[misc]
    try:
        yield
    finally:
        Path.open = real_path  # type: ignore[method-assign]
        sys.platform = kept  # type: ignore[misc]
        builtins.__import__, io.open, ctypes.CDLL = real_import, real_open, real_library  # type: ignore[misc]
        for owner, name, value in taken:
            setattr(owner, name, value)


def import_everything() -> int:
    """Import each module; only a package of an engine that is not installed may be missing."""
    import refold
    from refold.export.engines import FORMATS

    optional = {package for form in FORMATS.values() for package in form.needs} | {"flatbuffers"}
    count = 0
    for module in pkgutil.walk_packages(refold.__path__, "refold."):
        if module.name.endswith("__main__"):
            continue
        try:
            import_module(module.name)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in optional:
                raise
        count += 1
    return count


def do_something() -> None:
    """Call what asks the system for something."""
    import refold
    from refold.bench.machine import this_machine
    from refold.bench.worker import _reset_peak_memory
    from refold.export.converting import silent_stdout
    from refold.files import write_text
    from refold.recording.precision import release_memory
    from refold.training.lock import locked

    with tempfile.TemporaryDirectory() as folder:
        release_memory()
        with silent_stdout():
            print("nobody reads this", file=sys.__stdout__, flush=True)
        write_text(Path(folder) / "a.txt", "a")
        write_text(Path(folder) / "a.txt", "b")
        with locked(Path(folder) / "run"):
            pass
        assert _reset_peak_memory() is None
        assert this_machine().cores > 0
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).eval()
        plain = refold.fold(model, torch.randn(1, 3, 8, 8))
        refold.save(plain, Path(folder) / "plain.safetensors")
        # The file stands where the loaded network may still be mapped from it.
        loaded = refold.load(Path(folder) / "plain.safetensors", lambda: model)
        refold.save(loaded, Path(folder) / "plain.safetensors")


def main() -> None:
    with elsewhere(sys.argv[1]):
        count = import_everything()
        do_something()
    print(f"imported {count} modules")


if __name__ == "__main__":
    main()
