"""How images change in training together with what is marked in them: torchvision's transforms, as a recipe says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from refold.boxes.letterbox import GREY
from refold.training.labels import IGNORED
from refold.training.recipe import Recipe


def geometry(
    recipe: Recipe, preprocessing: Mapping[str, Any], mirror: bool, mask_fill: int = IGNORED
) -> v2.Transform:
    """Resize by chance, cut or fill to the network's size, mirror and colour; boxes and masks follow the image.

    An image is first fitted into the network's size and then scaled by a factor from ``resize_range``. Beside it a mask
    has the value ``mask_fill``.
    """
    _, height, width = preprocessing["input_size"]
    mode = InterpolationMode(preprocessing["interpolation"])
    fill: dict[Any, Any] = {Image.Image: GREY, tv_tensors.Mask: mask_fill, "others": 0}
    steps: list[v2.Transform] = [
        v2.ScaleJitter((height, width), recipe.resize_range, interpolation=mode),
        v2.RandomCrop((height, width), pad_if_needed=True, fill=fill),
        v2.RandomHorizontalFlip(recipe.horizontal_flip if mirror else 0.0),
    ]
    if recipe.color_jitter:
        amount = recipe.color_jitter
        steps.append(v2.ColorJitter(amount, amount, amount, min(amount / 10, 0.5)))
    return v2.Compose(steps)


sanitized = v2.SanitizeBoundingBoxes(min_size=2.0)
"""Leaves out what is less than two pixels high or wide of an image's boxes, with their labels and masks."""


def changing(recipe: Recipe, mirror: bool) -> list[str]:
    """The recipe's values that make an image another one in each epoch."""
    found = {
        "resize_range": recipe.resize_range != (1.0, 1.0),
        "horizontal_flip": mirror and recipe.horizontal_flip,
        "color_jitter": recipe.color_jitter,
    }
    return [key for key, value in found.items() if value]


def normalized(preprocessing: Mapping[str, Any]) -> v2.Transform:
    """From a picture to a float32 tensor ``(3, height, width)`` with the network's mean and deviation."""
    return v2.Compose(
        [
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(preprocessing["mean"]), list(preprocessing["std"])),
        ]
    )


def resampling(preprocessing: Mapping[str, Any]) -> Image.Resampling:
    """How Pillow resizes, by timm's name."""
    return Image.Resampling[str(preprocessing["interpolation"]).upper()]
