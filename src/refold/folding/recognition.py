"""Which operators of a graph are linear: torch's own layers by what they compute, functions by their names."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from refold.errors import NotFoldable
from refold.folding.constants import Constants
from refold.folding.functions import function_operator
from refold.folding.maps import average_pool_map, batch_norm_map, convolution, linear, zero_padding_map
from refold.folding.operators import Call, Linear, Same
from refold.folding.precision import in_float64
from refold.folding.tracing import has_hooks

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def linear_operator(node: fx.Node, constants: Constants) -> Linear | None:
    """How `node` is linear in its inputs, or None where it is not.

    Raises NotFoldable with the reason where it is an operator that would be linear but cannot be folded.
    """
    call = Call(node, constants)
    if node.op == "call_module":
        return _module(call, constants.unit.attribute(str(node.target)))
    return function_operator(call) if node.op in ("call_function", "call_method") else None


def is_batch_norm(node: fx.Node, constants: Constants) -> bool:
    """Whether `node` runs a batch norm."""
    if node.op == "call_module":
        return isinstance(constants.unit.attribute(str(node.target)), _BatchNorm)
    return node.op == "call_function" and node.target in (F.batch_norm, torch.batch_norm)


def batch_norm_settings(
    node: fx.Node, constants: Constants
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, float]:
    """Mean, variance, weight, bias (as the model stores them) and epsilon of a batch norm with running statistics."""
    if node.op == "call_module":
        module = constants.unit.attribute(str(node.target))
        found = (module.running_mean, module.running_var, module.weight, module.bias)
        return *(None if value is None else value.detach() for value in found), module.eps
    call = Call(node, constants)
    order = (1, 2, 3, 4) if node.target is F.batch_norm else (3, 4, 1, 2)
    names = ("running_mean", "running_var", "weight", "bias")
    given = (call.argument(place, name) for place, name in zip(order, names, strict=True))
    values = [constants.evaluate(value).detach() if isinstance(value, fx.Node) else None for value in given]
    return *values, float(call.argument(7, "eps", 1e-5))  # type: ignore[return-value]  # a starred tuple has no length for mypy


def scalable_module(node: fx.Node, constants: Constants) -> nn.Module | None:
    """A convolution layer that is not a plain zero-padded one, but still takes a scale of its outputs.

    Transposed convolutions, other padding modes, and layers that compute their padding from the size of the image.
    """
    if node.op != "call_module":
        return None
    module = constants.unit.attribute(str(node.target))
    if not isinstance(module, _ConvNd) or has_hooks(module) or _is_plain_convolution(module):
        return None
    names = {name for name, _ in module.named_parameters(recurse=True)}
    return module if names <= {"weight", "bias"} and module.weight.is_floating_point() else None


def _is_plain_convolution(module: nn.Module) -> bool:
    for plain in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        if isinstance(module, plain) and module.padding_mode == "zeros":
            own = type(module)
            return own.forward is plain.forward and own._conv_forward is plain._conv_forward
    return False


def _module(call: Call, module: Any) -> Linear | None:
    if has_hooks(module) and isinstance(module, (_ConvNd, nn.Linear, _BatchNorm)):
        raise NotFoldable("it has hooks, which folding could change")
    node = call.node
    one_input = len(node.args) + len(node.kwargs) == 1 and set(node.kwargs) <= {"input"}
    if has_hooks(module) or not one_input or len(node.all_input_nodes) != 1:
        return None
    (source,) = call.node.all_input_nodes
    if isinstance(module, nn.Identity) or (isinstance(module, _DROPOUTS) and not module.training):
        return Same(source)
    with in_float64():  # a parametrized layer computes its weight when it is read
        weight: Any = getattr(module, "weight", None)
        bias: Any = getattr(module, "bias", None)
    if isinstance(module, _ConvNd):
        if not _is_plain_convolution(module):
            return None
        return convolution(
            call, source, weight, bias, module.stride, module.padding, module.dilation, module.groups
        )
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return linear(source, weight, bias)
    if isinstance(module, _BatchNorm):
        if type(module).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
            raise NotFoldable("its class has a forward of its own")
        norm = (module.running_mean, module.running_var, weight, bias)
        return batch_norm_map(call, source, *norm, module.eps, module.training)
    if type(module) in (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d):
        axes = int(type(module).__name__[-2])
        settings = (
            module.kernel_size,
            module.stride,
            module.padding,
            module.ceil_mode,
            module.count_include_pad,
        )
        return average_pool_map(call, source, axes, *settings, getattr(module, "divisor_override", None))
    if isinstance(module, (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d)):
        return zero_padding_map(call, source, module.padding, "constant", module.value)
    return None
