"""Running a PyTorch module as a benchmark asks, compiled or as a CUDA graph, and timing it on its device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Call = Callable[[], object]


def set_up_cuda(tf32: bool) -> None:
    """Let products of float32 numbers be those or TF32's, convolutions too, and cuDNN choose by the clock.

    PyTorch's own defaults differ: cuDNN's convolutions are in TF32 and matrix products are not.
    """
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = True


def in_memory_format(model: nn.Module, image: Tensor, memory_format: str) -> tuple[nn.Module, Tensor]:
    """The model and its images with the channels first or last in memory."""
    if memory_format != "channels_last":
        return model, image
    layout = torch.channels_last
    return model.to(memory_format=layout), image.to(memory_format=layout)


def call_of(model: nn.Module, image: Tensor, execution: str) -> Call:
    """The call that is timed: the module's, that of what `torch.compile` makes of it, or the replay of a CUDA graph."""
    if execution == "graphs":
        return _Graph(lambda: model(image))
    if execution == "compiled":
        model.compile(dynamic=False)
    return lambda: model(image)


class _Graph:
    """A call as a CUDA graph. It holds what its kernels read and write, which must not be freed."""

    def __init__(self, call: Call) -> None:
        self._call = call
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.inference_mode():
            # What happens once, such as cuDNN's choice of algorithms, cannot be part of a graph.
            with torch.cuda.stream(stream):
                for _ in range(3):
                    call()
            torch.cuda.current_stream().wait_stream(stream)
            self._graph: Any = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._output = call()

    def __call__(self) -> object:
        self._graph.replay()
        return self._output


def milliseconds(call: Call, calls: int, device: str) -> float:
    """The mean of `calls` in a row: by the clock on the CPU, by the events of the card there."""
    if device == "cpu":
        start = time.perf_counter_ns()
        for _ in range(calls):
            call()
        return (time.perf_counter_ns() - start) / 1e6 / calls
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    before.record()
    for _ in range(calls):
        call()
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after)) / calls
