"""Batch statistics of strided depthwise kernels, from what they write: computed again in the backward pass, not kept.

With a stride, taps of the input do not fall on each other, and the lags of its autocorrelation that kernels see are
more than the branches are. What the branches write is small instead. All passes go over a few images at a time, whose
intermediate maps stay in the cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from refold.blocks.parallel.statistics import add_gradient, images_at_a_time, sum_over_batch


class Written(NamedTuple):
    """Batch statistics of what depthwise kernels write, and of the pixels in the middle of their windows."""

    through: Tensor
    """The input to go on with; its gradient must be new memory, since that of the statistics is added in place."""
    means: Tensor
    """`[branches, channels]`"""
    variances: Tensor
    """`[branches, channels]`, divided by the number of positions"""
    pixel_mean: Tensor
    """`[channels]`"""
    pixel_variance: Tensor
    """`[channels]`, divided by the number of positions"""


def written_statistics(
    x: Tensor, kept: Tensor, kernels: Tensor, stride: tuple[int, int], padding: tuple[int, int]
) -> Written:
    """The statistics of what each of the `kernels`, `[branches, channels, 1, height, width]`, writes.

    `x` is `[batch, channels, height, width]` in float32 or float64, and not under autocast; the kernels are odd and
    `padding`, in pixels, is half of them. Differentiable; of all that is as large as the map it keeps `kept` alone:
    `x`, or the narrower tensor that `x` was cast from.
    """
    return Written(*_Written.apply(x, kept, kernels, stride, padding))


class _Written(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kept: Tensor, kernels: Tensor, stride: tuple[int, int], padding: tuple[int, int]
    ) -> tuple[Tensor, ...]:
        layer = _Layer(stride, padding)
        pixels = layer.pixels(x)
        positions = pixels.shape[0] * pixels.shape[2] * pixels.shape[3]
        total = sum_over_batch(x).unsqueeze(0)
        seen = layer.weight_gradient(torch.ones_like(layer.pixels(total)), total, kernels[0]) / positions
        means = (kernels * seen).flatten(2).sum(-1)
        pixel_mean = layer.pixels(total).sum((0, 2, 3)) / positions
        # Sums of products of what is written, centred, with each tap: the variances follow, and so do the gradients.
        products, squares = torch.zeros_like(kernels), torch.zeros_like(pixel_mean)
        for images in x.split(images_at_a_time(x)):
            for kernel, mean, product in zip(kernels, means, products, strict=True):
                product += layer.weight_gradient(layer.write(images, kernel, -mean), images, kernel)
            squares += (layer.pixels(images) - pixel_mean[:, None, None]).square_().sum((0, 2, 3))
        products /= positions
        variances = (kernels * products).flatten(2).sum(-1)
        ctx.save_for_backward(kept, kernels, means, seen, products, pixel_mean)
        ctx.settings = (layer, positions)
        return x.view_as(x), means, variances, pixel_mean, squares / positions

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        kept, kernels, means, seen, products, pixel_mean = ctx.saved_tensors
        layer, positions = ctx.settings
        grad, of_means, of_variances, of_pixel_mean, of_pixel_variance = gradients
        shape = (*of_means.shape, 1, 1, 1)
        of_kernels = of_means.view(shape) * seen + 2 * of_variances.view(shape) * products
        if not ctx.needs_input_grad[0]:
            return None, None, of_kernels, None, None
        slopes, pixel_slope = 2 * of_variances / positions, 2 * of_pixel_variance / positions
        levels = of_means / positions - slopes * means
        pixel_level = of_pixel_mean / positions - pixel_slope * pixel_mean
        scaled = kernels * slopes.view(shape)

        def of_images(images: Tensor) -> Tensor:
            total: Tensor
            total, *others = (
                layer.input_gradient(layer.write(images, weight, level), images, kernel)
                for kernel, weight, level in zip(kernels, scaled, levels, strict=True)
            )
            for other in others:
                total += other
            at_pixels = layer.pixels(images) * pixel_slope[:, None, None]
            layer.pixels(total).add_(at_pixels.add_(pixel_level[:, None, None]))
            return total

        grad = add_gradient(grad, kept, of_images)
        return grad, None, of_kernels, None, None


class _Layer(NamedTuple):
    """A depthwise convolution without its kernel."""

    stride: tuple[int, int]
    padding: tuple[int, int]

    def pixels(self, x: Tensor) -> Tensor:
        """The pixels in the middle of the windows, as a view."""
        return x[:, :, :: self.stride[0], :: self.stride[1]]

    def write(self, x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, kernel, bias, self.stride, self.padding, 1, x.shape[1])

    def weight_gradient(self, of_output: Tensor, x: Tensor, kernel: Tensor) -> Tensor:
        return self._gradient(of_output, x, kernel, [False, True, False])[1]

    def input_gradient(self, of_output: Tensor, x: Tensor, kernel: Tensor) -> Tensor:
        return self._gradient(of_output, x, kernel, [True, False, False])[0]

    def _gradient(
        self, of_output: Tensor, x: Tensor, kernel: Tensor, mask: list[bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
            of_output, x, kernel, None, self.stride, self.padding, [1, 1], False, [0, 0], x.shape[1], mask
        )
        return gradients
