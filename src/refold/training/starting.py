"""What a run starts from: the network to train, and the images in memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from refold.checkpoints import class_count, read_card
from refold.errors import CheckpointError, InputError, RecipeError
from refold.files import PathLike
from refold.models import create_model
from refold.models.composed import task_of
from refold.models.loading import read_weights
from refold.own_code import OwnNetwork, is_own_code, takes
from refold.targets import Say, building, model_arguments, open_network, weights_file
from refold.training.callbacks import Unreadable
from refold.training.images import LabelledImages, read_into_memory
from refold.training.progress import progress, tell
from refold.training.recipe import Recipe
from refold.unfolding import rebuild

_LARGEST_MEMORY = 2 * 1024**3


def build_network(
    target: str,
    classes: int,
    recipe: Recipe,
    checkpoint: PathLike | None = None,
    model_args: Sequence[str] | None = None,
    say: Say = lambda _: None,
    *,
    pretrained: bool = False,
) -> nn.Module:
    """The network that a text names, for that many classes, with the recipe's dropout and ``model_args`` (KEY=VALUE).

    With a ``checkpoint``, one in the place of the name, or the published weights of a ``pretrained`` network, the
    weights are taken over, but for a classifier of another number of classes, and so are the branches of a network that
    was unfolded. What was stripped goes to ``say``.
    Raises `CheckpointError` where the checkpoint does not fit, `UnknownModel` where nobody has the name, `RecipeError`
    where the network has no such rate, and `InputError` where it has another number of classes.
    """
    arguments = model_arguments(model_args)
    if checkpoint is not None and task_of(target) != "classify":
        backbone = _backbone_weights(target, checkpoint)
        if backbone is not None:
            say(f"{checkpoint}: weights of the backbone alone; the head starts anew.")
            return _untrained(target, classes, recipe, {**arguments, "pretrained": True, **backbone})
    is_file = weights_file(target) is not None
    source: Any = None
    if is_file or checkpoint is not None or pretrained:
        source = open_network(
            target, checkpoint, arguments, required="training", pretrained=pretrained, say=say
        )
    if is_file:
        checkpoint = target
        target = source.architecture["name"]
        arguments = {**source.architecture["arguments"], **arguments}
    net = _untrained(target, classes, recipe, arguments)
    if source is None:
        return net
    report: Any = getattr(source, "unfold_report", None)
    if report is not None:
        net = rebuild(net, report.to_dict())
    own, theirs = net.state_dict(), source.state_dict()
    fitting = {key: value for key, value in theirs.items() if key in own and own[key].shape == value.shape}
    left = own.keys() - fitting.keys()
    if not _is_classifier(left, net, theirs, classes):
        raise CheckpointError(
            f"'{checkpoint}' does not fit {target}: it has nothing for '{min(left)}'; name the network it is of."
        )
    if left:
        origin = "the published weights" if checkpoint is None else checkpoint
        say(f"{origin}: the classifier is one of other classes; a new one for {classes} starts.")
    net.load_state_dict(fitting, strict=False)
    card = getattr(source, "card", None)
    if card is not None and card.preprocessing is not None:
        net.pretrained_cfg = (getattr(net, "pretrained_cfg", None) or {}) | card.preprocessing
    return net


def _backbone_weights(target: str, checkpoint: PathLike) -> dict[str, Any] | None:
    """How the backbone of a detector or segmenter takes its weights from a classifier's checkpoint; None for others."""
    file = weights_file(str(checkpoint)) or Path(checkpoint)
    weights = read_weights(file)
    if any(key.startswith("backbone.features.") for key in weights):
        return None
    card = read_card(file)
    name = target.partition("/")[2]
    if card is not None and card.architecture not in (None, name):
        raise CheckpointError(f"'{checkpoint}' is of {card.title}, and the backbone of {target} is {name}.")
    if card is not None and card.form == "plain":
        raise CheckpointError(
            f"'{checkpoint}' is in plain form, and training needs the training form; give that file."
        )
    known = (card.preprocessing if card is not None else None) or {}
    return {"pretrained_cfg_overlay": {**known, "state_dict": weights}}


def _untrained(target: str, classes: int, recipe: Recipe, given: Mapping[str, Any]) -> nn.Module:
    rates = {"drop_rate": ("dropout", recipe.dropout), "drop_path_rate": ("drop_path", recipe.drop_path)}
    arguments = {name: rate for name, (_, rate) in rates.items() if rate is not None} | dict(given)
    if not is_own_code(target):
        arguments["num_classes"] = classes
        try:
            with building(target, arguments):
                return create_model(target, **arguments)
        except InputError as error:
            for name, (key, rate) in rates.items():
                if rate is not None and f"'{name}'" in str(error):
                    raise _no_rate(target, key, rate) from error
            raise
    network = OwnNetwork(target)
    for name, (key, rate) in rates.items():
        if name in arguments and not takes(network, name):
            if rate:
                raise _no_rate(target, key, rate)
            del arguments[name]
    if takes(network, "num_classes"):
        arguments["num_classes"] = classes
    net = network(**arguments)
    found = class_count(net)
    if found not in (None, classes):
        raise InputError(
            f"'{target}' answers with {found} numbers and the data has {classes} classes; let it take num_classes, or "
            "give --model-args."
        )
    return net


def _no_rate(target: str, key: str, rate: float) -> RecipeError:
    return RecipeError(
        f"'{key}' is {rate:g} in the recipe, but {target} has no such rate; leave it out: --set {key}=null."
    )


def preprocessing_for(net: nn.Module, recipe: Recipe, checkpoint: PathLike | None = None) -> dict[str, Any]:
    """How images are prepared for a network, in timm's terms: the recipe's size, the network's mean and std.

    A checkpoint of refold's brings its own mean and std. Held-out images below 128 pixels are not cropped.
    """
    known = dict(getattr(net, "pretrained_cfg", None) or {})
    card = None if checkpoint is None else read_card(checkpoint)
    if card is not None and card.preprocessing is not None:
        known |= card.preprocessing
    side = recipe.image_size
    return {
        "input_size": [3, side, side],
        "interpolation": known.get("interpolation") or "bicubic",
        "mean": list(known.get("mean") or IMAGENET_DEFAULT_MEAN),
        "std": list(known.get("std") or IMAGENET_DEFAULT_STD),
        "crop_pct": 1.0 if side < 128 else known.get("crop_pct") or 0.875,
    }


def ready(
    images: LabelledImages, recipe: Recipe, unreadable: Unreadable, console: Console, devices: int
) -> LabelledImages:
    """Read the images into memory, for each process, where they fit: large enough for the recipe's smallest crop.

    Raises `InputError` where none to train on can be read of a class.
    """
    if not fit_in_memory(images, recipe, devices):
        return images
    total, side = len(images.training) + len(images.held_out), _largest_side(recipe)
    with progress(console) as shown:
        task = shown.add_task("Reading images", total=total, note="")
        parts = [
            read_into_memory(part, side, lambda: shown.advance(task), unreadable.add)
            for part in (images.training, images.held_out)
        ]
    if not all(parts):
        raise InputError(f"No image of '{images.title}' can be read; repair or replace them.")
    training, held_out = (
        [images.class_names[target] for target in sorted({*before.targets} - {*read.targets})]
        for before, read in zip((images.training, images.held_out), parts, strict=True)
    )
    if training:
        raise InputError(
            f"No training image of the class '{training[0]}' of '{images.title}' can be read; repair or replace them, "
            "or remove the class."
        )
    for name in held_out:
        tell(
            console, f"No held-out image of the class '{name}' can be read: the accuracy says nothing of it."
        )
    return dataclasses.replace(images, training=parts[0], held_out=parts[1])


def fit_in_memory(images: LabelledImages, recipe: Recipe, devices: int) -> bool:
    """Whether as many processes as there are ``devices`` can each keep all images in memory."""
    if images.keeps_size:
        return False
    total = len(images.training) + len(images.held_out)
    return total * 4 * _largest_side(recipe) ** 2 * devices <= _LARGEST_MEMORY


def _largest_side(recipe: Recipe) -> int:
    smallest = 1.0 if recipe.crop_padding is not None else recipe.crop_scale[0]
    return round(recipe.image_size / math.sqrt(smallest))


def _is_classifier(left: set[str], net: nn.Module, theirs: Mapping[str, torch.Tensor], classes: int) -> bool:
    """Whether the tensors that are left without weights, if any, are those of the network's classifier."""
    if not left:
        return True
    layers: tuple[str, ...] = getattr(net, "class_layers", ())
    if layers:
        return all(key.startswith(layers) for key in left)
    state: dict[str, torch.Tensor] = net.state_dict(keep_vars=True)
    get_classifier: Any = getattr(net, "get_classifier", None)
    classifier = None if get_classifier is None else get_classifier()
    if isinstance(classifier, nn.Module):
        held = {id(parameter) for parameter in classifier.parameters()}
        return all(id(state[key]) in held for key in left)
    # A network of the user's own shows it by its rows: one for each class.
    return len({key.rpartition(".")[0] for key in left}) == 1 and all(
        key in theirs and state[key].shape == (classes, *theirs[key].shape[1:]) for key in left
    )
