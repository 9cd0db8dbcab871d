"""The images that ranges are taken from and that answers are counted on: what is wrong with them is said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from refold.errors import InputError

# Fewer show too little of what the activations can be.
_FEW = 32


def checked_images(images: Any, title: str, notes: list[str], like: Tensor | None = None) -> Tensor:
    """The images as float32 on the CPU; notes where they are few.

    Raises `InputError` where they are no ``(n, channels, height, width)`` of finite numbers, none, or all one colour.
    """
    if not isinstance(images, Tensor):
        raise InputError(
            f"{title} are a {type(images).__name__}; give a tensor (n, channels, height, width), as "
            "refold.read_images makes it from a folder."
        )
    if images.dim() != 4 or not images.is_floating_point():
        raise InputError(
            f"{title} have the shape {tuple(images.shape)} and the dtype {images.dtype}; give prepared images "
            "(n, channels, height, width) of floating point numbers."
        )
    if not len(images):
        raise InputError(f"{title} are none; give a few hundred, such as the network was trained on.")
    if like is not None and images.shape[1:] != like.shape[1:]:
        raise InputError(
            f"{title} have the size {tuple(images.shape[1:])} and the others {tuple(like.shape[1:])}; "
            "prepare both alike."
        )
    images = images.detach().to("cpu", torch.float32).contiguous()
    if not images.isfinite().all():
        raise InputError(f"{title} hold NaN or infinity; look at how they are prepared.")
    flat = images.flatten(1)
    constant = int((flat.amax(1) == flat.amin(1)).sum())
    if constant == len(images):
        raise InputError(f"{title} are of one colour each; give photos such as the network will see.")
    if constant:
        notes.append(
            f"{constant} of {len(images)} images are of one colour each, which shows nothing of the ranges."
        )
    if len(images) < _FEW:
        notes.append(f"{len(images)} images are few to take ranges from; a few hundred make the file better.")
    checked: Tensor = images
    return checked


def checked_labels(labels: Sequence[int] | Tensor | None, images: Tensor, notes: list[str]) -> Tensor | None:
    """The classes of the images; raises `InputError` where there is not one whole number for each."""
    if labels is None:
        return None
    found = torch.as_tensor(labels)
    if found.shape != (len(images),) or found.is_floating_point():
        raise InputError(
            f"The labels have the shape {tuple(found.shape)}; give one whole number for each of {len(images)} images."
        )
    if len(found) > 1 and len(found.unique()) == 1:
        notes.append("All images are of one class, so that the right answers say little; give some of each.")
    return found
