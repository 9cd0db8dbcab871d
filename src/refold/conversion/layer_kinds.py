"""Conversions of any model: another kind of layer for every one of a kind, in a copy."""

import copy
from collections.abc import Callable

import torch
from torch import nn

from refold.blocks import AddedC3, PointwiseLinear
from refold.errors import InputError

# What YOLOv5 calls the parts of C3: both branches' entrances, the common exit, and the blocks of the first branch.
_PARTS = ("cv1", "cv2", "cv3", "m")


def pointwise_to_linear(model: nn.Module) -> nn.Module:
    """A copy that computes every 1x1 convolution of stride 1 as a linear layer, on the same function.

    On devices with fast matrix products this can raise the throughput, in channels-last memory.

    Source: RepNeXt, section 4.1, the throughput in brackets.
    """
    return _converted(model, _linear_of)


def linear_to_pointwise(model: nn.Module) -> nn.Module:
    """A copy in which every ``PointwiseLinear`` is a 1x1 convolution again, as `pointwise_to_linear` found it."""
    return _converted(model, _pointwise_of)


def concatenation_to_addition(model: nn.Module) -> nn.Module:
    """A copy in which every module of the shape of YOLOv5's C3 adds its two branches and no longer concatenates them.

    That shape is ``cv3(cat(m(cv1(x)), cv2(x)))``, recognised by these four names and by what the module computes. The
    first convolution of ``cv3`` then reads half as many channels and starts from the mean of its two halves, so the
    model computes something else and needs training; all other weights are kept.

    Raises ``InputError`` where the model has no such module.

    Source: RepGhost, appendix B.2 and table 10.
    """
    found = []

    def convert(module: nn.Module) -> nn.Module | None:
        if not _is_c3(module):
            return None
        found.append(module)
        return _added(module)

    converted = _converted(model, convert)
    if not found:
        raise InputError(
            f"{type(model).__name__} has no module that computes cv3(cat(m(cv1(x)), cv2(x))) with two branches of "
            "equal channels; give a model with C3 modules, such as YOLOv5."
        )
    return converted


def _converted(model: nn.Module, convert: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """A copy in which `convert` has replaced what it gives a module for, from the inside out."""
    # Held until the end: the identity of a replaced module must not be given to a new one.
    whole = copy.deepcopy(model)
    converted = replaced(whole, convert)
    # What `create_model` recorded no longer rebuilds this network.
    vars(converted).pop("architecture", None)
    return converted


def replaced(model: nn.Module, convert: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """The model itself after `convert` has replaced what it gives a module for, from the inside out.

    A module that is used in several places stays one. Whoever calls this holds on to the model meanwhile.
    """
    twins: dict[int, nn.Module] = {}

    def visit(module: nn.Module) -> nn.Module:
        if id(module) not in twins:
            for name, child in module._modules.items():  # named_children leaves out what it has seen before
                if child is not None:
                    module._modules[name] = visit(child)
            replacement = convert(module)
            twins[id(module)] = module if replacement is None else replacement.train(module.training)
        return twins[id(module)]

    return visit(model)


def _linear_of(module: nn.Module) -> nn.Module | None:
    if type(module) is not nn.Conv2d or (module.kernel_size, module.stride, module.groups) != (
        (1, 1),
        (1, 1),
        1,
    ):
        return None
    if module.padding not in ((0, 0), "same", "valid"):
        return None
    layer = PointwiseLinear(module.in_channels, module.out_channels, module.bias is not None, device="meta")
    layer.weight = _like(module.weight, module.weight.flatten(1))
    layer.register_parameter("bias", module._parameters["bias"])
    return layer


def _pointwise_of(module: nn.Module) -> nn.Module | None:
    if type(module) is not PointwiseLinear:
        return None
    layer = nn.Conv2d(module.in_features, module.out_features, 1, bias=module.bias is not None, device="meta")
    layer.weight = _like(module.weight, module.weight[:, :, None, None])
    layer.register_parameter("bias", module._parameters["bias"])
    return layer


def _like(parameter: torch.Tensor, value: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().contiguous(), requires_grad=parameter.requires_grad)


def _is_c3(module: nn.Module) -> bool:
    children = dict(module.named_children())
    if children.keys() != set(_PARTS):
        return False
    first, second, last = (_convolution(children[name]) for name in ("cv1", "cv2", "cv3"))
    if first is None or second is None or last is None:
        return False
    if last.groups != 1 or not first.out_channels == second.out_channels == last.in_channels / 2:
        return False
    return first.weight.is_meta or _computes_c3(module, first)


def _convolution(module: nn.Module) -> nn.Conv2d | None:
    """The first convolution of a part."""
    return next((part for part in module.modules() if isinstance(part, nn.Conv2d)), None)


@torch.no_grad()
def _computes_c3(module: nn.Module, first: nn.Conv2d) -> bool:
    trial = copy.deepcopy(module).eval()
    cv1, cv2, cv3, m = _parts(trial)
    x = torch.randn(1, first.in_channels, 8, 8).to(first.weight)
    try:
        return torch.equal(trial(x), cv3(torch.cat([m(cv1(x)), cv2(x)], dim=1)))
    except (RuntimeError, TypeError, NotImplementedError):
        return False


def _added(module: nn.Module) -> nn.Module:
    cv1, cv2, cv3, m = _parts(module)
    conv = _convolution(cv3)
    assert conv is not None
    conv.weight = _like(conv.weight, conv.weight.unflatten(1, (2, -1)).mean(1))
    conv.in_channels //= 2
    return AddedC3(cv1, cv2, cv3, m)


def _parts(module: nn.Module) -> tuple[nn.Module, ...]:
    return tuple(module.get_submodule(name) for name in _PARTS)
