"""Which form of parallel branches is the fastest for which layer: a cost rule, measured on a CPU.

`benchmarks/training_step.py layers` measures every layer in every form. Three branches, batch 16, float32, channels
last, one x86 thread, time of the moments form against the loop, and whether the rule takes it; `one branch` is a single
convolution with its batch norm, the floor:

| layer | side of the map | moments / loop | one branch / loop | taken |
|---|---|---|---|---|
| 1x1, 24 to 36 ... 24 to 144 | 56 | 0.28-0.43 | 0.26-0.30 | yes |
| 1x1, 48 to 12 | 56 | 0.49-0.54 | 0.33 | yes |
| 1x1, 20 to 60, 40 to 120, 128 to 128 | 28 | 0.61-0.71 | 0.29-0.36 | yes |
| 1x1, 72 to 20, 120 to 40 | 28 | 1.13-1.16 | 0.36-0.38 | no |
| 1x1, 240 to 40, 480 to 56, 960 to 80 | 14, 14, 7 | 2.1-7.7 | 0.38-0.44 | no |
| depthwise 3x3 (and 1x1, and skip) | 112, 56 | 0.26-0.66 | 0.14-0.32 | yes |
| depthwise 3x3 (and 1x1, and skip), 60 to 192 channels | 28 | 0.54-0.88 | 0.21-0.27 | yes |
| depthwise 3x3 (and 1x1, and skip), 384 channels | 14 | 0.85-0.98 | 0.19-0.23 | yes |
| depthwise 3x3 (and 1x1, and skip), fewer channels or smaller maps | 14, 7 | 0.9-4.4 | 0.14-0.38 | no |
| depthwise 3x3 with stride 2, 48 channels | 112 | 0.55-0.64 | 0.13-0.19 | yes |
| depthwise 3x3 with stride 2, 96, 144 channels | 112, 56 | 0.87-0.93 | 0.13-0.18 | yes |
| depthwise 3x3 with stride 2, fewer values or smaller maps | 56 to 14 | 1.3-1.9 | 0.21-0.37 | no |
| depthwise 5x5 with stride 2 | 56 to 14 | 1.3-1.9 | 0.15-0.28 | no |
| dense 3x3 beside 1x1 and skip | 14 to 56 | 1.1-1.2 | 0.73-0.84 | no |

Where many channels become few, the covariance of the input costs more than the branches do; on small maps the work
that does not depend on the size of the map outweighs what is saved; dense 3x3 kernels see too many values for their
covariance, and what can be saved beside them is little.

The stacked form was never the fastest on a CPU: adding its parts costs more than it saves.
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
