"""The conversion of any network to C-Ghost: ghost modules for its convolutions, in a copy."""

import copy
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from refold.blocks import GhostConv2d, GhostModule
from refold.conversion.layer_kinds import replaced
from refold.conversion.observation import ConvolutionRun, observe_convolutions, run_once
from refold.errors import InputError, first_line
from refold.models.images import example_input as image_for
from refold.recording.recording import has_hooks

_GHOSTS = (GhostModule, GhostConv2d)
_SHAPE = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


def convolutions_to_ghost(
    model: nn.Module,
    ratio: int = 2,
    cheap_kernel_size: int = 3,
    *,
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    example_input: Tensor | None = None,
) -> nn.Module:
    """A copy in which ghost modules stand for the convolutions of any model.

    Each ``nn.Conv2d`` becomes a ``GhostConv2d`` of the same shape. Where a batch norm alone reads its output, that
    norm moves into the module, one for each half, and the activation behind it stays; the cheap convolution reads the
    primary outputs through that activation too. So the sizes are those of the paper's networks.

    Left as they are: the first convolution that runs, depthwise and grouped ones, those with fewer than
    ``2 * ratio`` output channels, those whose map is a single pixel (squeeze-excite, heads), and what is already part
    of a ghost module. ``include`` and ``exclude`` are shell-style patterns of module names, such as ``layer4.*``: what
    ``include`` names is replaced all the same, what ``exclude`` names never. Subclasses of ``nn.Conv2d``, layers with
    hooks or computed weights and layers that do not run are never replaced.

    The primary convolutions and their norms start from the first filters of what they replace; the cheap ones are
    new. So the copy computes something else and needs training; the model is left as it was. How the layers follow
    each other is seen by running ``example_input``, a batch of images; without one, a random image of the size that
    the model states in its ``pretrained_cfg``, else of 224x224 pixels.

    Raises ``InputError`` where the model has nothing to replace, a pattern names no convolution or one that cannot be
    replaced, the ratio is below 2, the ``cheap_kernel_size`` is even, or the model does not run on the image, before
    or after.

    Source: GhostNets on Heterogeneous Devices, sections 3.1, 5.2.2 and 5.2.3.
    """
    if ratio < 2:
        raise InputError(
            f"ratio is {ratio}; give 2 or more: so many times fewer channels are computed in full."
        )
    # Held until the end: the identity of a replaced module must not be given to a new one.
    whole = copy.deepcopy(model)
    arguments = (image_for(whole) if example_input is None else example_input,)
    runs, _ = observe_convolutions(whole, arguments)
    layers = {name: module for name, module in whole.named_modules() if isinstance(module, nn.Conv2d)}
    ghosts = [
        module for module in whole.modules() if isinstance(module, _GHOSTS) and module.cheap is not None
    ]
    parts = {id(part) for ghost in ghosts for part in ghost.modules()}
    reasons = {name: _reason_to_leave(layer, runs, parts, ratio) for name, layer in layers.items()}
    included, excluded = _matches("include", include, layers), _matches("exclude", exclude, layers)
    replacements: dict[int, nn.Module] = {}
    for name in _chosen(reasons, included - excluded, excluded):
        layer = layers[name]
        run = runs[id(layer)]
        replacements[id(layer)] = _ghost(layer, run, ratio, cheap_kernel_size)
        if run.norm is not None:
            replacements[id(run.norm)] = _rest_of(run.norm)
    if not replacements:
        raise InputError(_nothing_to_replace(model, reasons, excluded))
    vars(whole).pop("architecture", None)  # by its record another network would be built
    converted = replaced(whole, lambda module: replacements.get(id(module)))
    try:
        run_once(converted, arguments)
    except Exception as error:
        raise InputError(
            f"{type(model).__name__} does not run with ghost modules ({first_line(error)}): "
            "its code asks for more than what a convolution computes; exclude those that it asks."
        ) from error
    return converted


@dataclass(frozen=True)
class _Reason:
    """Why a convolution is left as it is; a final reason holds for included ones too."""

    text: str
    is_final: bool = False


def _reason_to_leave(
    layer: nn.Conv2d, runs: dict[int, ConvolutionRun], parts_of_ghosts: set[int], ratio: int
) -> _Reason | None:
    run = runs.get(id(layer))
    if type(layer) is not nn.Conv2d:
        return _Reason("is a subclass of nn.Conv2d", is_final=True)
    if is_parametrized(layer) or has_hooks(layer):
        return _Reason("has hooks or a computed weight", is_final=True)
    if run is None:
        return _Reason("does not run", is_final=True)
    if id(layer) in parts_of_ghosts:
        return _Reason("is part of a ghost module", is_final=True)
    if run.place == 0:
        return _Reason("is the first one")
    if layer.groups > 1:
        return _Reason("is grouped")
    if layer.out_channels < 2 * ratio:
        return _Reason(f"has fewer than {2 * ratio} output channels")
    if run.pixels == 1:
        return _Reason("gives a single pixel")
    return None


def _matches(argument: str, patterns: str | Iterable[str], layers: dict[str, nn.Conv2d]) -> set[str]:
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matching = {name for name in layers if fnmatchcase(name, pattern)}
        if not matching:
            some = ", ".join([*list(layers)[:5], *["..."][: len(layers) > 5]]) or "none"
            raise InputError(f"{argument}={pattern!r} names no convolution; the model's are {some}.")
        found |= matching
    return found


def _chosen(reasons: dict[str, _Reason | None], included: set[str], excluded: set[str]) -> list[str]:
    """The convolutions to replace. Raises InputError where an included one cannot be."""
    chosen = []
    for name, reason in reasons.items():
        if name in included and reason is not None and reason.is_final:
            raise InputError(
                f"The convolution {name} cannot be replaced, since it {reason.text}; exclude it."
            )
        if name not in excluded and (reason is None or name in included):
            chosen.append(name)
    return chosen


def _nothing_to_replace(model: nn.Module, reasons: dict[str, _Reason | None], excluded: set[str]) -> str:
    texts = [
        "is excluded" if name in excluded or not reason else reason.text for name, reason in reasons.items()
    ]
    counts = ", ".join(f"{text} ({count})" for text, count in Counter(texts).items())
    why = f"each of its {len(texts)} convolutions {counts}" if texts else "it has no nn.Conv2d"
    return (
        f"{type(model).__name__} has no convolution to replace: {why}; "
        "name some by include=..., or give another model or a smaller ratio."
    )


def _ghost(layer: nn.Conv2d, run: ConvolutionRun, ratio: int, cheap_kernel_size: int) -> GhostConv2d:
    """The module for a layer and its norm, with the first filters of the layer and values of the norm."""
    norm = run.norm
    shape: dict[str, Any] = {name: getattr(layer, name) for name in _SHAPE}
    with torch.device(layer.weight.device):
        ghost = GhostConv2d(
            layer.in_channels,
            layer.out_channels,
            **shape,
            bias=layer.bias is not None,
            ratio=ratio,
            cheap_kernel_size=cheap_kernel_size,
            norm=None if norm is None else _norm_like(norm),
            activation=run.activation,
        ).to(layer.weight.dtype)
    kept = ghost.get_parameter("primary.conv.weight").shape[0] // layer.groups
    # Every group of a grouped layer keeps as many of its filters.
    by_group = torch.arange(layer.out_channels, device=layer.weight.device).unflatten(0, (layer.groups, -1))
    first, others = by_group[:, :kept].flatten(), by_group[:, kept:].flatten()
    _fill(ghost.get_submodule("primary.conv"), layer, first, ("weight", "bias"))
    if norm is not None:
        values = ("weight", "bias", "running_mean", "running_var")
        _fill(ghost.get_submodule("primary.bn"), norm, first, values)
        if ghost.cheap is not None:
            _fill(ghost.get_submodule("cheap.bn"), norm, others, ("weight", "bias"))
    return ghost


def _norm_like(norm: nn.Module) -> Callable[[int], nn.Module]:
    kind = nn.SyncBatchNorm if isinstance(norm, nn.SyncBatchNorm) else nn.BatchNorm2d
    names = ("eps", "momentum", "affine", "track_running_stats")
    return partial(kind, **{name: getattr(norm, name) for name in names})


def _rest_of(norm: nn.Module) -> nn.Module:
    """What stays behind the module of a batch norm that moved into it."""
    return nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()


@torch.no_grad()
def _fill(layer: nn.Module, source: nn.Module, channels: Tensor, names: Iterable[str]) -> None:
    """Give the first channels of a layer the values that another one has for these channels."""
    for name in names:
        values, theirs = getattr(layer, name), getattr(source, name)
        if values is not None:
            values[: len(channels)] = theirs[channels].to(values)
            values.requires_grad_(theirs.requires_grad)
