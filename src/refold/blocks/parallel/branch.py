"""The branches of one layer: what they must share, and what each one's batch norm contributes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from refold.errors import InputError


class Branch(nn.Module):
    """A convolution and its batch norm (`nn.Identity` for none), `[batch, channels, height, width]` in and out."""

    def __init__(self, conv: nn.Conv2d, bn: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        self.bn = bn

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.conv(x))
        return out


@dataclass(frozen=True)
class Geometry:
    """What the kernels of a sum of branches share. `padding` and `kernel_size` are those of the largest kernel."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    padding: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @property
    def depthwise(self) -> bool:
        """Whether every output channel reads one input channel."""
        return self.groups == self.in_channels

    @property
    def keeps_shape(self) -> bool:
        """Whether an identity fits beside it."""
        margins = (
            2 * p - d * (k - 1) for p, d, k in zip(self.padding, self.dilation, self.kernel_size, strict=True)
        )
        return self.in_channels == self.out_channels and self.stride == (1, 1) and not any(margins)

    def output_size(self, x: Tensor) -> tuple[int, int]:
        """Height and width of what a branch writes for the map `x`."""
        height, width = (
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, p, d, k, s in zip(
                x.shape[2:], self.padding, self.dilation, self.kernel_size, self.stride, strict=True
            )
        )
        return height, width


def padding_of(conv: nn.Conv2d) -> tuple[int, int] | None:
    """The zero padding at both ends of each axis, or None where it differs between them or is not with zeros."""
    reach = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    padding = conv.padding
    if padding == "valid":
        padding = (0, 0)
    elif isinstance(padding, str):
        if any(r % 2 for r in reach):
            return None
        padding = (reach[0] // 2, reach[1] // 2)
    if conv.padding_mode != "zeros" and any(padding):
        return None
    return padding[0], padding[1]


def is_linear(branch: nn.Module) -> bool:
    """Whether it is a convolution and at most a batch norm, in its own way or in that of `ConvNorm`."""
    norm = getattr(branch, "bn", None)
    return (
        type(getattr(branch, "conv", None)) is nn.Conv2d
        and (type(norm) is nn.Identity or is_batch_norm(norm))
        and type(getattr(branch, "act", None)) in (type(None), nn.Identity)
        and {name for name, _ in branch.named_children()} <= {"conv", "bn", "act"}
    )


def is_batch_norm(norm: nn.Module | None) -> bool:
    """Whether it is a batch norm and nothing more."""
    bare = _is_synchronised(norm) and not hasattr(norm, "act")
    return type(norm) is nn.BatchNorm2d or bare


def common_geometry(convolutions: Sequence[nn.Conv2d]) -> Geometry:
    """The geometry of kernels that can be written into one. Raises InputError where there is none."""
    largest = max(convolutions, key=lambda c: c.kernel_size[0] * c.kernel_size[1])
    padding = padding_of(largest)
    if padding is None:
        raise InputError(
            f"The branches cannot be parallel: {largest} does not pad with zeros, equally at both ends."
        )
    sizes = tuple(max(c.kernel_size[axis] for c in convolutions) for axis in (0, 1))
    wider = [largest.dilation[a] * (sizes[a] - largest.kernel_size[a]) // 2 for a in (0, 1)]
    geometry = Geometry(
        largest.in_channels,
        largest.out_channels,
        (sizes[0], sizes[1]),
        (padding[0] + wider[0], padding[1] + wider[1]),
        (largest.stride[0], largest.stride[1]),
        (largest.dilation[0], largest.dilation[1]),
        largest.groups,
    )
    for conv in convolutions:
        own = padding_of(conv)
        fits = (
            own is not None
            and (conv.in_channels, conv.out_channels, conv.groups)
            == (geometry.in_channels, geometry.out_channels, geometry.groups)
            and conv.stride == geometry.stride
            and all(
                (g - k) % 2 == 0 and (k == 1 or d == gd) and 2 * (gp - p) == gd * (g - k)
                for g, k, d, gd, gp, p in zip(
                    geometry.kernel_size,
                    conv.kernel_size,
                    conv.dilation,
                    geometry.dilation,
                    geometry.padding,
                    own,
                    strict=True,
                )
            )
        )
        if not fits:
            raise InputError(
                f"The branches cannot be parallel: {conv} does not fit beside {largest}; channels, groups and stride "
                "must be equal and the kernels centred on each other."
            )
    return geometry


def widened(weight: Tensor, kernel_size: tuple[int, int]) -> Tensor:
    """The same centred kernel in a larger one."""
    height, width = ((size - own) // 2 for size, own in zip(kernel_size, weight.shape[2:], strict=True))
    return F.pad(weight, (width, width, height, height)) if height or width else weight


def uses_batch(norm: nn.Module) -> bool:
    """Whether it normalises with the statistics of the batch: not if it is frozen, or no batch norm at all."""
    return isinstance(norm, _BatchNorm) and (norm.training or norm.running_mean is None)


def scale_and_shift(
    norms: Sequence[nn.Module], means: Tensor | None, variances: Tensor | None, kernels: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """What each norm multiplies and adds in training mode, `[branches, channels]` each.

    `means` and `variances`, of the same shape, are those of the batch over `count` positions; they enter the running
    averages. They may be None where no norm uses them. `kernels`, `[branches, channels, ...]`, has the dtype and
    device of the result.
    """
    like, channels = kernels, kernels.shape[1]
    if means is not None and variances is not None:
        means, variances, count = _synchronised(norms, means, variances, count)
    ones, zeros = like.new_ones(channels), like.new_zeros(channels)
    rows = []
    for i, norm in enumerate(norms):
        if not isinstance(norm, _BatchNorm):
            rows.append((ones, zeros, zeros, ones, 0.0))
            continue
        if uses_batch(norm):
            assert means is not None
            assert variances is not None
            mean, variance = means[i], variances[i].clamp(min=0)
            if norm.training:
                _track(norm, mean, variance, count)
        else:
            mean, variance = norm.running_mean, norm.running_var  # type: ignore[assignment]  # not None, as `uses_batch` says
        weight = ones if norm.weight is None else norm.weight
        bias = zeros if norm.bias is None else norm.bias
        rows.append((weight, bias, mean, variance, norm.eps))
    weights, biases, averages, spreads, epsilons = zip(*rows, strict=True)
    epsilon = like.new_tensor(epsilons).unsqueeze(1)
    scale = torch.stack(weights).to(like.dtype) * (torch.stack(spreads).to(like.dtype) + epsilon).rsqrt()
    shift = torch.stack(biases).to(like.dtype) - torch.stack(averages).to(like.dtype) * scale
    return scale, shift


def require_several(count: int, size: Sequence[int]) -> None:
    """Raise what a batch norm raises where there is one value a channel."""
    if count == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {torch.Size(size)}"
        )


@torch.no_grad()
def _track(norm: _BatchNorm, mean: Tensor, variance: Tensor, count: int) -> None:
    if not norm.track_running_stats or norm.running_mean is None or norm.running_var is None:
        return
    factor = step(norm)
    unbiased = variance * (count / max(count - 1, 1))
    norm.running_mean.mul_(1 - factor).add_(factor * mean.to(norm.running_mean.dtype))
    norm.running_var.mul_(1 - factor).add_(factor * unbiased.to(norm.running_var.dtype))


def step(norm: _BatchNorm) -> float:
    """Count one more batch, and how much of it enters the running averages."""
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            return 1.0 / float(norm.num_batches_tracked)
    return 0.0 if norm.momentum is None else norm.momentum


def _synchronised(
    norms: Sequence[nn.Module], means: Tensor, variances: Tensor, count: int
) -> tuple[Tensor, Tensor, int]:
    """The statistics over the batches of all processes where the norms are synchronised."""
    first = next((n for n in norms if _is_synchronised(n) and uses_batch(n)), None)
    if first is None or not (dist.is_available() and dist.is_initialized()):
        return means, variances, count
    group: Any = getattr(first, "process_group", None) or dist.group.WORLD
    if dist.get_world_size(group) == 1:
        return means, variances, count
    from torch.distributed.nn.functional import all_reduce

    counts = torch.tensor([count], device=means.device, dtype=torch.int64)
    dist.all_reduce(counts, group=group)
    total = int(counts)
    overall = all_reduce(means * (count / total), group=group)
    spread = (variances + (means - overall).square()) * (count / total)
    return overall, all_reduce(spread, group=group), total


def _is_synchronised(norm: nn.Module | None) -> bool:
    """PyTorch's knows accelerators only, and one for the CPU must not be of its class, which DDP refuses there."""
    return isinstance(norm, nn.SyncBatchNorm) or bool(getattr(norm, "over_processes", False))
