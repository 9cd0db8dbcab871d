"""The free choices of a network: changes of layers after each other that leave what they compute as it is.

Between a layer that writes values and one that reads them, with nothing but sums in between, any invertible matrix and
any shift can stand, and its inverse behind it; with ReLU, PReLU or pooling in between, any positive scale of each
channel. The function is the same and the values in between are others. They are chosen for what is not exact about a
network: here its rounding to integers.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from refold.algebra.convolution import Convolution, affine
from refold.algebra.operations import series
from refold.errors import NotFoldable

# Smaller weights are none; and powers of two that no channel needs more of.
_TINY, _MOST = 1e-30, 12


def mix_outputs(convolution: Convolution, matrix: Tensor, shift: Tensor | None = None) -> Convolution:
    """`matrix @ convolution(x) + shift` over the channels, for a `matrix` `[out_channels, out_channels]`.

    Raises NotFoldable where the convolution has groups: channels of two groups would be mixed.
    """
    _require_dense(convolution)
    weight = (matrix @ convolution.weight.flatten(1)).reshape(convolution.weight.shape)
    bias = None if convolution.bias is None else matrix @ convolution.bias
    if shift is not None:
        bias = shift if bias is None else bias + shift
    return replace(convolution, weight=weight, bias=bias)


def unmix_inputs(convolution: Convolution, matrix: Tensor, shift: Tensor | None = None) -> Convolution:
    """The convolution of `matrix @ x + shift` that gives what `convolution` gives of `x`.

    `matrix` is `[in_channels, in_channels]` and invertible, `shift` `[in_channels]`. Raises NotFoldable where the
    convolution has groups, or a shift meets padding, whose zeros are not shifted.
    """
    _require_dense(convolution)
    if shift is not None and any(map(any, convolution.padding)):
        raise NotFoldable("a shift does not reach the zeros of the padding")
    rows = convolution.weight.movedim(1, -1)
    weight = torch.linalg.solve(matrix.T, rows.reshape(-1, rows.shape[-1]).T).T
    # Strides as usual: others would be taken for another layout of the images.
    weight = weight.reshape(rows.shape).movedim(-1, 1).clone(memory_format=torch.contiguous_format)
    bias = convolution.bias
    if shift is not None:
        moved = weight.flatten(2).sum(2) @ shift if weight.dim() > 2 else weight @ shift
        bias = -moved if bias is None else bias - moved
    return replace(convolution, weight=weight, bias=bias)


def unscale_inputs(convolution: Convolution, scale: Tensor) -> Convolution:
    """The convolution of `scale * x` that gives what `convolution` gives of `x`; no `scale`, `[in_channels]`, is 0."""
    return series(affine(1 / scale, None, convolution.spatial_axes), convolution)


def largest_of_outputs(convolution: Convolution) -> Tensor:
    """The size of the largest weight that writes each channel, `[out_channels]`."""
    return convolution.weight.flatten(1).abs().amax(1)


def largest_of_inputs(convolution: Convolution) -> Tensor:
    """The size of the largest weight that reads each channel, `[in_channels]`."""
    groups = convolution.groups
    outputs, inputs = convolution.weight.shape[:2]
    taps = convolution.weight.abs().reshape(groups, outputs // groups, inputs, -1)
    return taps.amax(dim=(1, 3)).flatten()


def balancing(written: Tensor, read: Tensor) -> Tensor:
    """The scale of each channel that makes its largest weights, `written` and `read` `[channels]`, alike.

    That is √(read / written) (Nagel et al. 2019, eq. 11), here the nearest power of two, which rounds nothing in any
    precision; one where either has no weights.
    """
    ratio = torch.where((written > 0) & (read > 0), read / written.clamp_min(_TINY), 1.0)
    return torch.exp2((ratio.log2() / 2).round().clamp(-_MOST, _MOST))


def rotation(channels: int, like: Tensor, seed: int = 0) -> Tensor:
    """A rotation `[channels, channels]` drawn by a seed, in the dtype of `like`: it spreads outliers over channels."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(channels, channels, dtype=torch.float64, generator=generator)
    orthogonal, triangle = torch.linalg.qr(drawn)
    turned: Tensor = orthogonal * triangle.diagonal().sign()
    return turned.to(like.dtype)


def _require_dense(convolution: Convolution) -> None:
    if convolution.groups != 1:
        raise NotFoldable(f"{convolution.groups} groups of channels cannot be mixed with each other")
