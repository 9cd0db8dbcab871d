"""What operators are linearly: each function here reads one use of an operator and says so.

They return None where the use is not linear, and raise NotFoldable, with the reason, where it would be but cannot be
folded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from refold.algebra import affine
from refold.errors import NotFoldable
from refold.recording.linear import (
    Flattened,
    Linear,
    Map,
    Moved,
    Restored,
    Same,
    Sum,
    Use,
)
from refold.recording.maps import (
    average_pool_map,
    batch_norm_map,
    convolution_map,
    linear_map,
    on,
)
from refold.recording.precision import in_float64


def convolution(use: Use) -> Map | None:
    module = use.module
    if module is None:
        tensors = _constant_weights(use)
        if tensors is None:
            return None
        rest = ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1), (6, "groups", 1))
        settings = (use.argument(*each) for each in rest)
        return convolution_map(use, use.argument(0, "input"), *tensors, *settings)
    if not is_plain_convolution(module):
        return None
    own = (module.stride, module.padding, module.dilation, module.groups)
    return convolution_map(use, use.source, *_weights(module), *own)


def is_plain_convolution(module: nn.Module) -> bool:
    """Whether the layer is a convolution with zero padding that nothing is added to."""
    for plain in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        if isinstance(module, plain) and module.padding_mode == "zeros":
            own = type(module)
            return own.forward is plain.forward and own._conv_forward is plain._conv_forward
    return False


def linear(use: Use) -> Map | None:
    if use.module is not None:
        own = type(use.module).forward is nn.Linear.forward
        return linear_map(use.source, *_weights(use.module)) if own else None
    tensors = _constant_weights(use)
    return None if tensors is None else linear_map(use.argument(0, "input"), *tensors)


def product(use: Use) -> Map | None:
    """`x @ weight`, a constant `[in, out]` on the right."""
    source, given = use.argument(0, "input"), use.argument(1, "other", use.node.kwargs.get("mat2"))
    if not use.varies(source) or use.varies(given):
        return None
    weight = use.constant(given)
    return None if weight is None or weight.dim() != 2 else linear_map(source, weight.t(), None)


def added_product(use: Use) -> Map | None:
    """`torch.addmm`: beta * bias + alpha * (x @ weight), the bias and `[in, out]` constant."""
    given, source, factor = use.argument(0, "input"), use.argument(1, "mat1"), use.argument(2, "mat2")
    if not use.varies(source) or use.varies(given) or use.varies(factor):
        return None
    bias, weight = use.constant(given), use.constant(factor)
    if bias is None or weight is None:
        return None
    row = bias.numel() in (1, weight.shape[1]) and bias.numel() == bias.shape[-1:].numel()
    if not row:
        return None  # another shift for each row
    shift = (float(use.argument(3, "beta", 1.0)) * bias.reshape(-1)).expand(weight.shape[1])
    return linear_map(source, float(use.argument(4, "alpha", 1.0)) * weight.t(), shift)


def _constant_weights(use: Use) -> tuple[Tensor, Tensor | None] | None:
    """The weight and bias that a function is called with; None where the weight depends on the input."""
    given = use.argument(1, "weight")
    weight = None if use.varies(given) else use.constant(given)
    return None if weight is None else (weight, use.constant(use.argument(2, "bias")))


def batch_norm(use: Use) -> Map:
    module = use.module
    if module is None:
        (mean, variance, weight, bias), epsilon, training = batch_norm_arguments(use)
        tensors: list[Any] = [use.constant(value) for value in (mean, variance, weight, bias)]
        settings: tuple[Any, ...] = (*tensors, epsilon, training)
        return batch_norm_map(use, use.argument(0, "input"), *settings)
    if type(module).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
        raise NotFoldable("its class has a forward of its own")
    weight, bias = _weights(module)
    return batch_norm_map(
        use, use.source, module.running_mean, module.running_var, weight, bias, module.eps, module.training
    )


def batch_norm_arguments(use: Use) -> tuple[tuple[Any, Any, Any, Any], float, bool]:
    """Mean, variance, weight and bias, epsilon and whether it trains, of a batch norm that is called as a function."""
    order = (1, 2, 3, 4) if use.is_functional else (3, 4, 1, 2)
    names = ("running_mean", "running_var", "weight", "bias")
    given = [use.argument(place, name) for place, name in zip(order, names, strict=True)]
    untrained = "no_training" in use.name
    training = not untrained and bool(use.argument(5, "training", False))
    epsilon = float(use.argument(6 if untrained else 7, "eps", 1e-5))
    return (given[0], given[1], given[2], given[3]), epsilon, training


def average_pool(use: Use) -> Map | None:
    names: tuple[tuple[str, Any], ...] = (("kernel_size", None), ("stride", None), ("padding", 0))
    names += (("ceil_mode", False), ("count_include_pad", True), ("divisor_override", None))
    if use.module is None:
        given: list[Any] = [use.argument(1 + i, name, default) for i, (name, default) in enumerate(names)]
        return average_pool_map(use, use.argument(0, "input"), *given)
    given = [getattr(use.module, name, default) for name, default in names]
    return average_pool_map(use, use.source, *given)


def same(use: Use) -> Same | None:
    one = len(use.node.all_input_nodes) == 1 and use.recording.shapes.get(use.node) == use.shape(use.source)
    return Same(use.source) if one and _one_input(use) else None


def dropout(use: Use) -> Same | None:
    if use.module is not None:
        return Same(use.source) if not use.module.training else None
    return Same(use.source) if use.argument(2, "training", use.is_functional) is False else None


def idle(use: Use) -> Same | None:
    """A cast that did nothing: it returned what it was given."""
    return Same(use.source) if use.node in use.recording.handed_on else None


def attribute(use: Use) -> Same | None:
    return Same(use.source) if use.node.args[1:] == ("data",) else None


def flattened(use: Use) -> Flattened | None:
    source, shape = use.argument(0, "input"), use.shape(use.argument(0, "input"))
    start, end = use.argument(1, "start_dim", 0), use.argument(2, "end_dim", -1)
    leading = use.module is None and start == 0 and end in (len(shape) - 2, -2) and len(shape) > 2
    return Flattened(source) if leading else None


def restored(use: Use) -> Restored | None:
    source, like = use.argument(0, "input"), use.argument(1, "other")
    alike = use.varies(source) and use.varies(like) and use.shape(source)[-1] == use.shape(like)[-1]
    return Restored(source, like) if alike else None


def permuted(use: Use) -> Moved | None:
    """Channels moved from behind the batch to the end, or back: permute, transpose, movedim."""
    source = use.argument(0, "input")
    axes = len(use.shape(source))
    to_end = (0, *range(2, axes), 1)
    to_front = (0, axes - 1, *range(1, axes - 1))
    if use.name == "permute":
        given = use.argument(1, "dims")
        order: tuple[Any, ...] = tuple(given) if isinstance(given, (tuple, list)) else use.node.args[1:]
    else:
        pair = [
            use.argument(1, "dim0", use.node.kwargs.get("source")),
            use.argument(2, "dim1", use.node.kwargs.get("destination")),
        ]
        if not all(isinstance(each, int) for each in pair):
            return None
        first, second = (each % axes for each in pair)
        places = list(range(axes))
        if use.name.startswith("move"):
            places.insert(second, places.pop(first))
        else:
            places[first], places[second] = second, first
        order = tuple(places)
    if axes < 3 or not all(isinstance(axis, int) for axis in order):
        return None
    order = tuple(axis % axes for axis in order)
    if order not in (to_end, to_front):
        return None
    return Moved(source, None if to_end == to_front else order == to_end)


def plus(use: Use, sign: float = 1.0) -> Linear | None:
    left, right = use.argument(0, "input"), use.argument(1, "other")
    factor = sign * float(use.argument(2, "alpha", 1.0))
    if not use.varies(right):
        return _shifted(use, left, right, 1.0, factor)
    if not use.varies(left):
        return _shifted(use, right, left, factor, 1.0)
    return Sum((left, right), (1.0, factor)) if use.shape(left) == use.shape(right) else None


def plus_all(use: Use) -> Sum | None:
    """The sum of any number of tensors, which only graphs from elsewhere have as one operator."""
    values = tuple(use.argument(place, "") for place in range(len(use.node.args)))
    alike = all(use.varies(value) and use.shape(value) == use.shape(values[0]) for value in values)
    return Sum(values, (1.0,) * len(values)) if alike else None


def minus(use: Use) -> Linear | None:
    return plus(use, -1.0)


def negative(use: Use) -> Sum:
    return Sum((use.source,), (-1.0,))


def times(use: Use) -> Linear | None:
    left, right = use.argument(0, "input"), use.argument(1, "other")
    source, factor = (left, right) if use.varies(left) else (right, left)
    return None if use.varies(factor) else _scaled(use, source, use.constant(factor))


def divided(use: Use) -> Linear | None:
    left, right = use.argument(0, "input"), use.argument(1, "other")
    if not use.varies(left) or use.varies(right) or use.node.kwargs.get("rounding_mode"):
        return None
    factor = use.constant(right)
    return None if factor is None else _scaled(use, left, factor.reciprocal())


def _scaled(use: Use, source: fx.Node, factor: Tensor | None) -> Linear | None:
    """The input times a constant: a number, or one number a channel."""
    if factor is None or use.shape(source) != use.shape(use.node):
        return None
    if factor.numel() == 1:
        return Sum((source,), (float(factor),))
    channels = _by_channel(factor, use.shape(source))
    return None if channels is None else _affine_map(source, channels[0], None, channels[1])


def _shifted(use: Use, source: fx.Node, shift: Any, factor: float, shift_factor: float) -> Linear | None:
    """The input (times a factor) plus a constant: a number, or one number a channel."""
    value = use.constant(shift)
    if value is None or use.shape(source) != use.shape(use.node):
        return None
    if value.numel() == 1 and float(value) == 0.0:
        return Sum((source,), (factor,))
    shape = use.shape(source)
    channels = _by_channel(value, shape) if value.numel() > 1 else None
    if value.numel() == 1 and len(shape) in (3, 4, 5):
        channels = (value.reshape(1).expand(shape[1]), len(shape) - 2)
    if channels is None:
        return None
    scale = torch.full_like(channels[0], factor).contiguous()
    return _affine_map(source, scale, channels[0] * shift_factor, channels[1])


def _by_channel(value: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, int] | None:
    """A broadcast constant as one number a channel, and the spatial axes of that layout; None where it is not."""
    aligned = (1,) * (len(shape) - value.dim()) + tuple(value.shape)
    for axis, spatial_axes in ((1, len(shape) - 2), (len(shape) - 1, 0)):
        expected = tuple(size if i == axis else 1 for i, size in enumerate(shape))
        if aligned == expected and spatial_axes <= 3:
            return value.reshape(-1), spatial_axes
    return None


def _affine_map(source: fx.Node, scale: Tensor, shift: Tensor | None, spatial_axes: int) -> Map:
    return Map(
        source, lambda device: affine(on(device, scale), on(device, shift), spatial_axes), multiplies=False
    )


def _weights(module: nn.Module) -> tuple[Any, Any]:
    with in_float64():  # a parametrized layer computes its weight when it is read
        return getattr(module, "weight", None), getattr(module, "bias", None)


def _one_input(use: Use) -> bool:
    return use.node.op != "call_module" or len(use.node.args) + len(use.node.kwargs) == 1


def takes_scale(use: Use) -> bool:
    """Whether it is a convolution of another kind than the algebra's whose outputs its own weight can scale.

    Transposed convolutions, other padding modes, and layers that compute their padding from the size of the image.
    """
    module = use.module
    if module is None:
        constant = not use.varies(use.argument(1, "weight")) and not use.varies(use.argument(2, "bias"))
        return constant and isinstance(use.argument(0, "input"), fx.Node)
    if not isinstance(module, _ConvNd) or is_plain_convolution(module):
        return False
    names = {name for name, _ in module.named_parameters(recurse=True)}
    return names <= {"weight", "bias"} and module.weight.is_floating_point()
