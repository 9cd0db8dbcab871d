"""Which form of parallel branches is the fastest for which layer: a cost rule, measured on a CPU.

`docs/training-step.md` has the layers that it was measured on, and what bounds each kind. In short: where many channels
become few, the covariance of the input costs more than the branches do; on small maps the work that does not depend on
the size of the map outweighs what is saved; dense 3x3 kernels see too many values for their covariance; and a single
1x1 kernel beside a skip has little to share.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from refold.blocks.parallel.branch import Geometry

Part = Literal["neighbourhood", "pointwise", "spatial"]


def choose(
    geometry: Geometry, x: Tensor, part: Part, branches: int, skip: bool
) -> Literal["looped", "stacked", "moments"]:
    """The form for one part of a layer on the map `x`, `[batch, channels, height, width]`.

    The parts are `neighbourhood`, all branches of a depthwise layer that sees 3x3 pixels; `pointwise`, the 1x1
    branches alone, `branches` in number; and `spatial`, those with larger kernels, alone. `skip` says that a batch
    norm of the input belongs to the part. On devices other than a CPU, where nothing was measured, it is the loop.
    """
    if part == "spatial" or x.device.type != "cpu" or branches + skip < 2:
        return "looped"
    if part == "neighbourhood" and geometry.stride != (1, 1):
        # What pays is to write one gradient of the input instead of several, where it is larger than any cache.
        return "moments" if geometry.kernel_size == (3, 3) and x.numel() > 6_000_000 else "looped"
    if part == "neighbourhood":
        # In units of one branch: constant work for each pixel, for the border, and for each call.
        pays = 1.5 + 38 / min(x.shape[2:]) + 800_000 / x.numel() < branches + skip
        return "moments" if pays else "looped"
    if branches < 2:
        return "looped"
    positions = x.shape[0] * x.shape[2] * x.shape[3] // (geometry.stride[0] * geometry.stride[1])
    inputs, outputs, each = (
        geometry.in_channels,
        geometry.out_channels,
        geometry.in_channels // geometry.groups,
    )
    # In multiply-accumulates for each position: three passes of the convolution; what a batch norm costs for each
    # channel, more where maps do not fit the cache; the covariance, forward and backward, and its passes.
    norm = 300 if positions >= 32_768 else 100
    loop = branches * outputs * (3 * each + norm) + skip * inputs * norm
    moments = 3 * each * outputs + 2 * each * inputs + 200 * inputs
    if geometry.groups == 1 and not skip and positions >= 32_768 and 4 * branches * outputs <= 3 * inputs:
        # What all branches write is less than the input, of which one convolution reads and writes less than several.
        return "stacked"
    return "moments" if moments < loop and positions >= 8 * each else "looped"
