"""The maps that a layer gives for an image, and which of them are primary and which are cheap."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from refold.blocks import GGhostStage, GhostConv2d, GhostModule
from refold.errors import InputError, first_line
from refold.recording.cost import evaluating


@dataclass(frozen=True)
class Maps:
    """The maps ``(channels, height, width)`` of ``layer``; ``parts`` are the names and channels of what it joins."""

    layer: str
    values: Tensor
    parts: tuple[tuple[str, int], ...] = ()

    @property
    def channels(self) -> int:
        """How many maps there are."""
        return len(self.values)


def map_layers(model: nn.Module, image: Tensor) -> dict[str, tuple[int, ...]]:
    """The layers that give maps for an image ``(1, channels, height, width)``, each with its maps' shape, as they run.

    Raises `InputError` where the model does not run on the image.
    """
    return {name: tuple(maps.shape[1:]) for name, maps in _outputs(model, image, lambda _: True)}


def feature_maps(model: nn.Module, image: Tensor, layer: str) -> Maps:
    """The maps of a named layer for an image ``(1, channels, height, width)``, in eval mode.

    Of a ghost module the primary maps come first, then the cheap ones (GhostNets, figure 7); of a G-Ghost stage those
    of the complicated path, then those of the cheap operation (figure 13).
    Raises `InputError`, with the nearest names, where no layer of this name gives maps.
    """
    module = dict(model.named_modules()).get(layer)
    if isinstance(module, GGhostStage):
        wanted = {
            f"{layer}.thin.{len(module.thin) - 1}": "complicated path",
            f"{layer}.act": "cheap operation",
        }
        found = dict(_outputs(model, image, wanted.__contains__))
        parts = [(title, found[name][0]) for name, title in wanted.items() if name in found]
        return Maps(
            layer, torch.cat([maps for _, maps in parts]), tuple((title, len(maps)) for title, maps in parts)
        )
    outputs = dict(_outputs(model, image, layer.__eq__))
    if layer not in outputs:
        known = map_layers(model, image)
        nearest = difflib.get_close_matches(layer, known, n=5, cutoff=0.3) or list(known)[:5]
        raise InputError(f"No layer '{layer}' gives maps; the nearest are {', '.join(nearest)}.")
    values = outputs[layer][0]
    if isinstance(module, GhostModule | GhostConv2d) and module.cheap is not None:
        primary = _channels(module.primary, values)
        return Maps(layer, values, (("primary", primary), ("cheap", len(values) - primary)))
    return Maps(layer, values)


def _channels(primary: nn.Module, values: Tensor) -> int:
    """The output channels of the first convolution of a ghost module."""
    convolutions = [part for part in primary.modules() if isinstance(part, nn.Conv2d)]
    return convolutions[-1].out_channels if convolutions else len(values)


def _outputs(model: nn.Module, image: Tensor, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    """The maps of the layers that are wanted, by name, in the order in which they ran; a shared one as it ran last."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 4 and len(output) == 1:
                found[name] = output.detach().clone()  # what follows may write into it

        return hook

    names = {name: module for name, module in model.named_modules() if name and wanted(name)}
    with _hooked(names, keep), torch.no_grad(), evaluating(model):
        try:
            model(image)
        except Exception as error:  # a network may refuse an image in any way
            raise InputError(
                f"The network cannot run on an image of {' x '.join(map(str, image.shape[1:]))} ({first_line(error)}); "
                "give an --input-size that it takes."
            ) from error
    yield from found.items()


@contextmanager
def _hooked(modules: Mapping[str, nn.Module], hook: Callable[[str], Callable[..., None]]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
