"""Parallel branches of one input, run in training mode in less time and memory than a loop over them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refold.blocks.parallel.branch import (
    common_geometry,
    is_batch_norm,
    is_linear,
    padding_of,
    require_several,
    uses_batch,
)
from refold.blocks.parallel.choosing import Part, choose
from refold.blocks.parallel.forms import from_moments, stacked
from refold.errors import InputError

BranchComputation = Literal["auto", "looped", "stacked", "moments"]


class ParallelBranches(nn.Module):
    """The sum of branches of one input, each a convolution with its batch norm, and a batch norm of the input as skip.

    Maps `[batch, in_channels, height, width]` to `[batch, out_channels, height / stride, width / stride]`. In
    evaluation mode, and for whoever traces it, it is the plain sum. In training mode `form` says how the same
    function, gradients and running statistics are computed:

    - `looped`: branch by branch.
    - `stacked`: kernels of one size as one convolution and one batch norm.
    - `moments`: the batch statistics of 1x1 branches (depthwise with stride 1: up to 3x3) and of the skip follow from
      mean and covariance of the input, so that one convolution with the summed kernel remains, and only the input is
      kept for the backward pass. Other branches run looped.
    - `auto`: what was measured fastest for the shape (`refold.blocks.parallel.choosing`).

    `branches` have the attributes `conv` and `bn` (the latter `nn.Identity` for none); any other module is run as it
    is and added. `adds_input` adds the input itself. Parameters keep the names of the plain loop: `branches.0.conv`,
    `branches.0.bn`, `skip`. Hooks on a branch, a skip that is more than a batch norm, and inputs without elements make
    it run looped.

    Raises `InputError` where the branches do not fit each other.
    """

    def __init__(
        self,
        branches: Sequence[nn.Module],
        skip: nn.Module | None = None,
        *,
        adds_input: bool = False,
        form: BranchComputation = "auto",
    ) -> None:
        super().__init__()
        if form not in get_args(BranchComputation):
            raise InputError(
                f"There is no form '{form}'; choose one of {', '.join(get_args(BranchComputation))}."
            )
        self.branches = nn.ModuleList(branches)
        self.skip = skip
        self.adds_input = adds_input
        self.form: BranchComputation = form
        linear = [i for i, branch in enumerate(branches) if is_linear(branch)]
        self._others = [i for i in range(len(branches)) if i not in linear]
        self._pointwise: list[int] = []
        self._spatial: list[int] = []
        if linear:
            self._sort(linear)

    def refresh_geometry(self) -> None:
        """Look at the branches again, after a stride or a dilation of theirs was changed."""
        linear = [i for i in range(len(self.branches)) if i not in self._others]
        if linear:
            self._sort(linear)

    def _sort(self, linear: list[int]) -> None:
        convolutions = {i: self._branch(i).conv for i in linear}
        self.geometry = common_geometry(list(convolutions.values()))
        if (self.skip is not None or self.adds_input) and not self.geometry.keeps_shape:
            raise InputError(
                "The input cannot be added: channels or size of the map differ from what is written."
            )
        single = [i for i in linear if convolutions[i].kernel_size == (1, 1)]
        # A padded 1x1 kernel sees zeros around the map, which the statistics of the map alone do not.
        self._pointwise = single if all(padding_of(convolutions[i]) == (0, 0) for i in single) else []
        self._spatial = [i for i in linear if i not in self._pointwise]

    def extra_repr(self) -> str:
        return f"form={self.form}, adds_input={self.adds_input}"

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.form == "looped" or not self._is_plain(x):
            return self._looped(x)
        require_several(*self._count(x))
        if self._spatial and self._fits_neighbourhood() and self._pick(x, "neighbourhood") == "moments":
            parts = [self._from_moments(x, [*self._spatial, *self._pointwise], pointwise=False)]
        else:
            parts = [*self._spatial_parts(x), *self._pointwise_parts(x)]
        parts += [self.branches[i](x) for i in self._others]
        out: Tensor = reduce(torch.add, parts)
        return out

    def _looped(self, x: Tensor) -> Tensor:
        parts: list[Tensor] = [branch(x) for branch in self.branches]
        if self.skip is not None:
            parts.append(self.skip(x))
        if self.adds_input:
            parts.append(x)
        out: Tensor = reduce(torch.add, parts)
        return out

    def _is_plain(self, x: Tensor) -> bool:
        """Whether nothing but the result of the branches can be seen from outside."""
        linear = [*self._pointwise, *self._spatial]
        if not linear or not isinstance(x, Tensor) or x.dim() != 4 or x.numel() == 0:
            return False
        if not torch.amp.is_autocast_available(x.device.type):  # no device to compute on, such as "meta"
            return False
        # Whoever works on a network may have put other modules in their places.
        if not all(is_linear(self.branches[i]) for i in linear):
            return False
        if self.skip is not None and not is_batch_norm(self.skip):
            return False
        # The input itself is added in its own precision, which a convolution under autocast does not have.
        wider = x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type)
        if wider and (self.skip is not None or self.adds_input):
            return False
        return not any(
            m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
            for i in linear
            for m in self.branches[i].modules()
        ) and not (self.skip is not None and (self.skip._forward_hooks or self.skip._forward_pre_hooks))

    def _count(self, x: Tensor) -> tuple[int, list[int]]:
        """Positions that enter a batch norm, and the shape of the map; a count of two where none uses the batch."""
        norms = [self._branch(i).bn for i in (*self._pointwise, *self._spatial)] + [self.skip]
        height, width = self.geometry.output_size(x)
        size = [x.shape[0], self.geometry.out_channels, height, width]
        used = any(norm is not None and uses_batch(norm) for norm in norms)
        return (x.shape[0] * height * width if used else 2), size

    def _pick(self, x: Tensor, part: Part) -> str:
        if self.form != "auto":
            return self.form
        counted = self._pointwise if part == "pointwise" else [*self._spatial, *self._pointwise]
        return choose(self.geometry, x, part, len(counted), self.skip is not None)

    def _fits_neighbourhood(self) -> bool:
        g = self.geometry
        if not g.depthwise or g.dilation != (1, 1):
            return False
        if g.stride == (1, 1):
            return g.kernel_size == (3, 3) and g.padding == (1, 1)
        centred = all(2 * p + 1 == k for p, k in zip(g.padding, g.kernel_size, strict=True))
        return g.in_channels == g.out_channels and centred

    def _spatial_parts(self, x: Tensor) -> list[Tensor]:
        if not self._spatial:
            return []
        if len(self._spatial) > 1 and self._pick(x, "spatial") == "stacked":
            return stacked(x, [self._branch(i) for i in self._spatial])
        return [self.branches[i](x) for i in self._spatial]

    def _pointwise_parts(self, x: Tensor) -> list[Tensor]:
        if not (self._pointwise or self.skip is not None or self.adds_input):
            return []
        form = self._pick(x, "pointwise")
        if form == "moments":
            return [self._from_moments(x, self._pointwise, pointwise=True)]
        members = [self._branch(i) for i in self._pointwise]
        if self.geometry.stride != (1, 1) and not x.requires_grad:
            parts = [self._of_pixels_read(x, branch) for branch in members]
        else:
            parts = stacked(x, members) if form == "stacked" else [branch(x) for branch in members]
        if self.skip is not None:
            parts.append(self.skip(x))
        return [*parts, x] if self.adds_input else parts

    def _of_pixels_read(self, x: Tensor, branch: Any) -> Tensor:
        """What a 1x1 branch makes of an image that it strides over, given only the pixels that it reads."""
        # PyTorch 2.15 writes beyond its memory in the backward pass of a 1x1 convolution with stride 2 of 3 channels
        # that come last (on a CPU). Where the input needs a gradient, this detour would be slower.
        height, width = self.geometry.stride
        seen, conv = x[:, :, ::height, ::width], branch.conv
        out: Tensor = branch.bn(F.conv2d(seen, conv.weight, conv.bias, groups=conv.groups))
        return out

    def _from_moments(self, x: Tensor, members: list[int], *, pointwise: bool) -> Tensor:
        branches = [self._branch(i) for i in members]
        return from_moments(x, branches, self.skip, self.adds_input, self.geometry, pointwise=pointwise)

    def _branch(self, index: int) -> Any:
        return self.branches[index]
