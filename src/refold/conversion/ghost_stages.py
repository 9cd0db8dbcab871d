"""The conversion of any staged network: G-Ghost stages for its stages, in a copy."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from math import gcd

import torch
from torch import Tensor, nn

from refold.blocks import Cheap, GGhostStage, thin_width
from refold.errors import InputError

_SMALLEST = 3
# What layers call the numbers of their channels.
_WIDTHS = {"in_channels", "out_channels", "in_features", "out_features", "num_features", "num_channels"}


def stages_to_gghost(
    model: nn.Module,
    stages: Sequence[str] | None = None,
    *,
    ghost_ratio: float = 0.5,
    cheap: Cheap = "1x1",
    mix: int = 1,
) -> nn.Module:
    """A copy in which every stage is a ``GGhostStage``: first and last block as they were, thin ones between.

    A stage is a module that runs its children, three blocks or more, one after the other: ``layer3`` of torchvision's
    ResNets, ``s3`` of timm's RegNets, any ``nn.Sequential``. Each block has convolutions and maps ``(batch, channels,
    height, width)`` to such a map, of which the blocks behind the first change neither channels nor size. ``stages``
    names the modules. Without it all outermost ones of that shape are converted whose blocks, but for the first, have
    two convolutions or more; stages of two blocks stay.

    The thin blocks have ``1 - ghost_ratio`` of all channels, inner ones too, and read that many of the first
    block. They start from the weights of their first channels. ``cheap``, other than ``none``, and ``mix`` are those of
    ``GGhostStage``, and new. So the copy computes something else and needs training; the model is left as it was.

    Raises ``InputError`` where the model has no stage, a named module is none, or a block cannot be narrowed because
    it does not take its numbers of channels from its layers alone.

    Source: GhostNets on Heterogeneous Devices, sections 4.1 and 4.2, table 15.
    """
    if not 0 < ghost_ratio < 1:
        raise InputError(f"ghost_ratio is {ghost_ratio}; give the share of cheap channels, between 0 and 1.")
    if cheap == "none":
        raise InputError(
            "cheap is 'none', but a narrowed block cannot give all channels; choose '1x1', '3x3', '5x5' or 'identity'."
        )
    converted = copy.deepcopy(model)
    names = _stage_names(converted) if stages is None else list(stages)
    if not names:
        raise InputError(
            f"{type(model).__name__} has no module that runs {_SMALLEST} or more blocks of equal channels and size "
            "one after the other; give a network of stages, or name some with stages=[...] to see what they lack."
        )
    for name in names:
        stage = _submodule(converted, name)
        replacement = _converted_stage(stage, f"{name} of {type(model).__name__}", ghost_ratio, cheap, mix)
        converted.set_submodule(name, nn.Sequential(replacement).train(stage.training))
    # What `create_model` recorded no longer rebuilds this network.
    vars(converted).pop("architecture", None)
    return converted


class _NoStageError(Exception):
    """A module is no stage; the message says what it lacks."""


def _stage_names(model: nn.Module, prefix: str = "") -> list[str]:
    names = []
    for name, child in model.named_children():
        try:
            _stage_maps(child)
            _, *others = child.children()
            is_stage = all(len(_convolutions(block)) > 1 for block in others)
        except _NoStageError:
            is_stage = False
        names += [f"{prefix}{name}"] if is_stage else _stage_names(child, f"{prefix}{name}.")
    return names


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        names = ", ".join(child for child, _ in model.named_children())
        raise InputError(f"{type(model).__name__} has no module {name!r}; it has {names}.") from error


def _converted_stage(
    stage: nn.Module, described: str, ghost_ratio: float, cheap: Cheap, mix: int
) -> GGhostStage:
    try:
        base = _stage_maps(stage)[0]
    except _NoStageError as error:
        raise InputError(
            f"{described} is not a stage: {error}; name modules that run {_SMALLEST} or more blocks of equal channels "
            "and size one after the other."
        ) from error
    channels = base.shape[1]
    keep = partial(thin_width, ghost_ratio=ghost_ratio)
    first, *inner, last = stage.children()
    thin = []
    for index, block in enumerate(inner, start=1):
        narrow = _narrowed(block, keep)
        x = base[:, : keep(channels)]
        if _shape(narrow, x) != x.shape:
            raise InputError(
                f"Block {index} of {described}, a {type(block).__name__}, cannot be narrowed from {channels} to "
                f"{keep(channels)} channels by its layers alone; convert the other stages by naming them."
            )
        thin.append(narrow)
    built = GGhostStage(
        first, thin, last, channels=channels, thin_channels=keep(channels), cheap=cheap, mix=mix, split=True
    )
    for new in (built.cheap, built.mix):
        if new is not None:
            new.to(base)
    return built


@torch.no_grad()
def _stage_maps(stage: nn.Module) -> list[Tensor]:
    """What each block of a stage gives for a small map; raises where the module is no stage."""
    blocks = list(stage.children())
    if len(blocks) < _SMALLEST:
        raise _NoStageError(f"it has {len(blocks)} blocks")
    if not all(_convolutions(block) for block in blocks):
        raise _NoStageError("some of its children have no convolution")
    first = _convolutions(blocks[0])[0]
    trial = copy.deepcopy(stage).eval()
    x = torch.randn(1, first.in_channels, 16, 16).to(first.weight)
    maps: list[Tensor] = []
    try:
        for block in trial.children():
            maps.append(block((maps[-1] if maps else x).clone()))
        is_chain = maps[-1].is_meta or torch.equal(trial(x.clone()), maps[-1])
    except Exception as error:  # whatever a foreign block does with a map that it does not expect
        raise _NoStageError(
            f"its children do not run one after the other on a map of {first.in_channels} channels"
        ) from error
    if not is_chain:
        raise _NoStageError("it does something else than run its children one after the other")
    if any(y.shape != maps[0].shape for y in maps):
        raise _NoStageError("blocks behind its first one change the channels or the size")
    return maps


def _convolutions(module: nn.Module) -> list[nn.Conv2d]:
    return [part for part in module.modules() if isinstance(part, nn.Conv2d)]


@torch.no_grad()
def _shape(block: nn.Module, x: Tensor) -> torch.Size | None:
    try:
        y = copy.deepcopy(block).eval()(x.clone())
    except Exception:  # a foreign block that was cut may fail in any way
        return None
    return y.shape if isinstance(y, Tensor) else None


def _narrowed(block: nn.Module, keep: Callable[[int], int]) -> nn.Module:
    """A copy in which every layer has as many of its channels, the first ones, as `keep` says."""
    thin = copy.deepcopy(block)
    for module in thin.modules():
        group_width = module.weight.shape[1] if isinstance(module, nn.Conv2d) else 0
        for name, width in list(vars(module).items()):
            if name in _WIDTHS and isinstance(width, int):
                setattr(module, name, keep(width))
        inputs = None
        if isinstance(module, nn.Conv2d):
            module.groups = _groups(module.in_channels, module.out_channels, group_width)
            inputs = module.in_channels // module.groups
        elif isinstance(module, nn.Linear):
            inputs = module.in_features
        elif isinstance(module, nn.LayerNorm):
            module.normalized_shape = tuple(map(keep, module.normalized_shape))
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.dim():
                cut = _cut(parameter.detach(), keep, inputs)
                module._parameters[name] = nn.Parameter(cut, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.dim():
                module._buffers[name] = _cut(buffer, keep, inputs)
    return thin


def _groups(in_channels: int, out_channels: int, group_width: int) -> int:
    """The fewest groups that divide the channels and are no wider than they were; 1 where there are none."""
    common = gcd(in_channels, out_channels)
    fitting = (groups for groups in range(1, common + 1) if common % groups == 0)
    return next((groups for groups in fitting if in_channels <= groups * group_width), 1)


def _cut(tensor: Tensor, keep: Callable[[int], int], inputs: int | None) -> Tensor:
    """The first entries along the output channels and, of a weight, along the ``inputs`` too."""
    cut = tensor[: keep(tensor.shape[0])]
    return (cut[:, :inputs] if tensor.dim() > 1 else cut).clone()
