"""The roofline: what this machine can do at best, and what a network must do at least."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from refold.bench.machine import Roof
from refold.bench.results import Work

_MATRIX_SIDES = (256, 512, 1024)
# Bytes of the buffer that is copied: from what the innermost caches hold to what none holds.
_COPIED = tuple(2**exponent for exponent in range(16, 29, 2))


def measure_roof(seconds: float = 0.15) -> Roof:
    """Measure the peak rate of float32 matrix products and of copies, with the threads that PyTorch has now.

    Each product and each copy runs for about `seconds`, and the best call counts. Products are tried in PyTorch, in
    NumPy and as 1x1 convolutions, because their libraries differ in which processors they know well: with weights in
    the layout of oneDNN, which inference engines use too, convolutions were twice as fast as matrix products.
    """
    flops = 0.0
    for side in _MATRIX_SIDES:
        a, b = torch.randn(side, side), torch.randn(side, side)
        image, weight = a.reshape(1, side, side, 1), b.reshape(side, side, 1, 1)
        products: list[Callable[[], object]] = [
            partial(torch.mm, a, b),
            partial(np.matmul, a.numpy(), b.numpy()),
            partial(nn.functional.conv2d, image, weight),
        ]
        if torch.backends.mkldnn.is_available():
            packed = torch.ops.aten.mkldnn_reorder_conv2d_weight(weight.to_mkldnn())
            products.append(partial(nn.functional.conv2d, image.to_mkldnn(), packed))
        with torch.inference_mode():
            rate = 2 * side**3 / min(_best(product, seconds) for product in products)
        flops = max(flops, rate)
    bandwidth = []
    for size in _COPIED:
        source, target = torch.ones(size // 4), torch.zeros(size // 4)
        rate = 2 * size / _best(partial(target.copy_, source), seconds)  # read once and written once
        bandwidth.append((2 * size, rate))
    return Roof(flops, tuple(bandwidth))


def least_work(model: nn.Module, example_input: Tensor, roof: Roof | None = None) -> Work:
    """The floating-point operations and bytes that no engine can avoid, and the time they need at the roofs.

    Counted are convolutions and matrix products, two operations a multiply-accumulate, and what each must read
    (input, weight, bias) and write once; everything between them might be fused into them. The floor is the sum
    over these layers of the longer of computing and moving. `model` and input are untouched; nothing is computed.
    """
    # One deep copy on the meta device: shapes flow, no arithmetic runs.
    shadow = copy.deepcopy(model).to("meta").eval()
    with torch.no_grad(), _Layers() as layers:
        shadow(example_input.to("meta"))
    floor = None
    if roof is not None:
        floor = 1000 * sum(
            max(flops / roof.flops, moved / roof.bandwidth_at(moved)) for flops, moved in layers.found
        )
    return Work(
        flops=sum(flops for flops, _ in layers.found),
        bytes=sum(moved for _, moved in layers.found),
        floor=floor,
    )


class _Layers(TorchDispatchMode):
    """Collects operations and bytes of every convolution and matrix product that runs."""

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.found: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            self.found.append((count(*args, **kwargs, out_val=result), moved))
        return result


def _best(call: Callable[[], object], seconds: float) -> float:
    """Seconds of the fastest of the calls that fit into `seconds`, three at least."""
    best, end, calls = float("inf"), time.perf_counter() + seconds, 0
    while calls < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
        calls += 1
    return best
