"""Measuring latency, several candidates side by side."""

from refold.bench.latency import Latency, measure_latency, torch_threads

__all__ = ["Latency", "measure_latency", "torch_threads"]
