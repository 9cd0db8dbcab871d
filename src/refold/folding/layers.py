"""Torch layers from convolutions of the algebra."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import is_parametrized

from refold.algebra import Convolution, with_groups
from refold.errors import NotFoldable


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


def transposed(weight: Tensor, bias: Tensor | None, settings: tuple[Any, ...]) -> nn.Module:
    """A transposed convolution layer from what it is called with as a function: stride, padding, output padding,
    groups and dilation."""
    stride, padding, output_padding, groups, dilation = settings
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[weight.dim() - 3]
    made = nn.utils.skip_init(
        kind,
        weight.shape[0],
        weight.shape[1] * groups,
        tuple(weight.shape[2:]),
        stride=stride,
        padding=padding,
        output_padding=output_padding,
        groups=groups,
        dilation=dilation,
        bias=bias is not None,
    )
    return _filled(made, weight.double(), None if bias is None else bias.double())


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


_CONVOLUTION = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
_DESCRIBED: dict[type[nn.Module], tuple[str, ...]] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _CONVOLUTION),
    **dict.fromkeys(
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), (*_CONVOLUTION, "output_padding")
    ),
    nn.Linear: ("in_features", "out_features"),
    nn.Identity: (),
    **dict.fromkeys((nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d), ("padding", "value")),
    nn.Flatten: ("start_dim", "end_dim"),
    nn.Unflatten: ("dim", "unflattened_size"),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), ("num_features", "eps", "affine")),
}
"""The layers that folding makes, and what each is built with."""
_BY_NAME = {kind.__name__: kind for kind in _DESCRIBED}


def described(module: nn.Module) -> dict[str, Any]:
    """A layer that folding made as plain JSON-able values, without its weights."""
    kind = type(module)
    if kind is nn.Sequential:
        return {
            "kind": "Sequential",
            "layers": {name: described(child) for name, child in module.named_children()},
        }
    has_bias = getattr(module, "bias", None) is not None
    # A layer of another class, or with other padding, keeps its place with other weights.
    if kind not in _DESCRIBED or getattr(module, "padding_mode", "zeros") != "zeros":
        return {"kind": "itself", "bias": has_bias}
    settings = {name: getattr(module, name) for name in _DESCRIBED[kind]}
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    return {"kind": kind.__name__, **settings, **({"bias": has_bias} if hasattr(module, "weight") else {})}


def from_description(description: dict[str, Any], place: nn.Module | None) -> nn.Module:
    """The layer, its weights not set, that `described` wrote; `place` is what stood where it goes.

    Raises KeyError for a layer that folding does not make.
    """
    settings = dict(description)
    name = settings.pop("kind")
    if name == "Sequential":
        layers = {key: from_description(each, None) for key, each in settings["layers"].items()}
        return nn.Sequential(OrderedDict(layers)).eval()
    if name == "itself":
        if place is None:
            raise KeyError("itself")
        made = copy.copy(place)
        made._parameters = dict(place._parameters)
        if settings["bias"] and made.bias is None:
            weight: Any = made.weight
            channels = (
                weight.shape[1] * made.groups if isinstance(made, _ConvTransposeNd) else weight.shape[0]
            )
            made.register_parameter("bias", nn.Parameter(weight.new_zeros(channels)))
        return made
    kind = _BY_NAME[name]
    bias = settings.pop("bias", None)
    if issubclass(kind, (_ConvNd, nn.Linear)):
        made = nn.utils.skip_init(kind, **_tuples(settings), bias=bias)
    else:
        made = kind(**_tuples(settings))
    return made.eval()


def _tuples(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
