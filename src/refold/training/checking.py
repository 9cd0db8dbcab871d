"""What is checked and said before a run begins: mistakes cost no reading of images, and guesses are seen."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from refold.errors import InputError, RecipeError, RefoldError, first_line
from refold.targets import weights_file
from refold.training.images import LabelledImages
from refold.training.module import make_optimizer
from refold.training.pictures import sizes_of
from refold.training.progress import tell
from refold.training.recipe import Recipe
from refold.training.settings import STATE, Settings
from refold.training.tasks.classification import recipe_transforms

# A network that takes an image of this side takes a larger one, too, only later.
_LARGEST_TRIED = 512
_NAMED = 6
_LOOKED_AT = 40
# The parts of timm's policies, and how a part is written.
_PARTS = {
    "rand": ("m", "n", "p", "w", "mstd", "mmax", "inc", "t"),
    "augmix": ("m", "w", "d", "a", "b", "mstd"),
}
# More operations on one image than there are, and magnitudes beyond timm's scale.
_MOST = {"n": 20, "m": 30, "w": 20, "d": 20}
_PART = re.compile(r"([a-z]+)(\d+(?:\.\d+)?)|(t)[a-z]+")


def check_recipe(recipe: Recipe) -> None:
    """Raise `RecipeError` where timm does not understand the optimiser or the augmentation of a recipe."""
    try:
        make_optimizer(nn.Linear(1, 1), recipe)
    except RefoldError:
        raise
    except Exception as error:  # whatever an optimiser of timm's or of another package raises
        raise RecipeError(
            f"'optimizer' is '{recipe.optimizer}', which cannot be made here ({first_line(error)}); give another."
        ) from error
    _check_augmentation(recipe)
    preprocessing = {
        "input_size": (3, recipe.image_size, recipe.image_size),
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "crop_pct": 1.0,
    }
    try:
        recipe_transforms(recipe, preprocessing, mirror=True)
    except Exception as error:  # timm asserts, looks names up and converts numbers
        raise RecipeError(_not_understood(recipe.auto_augment)) from error


def _check_augmentation(recipe: Recipe) -> None:
    """timm takes a part of a policy that it does not know for nothing; here it is a mistake."""
    policy, *parts = (recipe.auto_augment or "").split("-")
    known = _PARTS.get(policy, ("mstd",))
    for part in parts:
        found = _PART.fullmatch(part)
        if (
            not found
            or (found[1] or found[3]) not in known
            or float(found[2] or 0) > _MOST.get(found[1], math.inf)
        ):
            raise RecipeError(_not_understood(recipe.auto_augment))


def _not_understood(policy: str | None) -> str:
    return (
        f"'auto_augment' is '{policy}', which timm does not understand; give null, original, rand-m9-mstd0.5 or "
        "another of its policies."
    )


def check_size(net: nn.Module, input_size: Sequence[int], name: str) -> None:
    """Raise `InputError` where a network does not take an image of a size (channels, height, width)."""
    channels, height, width = input_size
    if min(height, width) > _LARGEST_TRIED:
        return
    was_training = net.training
    reference = next((p for p in net.parameters() if p.is_floating_point()), torch.empty(0))
    try:
        with torch.no_grad():
            net.eval()(torch.zeros(1, channels, height, width, dtype=reference.dtype))
    except Exception as error:  # whatever the network's code raises
        raise InputError(
            f"{name} does not take images of {height} x {width} pixels ({first_line(error)}); give another image_size."
        ) from error
    finally:
        net.train(was_training)


def describe_start(
    settings: Settings, images: LabelledImages, preprocessing: dict[str, Any], console: Console
) -> None:
    """Say what is trained, what it starts from, on what, and how."""
    _, height, width = preprocessing["input_size"]
    recipe, names, counts = settings.recipe.recipe, images.class_names, images.count_training()
    shown = ", ".join(
        f"{name} {counts[index]:,}" if counts else name for index, name in enumerate(names[:_NAMED])
    )
    sizes = sizes_of(images.training.sources[:: max(1, len(images.training) // _LOOKED_AT)])
    usual = " x ".join(map(str, sizes.most_common(1)[0][0])) if sizes else "unknown"
    epochs = "1 epoch" if recipe.epochs == 1 else f"{recipe.epochs} epochs"
    lines = [
        f"{settings.network} starts from {_start(settings)}.",
        f"{images.title}: {len(images.training):,} training and {len(images.held_out):,} held-out images of "
        f"{len(names):,} classes ({shown}{', ...' if len(names) > _NAMED else ''}), "
        f"{'all' if len(sizes) == 1 else 'most often'} {usual} pixels.",
        f"Trained at {height} x {width} pixels, recipe {settings.recipe.name}: {epochs} in batches of "
        f"{recipe.batch_size}, learning rate {recipe.scaled_learning_rate:g}.",
    ]
    for line in lines:
        tell(console, line)


def _start(settings: Settings) -> str:
    if (settings.output / STATE).is_file():
        return f"the last whole epoch of '{settings.output}'"
    file = settings.checkpoint or weights_file(settings.network)
    if file is not None:
        return f"the weights in '{file}'"
    if settings.pretrained:
        return "its published weights"
    return "random weights"
