"""Measuring side by side: latency, memory, where the time goes, and how far from the roof."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from refold.bench.latency import measure_latency, torch_threads
from refold.bench.timing import Timing

if TYPE_CHECKING:
    from refold.bench.results import Benchmark, Configuration, Measurement
    from refold.bench.runner import BenchmarkInterrupted, benchmark
    from refold.bench.tables import save_benchmark, to_csv, to_markdown, to_rich

__all__ = [
    "Benchmark",
    "BenchmarkInterrupted",
    "Configuration",
    "Measurement",
    "Timing",
    "benchmark",
    "measure_latency",
    "save_benchmark",
    "to_csv",
    "to_markdown",
    "to_rich",
    "torch_threads",
]

# Loaded when first used: the process in which a model runs needs none of what prepares it.
_HOME = {
    **dict.fromkeys(("Benchmark", "Configuration", "Measurement"), "refold.bench.results"),
    **dict.fromkeys(("BenchmarkInterrupted", "benchmark"), "refold.bench.runner"),
    **dict.fromkeys(("save_benchmark", "to_csv", "to_markdown", "to_rich"), "refold.bench.tables"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'refold.bench' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)
