"""A network whose last maps are finer than it was made for: strides become dilations, the weights stay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from refold.blocks.basic import PaddedIdentity
from refold.blocks.parallel import ParallelBranches
from refold.errors import InputError

_STRIDED = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, PaddedIdentity)


def set_output_stride(network: nn.Module, output_stride: int) -> None:
    """Let a network's maps be at most ``output_stride`` times smaller than the image, in place.

    Layers that would go further keep the size of their map, and every kernel behind them is dilated by what was not
    reduced, so that it weighs the same places of the image. ``feature_info`` follows.
    Raises `InputError` where the network has no map of that stride, or pools where it would have to keep the size.
    """
    info: Any = network.feature_info
    strides = sorted({feature["reduction"] for feature in info})
    if output_stride not in strides:
        raise InputError(f"output_stride is {output_stride}; choose one of {', '.join(map(str, strides))}.")
    # Large enough that no map is rounded, the halved ones of an attention among them.
    side = 4 * strides[-1]
    before = _input_sides(network, side)
    for module, width in before.items():
        stride = _stride(module)
        if stride > 1 and stride * side // width > output_stride:
            for layer in _layers(module):
                _keep_size(layer)
    while _dilate(before, _input_sides(network, side)):
        pass
    for feature in info:
        feature["reduction"] = min(feature["reduction"], output_stride)


def _dilate(before: dict[nn.Module, int], now: dict[nn.Module, int]) -> bool:
    """Dilate the kernels that see a finer map than they were made for; whether one was not dilated so yet."""
    any_new = False
    for module, width in now.items():
        factor = max(1, width // before[module])
        for layer in _layers(module):
            if (
                isinstance(layer, nn.Conv2d)
                and max(layer.kernel_size) > 1
                and layer.dilation != (factor, factor)
            ):
                layer.dilation = (factor, factor)
                if layer.padding != "same":
                    layer.padding = tuple(factor * (side - 1) // 2 for side in layer.kernel_size)
                any_new = True
        if isinstance(module, ParallelBranches):
            module.refresh_geometry()
    return any_new


def _keep_size(layer: nn.Module) -> None:
    """Let a strided layer write a map of the size that it reads."""
    if isinstance(layer, nn.Conv2d):
        layer.stride = (1, 1)
        if layer.kernel_size[0] % 2 == 0:
            layer.padding = "same"
    elif isinstance(layer, PaddedIdentity):
        layer.stride = 1
    else:
        raise InputError(
            f"This network halves its maps by {layer}, which cannot keep their size; leave output_stride out."
        )


def _layers(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, ParallelBranches):
        return [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    return [module]


def _stride(module: nn.Module) -> int:
    stride: Any = getattr(_layers(module)[0], "stride", 1)
    return int(stride[0] if isinstance(stride, tuple) else stride)


def _input_sides(network: nn.Module, side: int) -> dict[nn.Module, int]:
    """The width of the map that each spatial layer sees of a square image, in the order in which they run."""
    seen: dict[nn.Module, int] = {}

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.setdefault(module, inputs[0].shape[-1])

    inside = {
        part
        for module in network.modules()
        if isinstance(module, ParallelBranches)
        for part in module.modules()
    }
    units = [
        module
        for module in network.modules()
        if isinstance(module, ParallelBranches) or (isinstance(module, _STRIDED) and module not in inside)
    ]
    hooks = [module.register_forward_pre_hook(look) for module in units]
    was_training = network.training
    forward: Any = network.forward_features
    try:
        with torch.no_grad():
            network.eval()
            forward(torch.zeros(1, int(network.in_chans), side, side))  # type: ignore[arg-type]  # a plain attribute
    finally:
        network.train(was_training)
        for hook in hooks:
            hook.remove()
    return {module: width for module, width in seen.items() if width > 1}
