"""Torch layers from convolutions of the algebra."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import is_parametrized

from refold.algebra import Convolution, with_groups
from refold.errors import NotFoldable


@dataclass(frozen=True)
class NewLayer:
    """A layer in the place of a region, rounded to the dtype of the model, and how to build it in float64."""

    module: nn.Module
    build: Callable[[], nn.Module]

    def exact(self) -> dict[int, Callable[[], Tensor]]:
        """What each rounded parameter is in float64: built when it is read, and only biases are kept."""
        biases: dict[str, Tensor] = {}

        def compute(name: str) -> Tensor:
            if name in biases:
                return biases[name]
            parameters = dict(self.build().named_parameters())
            biases.update((key, value) for key, value in parameters.items() if value.dim() == 1)
            return parameters[name]

        return {id(value): partial(compute, name) for name, value in self.module.named_parameters()}


def new_layer(
    build: Callable[[], nn.Module], made: nn.Module, kind: tuple[torch.dtype, torch.device]
) -> NewLayer:
    """The layer `made`, rounded; `build` makes it anew. Raises NotFoldable where it does not fit the dtype."""
    dtype, device = kind
    require_fit(made, dtype)
    return NewLayer(made.to(device, dtype), lambda: build().to(device))


def layer(convolution: Convolution) -> nn.Module:
    """`nn.Conv1d`, `2d`, `3d` or `nn.Linear` that computes `convolution`, in its dtype and on its device.

    Padding that differs between the two ends becomes a zero-padding layer in front.
    """
    if convolution.spatial_axes == 0:
        convolution = with_groups(convolution, 1)
        made: nn.Module = nn.utils.skip_init(
            nn.Linear, convolution.in_channels, convolution.out_channels, bias=convolution.bias is not None
        )
        return _filled(made, convolution.weight, convolution.bias)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[convolution.spatial_axes - 1]
    symmetric = convolution.has_symmetric_padding
    made = nn.utils.skip_init(
        kind,
        convolution.in_channels,
        convolution.out_channels,
        convolution.kernel_size,
        stride=convolution.stride,
        padding=tuple(before for before, _ in convolution.padding) if symmetric else 0,
        dilation=convolution.dilation,
        groups=convolution.groups,
        bias=convolution.bias is not None,
    )
    made = _filled(made, convolution.weight, convolution.bias)
    if symmetric:
        return made
    ends: Any = tuple(end for pair in reversed(convolution.padding) for end in pair)
    pad = (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)[convolution.spatial_axes - 1](
        tuple(ends), 0.0
    )
    return nn.Sequential(OrderedDict(padding=pad, convolution=made))


def rescaled(original: nn.Module, channelwise: Convolution) -> nn.Module:
    """A float64 copy of a convolution layer of any kind whose outputs are scaled and shifted as `channelwise` does.

    Raises NotFoldable where its weight is computed.
    """
    assert isinstance(original, _ConvNd)
    if is_parametrized(original):
        raise NotFoldable("its weight is computed by a parametrization")
    scale, shift = channelwise.weight.flatten(), channelwise.bias
    weight = original.weight.detach().to("cpu", torch.float64)
    if isinstance(original, _ConvTransposeNd):
        by_group = weight.unflatten(0, (original.groups, -1))
        scale_by_group = scale.reshape(original.groups, 1, -1, *(1,) * (weight.dim() - 2))
        weight = (by_group * scale_by_group).flatten(0, 1)
    else:
        weight = weight * scale.reshape(-1, *(1,) * (weight.dim() - 1))
    bias = None if original.bias is None else original.bias.detach().to("cpu", torch.float64) * scale
    if shift is not None:
        bias = shift if bias is None else bias + shift
    made = copy.copy(original)
    made._parameters = {}
    for name in ("weight", "bias"):
        made.register_parameter(name, None)
    return _filled(made, weight, bias)


def require_fit(module: nn.Module, dtype: torch.dtype) -> None:
    """Raise NotFoldable where rounding a weight of the layer to `dtype` loses more than its precision."""
    for name, value in module.named_parameters():
        if value.dtype == dtype:
            continue
        lost = value.detach().to(dtype).to(value.dtype).sub_(value.detach()).norm()
        if not lost <= 4 * torch.finfo(dtype).eps * value.norm():
            raise NotFoldable(f"the folded {name} does not fit {str(dtype).removeprefix('torch.')}")


def _filled(module: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            setattr(module, name, nn.Parameter(value.contiguous()))
    return module.eval()
