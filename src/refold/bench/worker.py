"""The worker process in which one model runs in one engine: `python -m refold.bench.worker`.

It reads one JSON request a line and answers with one JSON line, until its input ends. A crash, a hang or a lack of
memory then costs one row of a benchmark, and the memory that a model needs is that of this process.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refold.bench.execution import call_of, in_memory_format, milliseconds, set_up_cuda
from refold.export.apart import serve

PYTORCH = "pytorch"


class Worker:
    """Answers requests about one model in one engine."""

    def __init__(self) -> None:
        self._call: Callable[[], object] = lambda: None
        self._breakdown: Callable[[], dict[str, float] | None] = lambda: None
        self._memory_before: int | None = None
        self._device = "cpu"

    def open(
        self, engine: str, path: str, threads: int, shape: list[int], dtype: str, **pytorch: Any
    ) -> None:
        """Load a model: a pickled module for PyTorch, else a file that `refold.export` wrote for the engine.

        `pytorch` is how PyTorch runs it: the other fields of `refold.bench.ways.Way`, by default the usual.
        """
        torch.set_num_threads(threads)
        self._open(engine, path, threads, shape, dtype, **pytorch)
        # What is here stays; collecting between two turns then takes no time.
        gc.collect()
        gc.freeze()

    def _open(
        self, engine: str, path: str, threads: int, shape: list[int], dtype: str, **pytorch: Any
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        image = torch.randn(shape, generator=generator).to(getattr(torch, dtype))
        if engine == PYTORCH:
            self._open_pytorch(path, image, **pytorch)
            return
        from refold.bench.breakdown import PROFILERS
        from refold.export import get_engine

        backend = get_engine(engine)
        self._memory_before = _reset_peak_memory()
        session = backend.open(Path(path), threads=threads)
        self._call = lambda: session(image)
        if engine in PROFILERS:
            self._breakdown = lambda: PROFILERS[engine](Path(path), image, threads)

    def _open_pytorch(
        self,
        path: str,
        image: Tensor,
        precision: str = "float32",
        device: str = "cpu",
        execution: str = "eager",
        memory_format: str = "channels_first",
    ) -> None:
        from refold.bench.breakdown import profile_torch

        # The parent wrote this file a moment ago. Read without its data first, it imports the code that the model
        # needs, which is no memory of the model's.
        torch.load(path, map_location="meta", weights_only=False)
        self._device = device
        if device == "cuda":
            set_up_cuda(precision == "tf32")
        self._memory_before = _reset_peak_memory()
        model = torch.load(path, map_location=device, weights_only=False)
        model, image = in_memory_format(model, image.to(device), memory_format)
        self._call = call_of(model, image, execution)
        if execution == "eager":
            self._breakdown = lambda: profile_torch(model, image)

    def time(self, calls: int) -> float:
        """Milliseconds a call, the mean of `calls` in a row.

        One call before them is not counted: others ran meanwhile, and the caches hold their data.
        """
        gc.collect()
        with torch.inference_mode():
            self._call()
            return milliseconds(self._call, calls, self._device)

    def memory(self) -> int | None:
        """Bytes of resident memory at its peak since the model was opened, less what there was before.

        Of a model on a card, what PyTorch held there at the peak.
        """
        if self._device == "cuda":
            return torch.cuda.max_memory_allocated()
        peak = _status("VmHWM")
        return None if peak is None or self._memory_before is None else max(0, peak - self._memory_before)

    def breakdown(self) -> dict[str, float] | None:
        """Milliseconds a call by kind of operator; None for an engine that does not tell."""
        return self._breakdown()

    def roof(self, threads: int) -> dict[str, Any]:
        """The roofs of this machine with this many threads."""
        from refold.bench.roofline import measure_roof

        torch.set_num_threads(threads)
        return asdict(measure_roof())


def _reset_peak_memory() -> int | None:
    """Let the peak start at what is resident now, and return that; None where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return None
    return _status("VmRSS")


def _status(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    sizes = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(sizes[0]) * 1024 if sizes else None


if __name__ == "__main__":
    gc.disable()  # never in the middle of a call
    serve(Worker())
