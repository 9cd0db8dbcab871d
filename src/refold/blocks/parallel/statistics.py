"""Mean and covariance of what a convolution's taps see, from its input alone.

A branch `y = W x` has batch mean `W m` and batch variance `diag(W S Wᵀ)`, where `m` and `S` are the mean and the
covariance of the values under the taps. They are computed once for all branches, and the only tensor of the size of
the map that is kept for the backward pass is the input itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# What is worked on at a time: 4 MB was faster than 2 MB and than whole batches on a CPU with 1 MB of cache a core.
_CHUNK_BYTES = 4_000_000

Moments = tuple[Tensor, Tensor]
"""Mean `[groups, taps]` and covariance `[groups, taps, taps]` (divided by the number of positions)."""


def pointwise_moments(x: Tensor, groups: int, kept: Tensor) -> tuple[Tensor, Moments]:
    """`x` to go on with, and the moments of the input channels of each group, as a 1x1 convolution sees them.

    `x` is `[batch, channels, height, width]` in float32 or float64, and not under autocast. Differentiable; of all that
    is as large as the map it keeps `kept` alone: `x`, or the narrower tensor that `x` was cast from. The gradient of
    what is returned of `x` must be new memory, since the moments' own is added to it in place.
    """
    through, mean, covariance = _PointwiseMoments.apply(x, groups, kept)
    return through, (mean, covariance)


def neighbourhood_moments(x: Tensor, kept: Tensor) -> tuple[Tensor, Moments]:
    """`x` to go on with, and the moments of the nine zero-padded neighbours of each position, channel by channel.

    This is what a depthwise 3x3 convolution with stride 1 and padding 1 sees: `groups` is the number of channels and
    the taps are in the order of its kernel. `x` and `kept` are as for `pointwise_moments`; the border of the map is
    kept too.

    The nine by nine covariances are lags of the autocorrelation of the map; only products of two taps in the same row
    (column) of the kernel miss a row (column) at the border.
    """
    through, lags, total, centre, rows, columns = _Lags.apply(x, kept)
    return through, _from_lags(lags, total, centre, rows, columns, batch=x.shape[0])


def add_gradient(grad: Tensor, kept: Tensor, of_images: Callable[[Tensor], Tensor]) -> Tensor:
    """Add what `of_images` makes of some images of `kept` at a time, in the dtype of `grad`."""
    with torch.autocast(kept.device.type, enabled=False):
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            # Neither a compiler nor second derivatives allow changes in place here.
            return grad + of_images(kept.to(grad.dtype))
        size = images_at_a_time(kept)
        for images, part in zip(kept.split(size), grad.split(size), strict=True):
            part += of_images(images.to(grad.dtype))
    return grad


class _PointwiseMoments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean = x.mean((0, 2, 3))
        # Centred before it is squared: else a mean far larger than the deviation would eat all digits.
        centred = x - mean[:, None, None]
        covariance = _gram(centred, groups) / (x.shape[0] * x.shape[2] * x.shape[3])
        mean = mean.reshape(groups, -1)
        ctx.save_for_backward(kept, mean)
        ctx.groups = groups
        return x.view_as(x), mean, covariance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        kept, mean = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None, None
        grad, grad_mean, grad_covariance = gradients
        positions = kept.shape[0] * kept.shape[2] * kept.shape[3]
        weight = (grad_covariance + grad_covariance.transpose(1, 2)) / positions
        bias = grad_mean / positions - (weight @ mean.unsqueeze(-1)).squeeze(-1)
        kernel, level = weight.flatten(0, 1)[..., None, None], bias.flatten()

        def of_images(images: Tensor) -> Tensor:
            if ctx.groups == len(kernel):  # for which PyTorch has a slow convolution only
                return torch.addcmul(level[:, None, None], images, kernel[:, 0])
            return F.conv2d(images, kernel, level, groups=ctx.groups)

        return add_gradient(grad, kept, of_images), None, None


def _gram(x: Tensor, groups: int) -> Tensor:
    """Sums of products of the channels in each group over batch and positions."""
    if groups == x.shape[1]:
        return x.square().sum((0, 2, 3)).reshape(-1, 1, 1)
    if groups == 1 and x.is_contiguous(memory_format=torch.channels_last):
        matrix = x.permute(0, 2, 3, 1).flatten(0, 2)
        return (matrix.T @ matrix).unsqueeze(0)
    maps = x.flatten(2).unflatten(1, (groups, -1))
    sums: Tensor = (maps @ maps.transpose(2, 3)).sum(0)
    return sums


class _Lags(torch.autograd.Function):
    """The centred map's autocorrelation at lags (0..2, -2..2), its sum over the batch, its mean and its border."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor) -> tuple[Tensor, ...]:
        total = sum_over_batch(x)
        centre = total.mean((1, 2)) / x.shape[0]
        canvas = _Canvas(x)
        lags = x.new_zeros(x.shape[1], 3, 5)
        for images in x.split(images_at_a_time(x)):
            # A lag product is the weight gradient of a depthwise convolution of the map with itself; two 3x3 kernels
            # cover the 3x5 lags, since libraries have fast code for that size only.
            first, *others = canvas.shifted(images, centre)
            left, right = (_weight_gradient(first, other) for other in others)
            lags += torch.cat([left[..., :2], right], -1)
        level = centre[:, None]
        rows = torch.stack([x[:, :, 0] - level, x[:, :, -1] - level])
        columns = torch.stack([x[..., 0] - level, x[..., -1] - level])
        ctx.save_for_backward(kept, centre)
        ctx.mark_non_differentiable(centre)
        return x.view_as(x), lags, total, centre, rows, columns

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        kept, centre = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None
        grad, grad_lags, grad_total, _, grad_rows, grad_columns = gradients
        half = F.pad(grad_lags, (0, 0, 2, 0))
        kernel = (half + half.flip(1, 2)).unsqueeze(1)
        flat = centre[:, None, None].expand_as(grad_total).unsqueeze(0)
        with torch.autocast(kept.device.type, enabled=False):
            level = F.conv2d(flat, kernel, padding=2, groups=len(kernel))
        # In the order of memory: adding tensors of unlike layouts takes many times as long.
        image = torch.empty_like(kept[:1], dtype=kernel.dtype).copy_(grad_total - level)

        def of_images(images: Tensor) -> Tensor:
            return F.conv2d(images, kernel, padding=2, groups=len(kernel)).add_(image)

        grad = add_gradient(grad, kept, of_images)
        grad[:, :, 0] += grad_rows[0]
        grad[:, :, -1] += grad_rows[1]
        grad[..., 0] += grad_columns[0]
        grad[..., -1] += grad_columns[1]
        return grad, None


def sum_over_batch(x: Tensor) -> Tensor:
    """The sum over the first axis, in the order of memory: any other takes many times as long."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).sum(0).permute(2, 0, 1)
    return x.sum(0)


def images_at_a_time(x: Tensor) -> int:
    """How many images are worked on at a time, so that maps in between stay in the cache."""
    return max(1, _CHUNK_BYTES // max(1, x[0].numel() * 4))


class _Canvas:
    """Memory for some centred images of `x`'s shape, each with two more rows and columns of zeros.

    The channels come last in it, in which layout depthwise kernels are several times faster on a CPU.
    """

    def __init__(self, x: Tensor) -> None:
        batch, channels, self._height, self._width = x.shape
        self._lead = self._width + 3
        positions = self._positions(min(batch, images_at_a_time(x)))
        self._memory = x.new_zeros(self._lead + positions, channels)

    def _positions(self, images: int) -> int:
        return images * (self._height + 2) * (self._width + 2)

    def shifted(self, x: Tensor, centre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The centred images with their first pixel at row and column (1, 1), (0, 2) and (0, 0).

        All are views of one memory: what is a column behind one row is a column before the next.
        """
        shape = (x.shape[0], self._height + 2, self._width + 2, x.shape[1])
        positions = self._positions(x.shape[0])
        one, two, three = (
            self._memory[start : start + positions].view(shape).permute(0, 3, 1, 2)
            for start in (0, self._lead - 2, self._lead)
        )
        torch.sub(x, centre[:, None, None], out=three[:, :, : self._height, : self._width])
        return one, two, three


def _weight_gradient(output: Tensor, padded: Tensor) -> Tensor:
    channels = output.shape[1]
    weight = output.new_empty(channels, 1, 3, 3)
    mask = [False, True, False]
    gradient = torch.ops.aten.convolution_backward(
        output, padded, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], channels, mask
    )[1]
    return gradient.squeeze(1)  # type: ignore[no-any-return]  # an operator without a stub


def _from_lags(
    lags: Tensor, total: Tensor, centre: Tensor, rows: Tensor, columns: Tensor, batch: int
) -> Moments:
    """Put the moments together from sums; every tensor here is small."""
    channels, height, width = total.shape
    positions = batch * height * width
    corners = rows[..., :: max(width - 1, 1)]
    corners = corners.expand(-1, -1, -1, 2)
    squares = corners.square().sum(1).permute(1, 0, 2).flatten(1)
    sums = torch.cat([lags.flatten(1), _line_lags(rows), _line_lags(columns), squares], 1)
    products = (sums @ _constant(_ASSEMBLY, sums)).reshape(channels, 9, 9)
    # Outside the image the centred map is not zero but minus the centre, which only positions at the border see.
    centred = total - batch * centre[:, None, None]
    places, beyond = _border(height, width)
    near = torch.from_numpy(places).to(total.device)
    outside = _constant(beyond, total)
    seen = F.pad(centred, (1, 1, 1, 1)).flatten(1).index_select(1, near).unflatten(1, outside.shape)
    mixed = centre[:, None, None] * (seen @ outside.T)
    products = products - mixed - mixed.transpose(1, 2)
    products = products + batch * centre.square()[:, None, None] * (outside @ outside.T)
    sides = [line.sum((1, 3)).T for line in (rows, columns)]
    linear = torch.cat([centred.sum((1, 2))[:, None], *sides, corners.sum(1).permute(1, 0, 2).flatten(1)], 1)
    mean = (linear @ _constant(_WINDOWS, total) - batch * centre[:, None] * outside.sum(-1)) / positions
    covariance = products / positions - mean.unsqueeze(2) * mean.unsqueeze(1)
    return mean + centre[:, None], covariance


def _line_lags(lines: Tensor) -> Tensor:
    """The autocorrelation of two border lines, `[2, batch, channels, length]`, at lags 0 to 2: `[channels, 6]`."""
    size = lines.shape[-1]
    lags = [(lines[..., : max(size - lag, 0)] * lines[..., lag:]).sum((1, 3)) for lag in range(3)]
    return torch.stack(lags, -1).permute(1, 0, 2).flatten(1)


def _constant(values: np.ndarray, like: Tensor) -> Tensor:
    """Numbers as a tensor of the dtype and on the device of `like`.

    They are kept as arrays: a tensor that was first made in inference mode, or while a compiler traced, would be of no
    use later.
    """
    return torch.from_numpy(values).to(dtype=like.dtype, device=like.device)


@lru_cache(maxsize=256)
def _border(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """For the positions at the border: the places of their nine neighbours in the map padded by one, `[9 * border]`,
    and which of these are outside of it, `[9, border]`."""
    y, x = np.mgrid[:height, :width]
    at_border = (y == 0) | (y == height - 1) | (x == 0) | (x == width - 1)
    taps = np.arange(9)[:, None]
    rows, columns = y[at_border] + taps // 3, x[at_border] + taps % 3
    outside = (rows == 0) | (rows == height + 1) | (columns == 0) | (columns == width + 1)
    return (rows * (width + 2) + columns).ravel(), outside.astype(np.float64)


def _windows() -> np.ndarray:
    """Which sums make up what a tap sees of the map: `[1 + 2 rows + 2 columns + 4 corners, 9]`."""
    matrix = np.zeros((9, 9))
    for tap in range(9):
        row, column = {0: 1, 2: 0}.get(tap // 3), {0: 1, 2: 0}.get(tap % 3)
        matrix[0, tap] = 1
        if row is not None:
            matrix[1 + row, tap] = -1
        if column is not None:
            matrix[3 + column, tap] = -1
        if row is not None and column is not None:
            matrix[5 + 2 * row + column, tap] = 1
    return matrix


def _assembly() -> np.ndarray:
    """Which sums make up the product of which two taps: `[15 lags + 4 lines of 3 + 4 corners, 81]`."""
    matrix = np.zeros((31, 9, 9))
    for first in range(9):
        for second in range(9):
            dy, dx = second // 3 - first // 3, second % 3 - first % 3
            if dy < 0 or (dy == 0 and dx < 0):
                dy, dx = -dy, -dx
            matrix[dy * 5 + dx + 2, first, second] = 1
            # A tap in the first row of the kernel never sees the last row of the map, and so on.
            row = {0: 1, 2: 0}.get(first // 3) if dy == 0 else None
            column = {0: 1, 2: 0}.get(first % 3) if dx == 0 else None
            if row is not None:
                matrix[15 + 3 * row + abs(dx), first, second] = -1
            if column is not None:
                matrix[21 + 3 * column + abs(dy), first, second] = -1
            if row is not None and column is not None:
                matrix[27 + 2 * row + column, first, second] = 1
    return matrix.reshape(31, 81)


_WINDOWS, _ASSEMBLY = _windows(), _assembly()
