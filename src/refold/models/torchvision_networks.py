"""torchvision's classifiers by name, such as ``torchvision/shufflenet_v2_x1_0``."""

from __future__ import annotations

import difflib
from typing import Any

from torch import nn
from torchvision import models
from torchvision.models import get_model, get_model_weights

from refold.errors import InputError, UnknownModel

PREFIX = "torchvision/"

# Their second classifiers, which only torchvision's own training uses, make tuples of what others answer with a tensor.
_WITH_AUXILIARIES = ("googlenet", "inception_v3")


def list_torchvision() -> list[str]:
    """The names of torchvision's classifiers, with the prefix."""
    return [f"{PREFIX}{name}" for name in models.list_models(module=models)]


def check_torchvision_name(name: str) -> None:
    """Raise `UnknownModel`, with the nearest names, where torchvision has no such classifier."""
    known = list_torchvision()
    if name not in known:
        nearest = difflib.get_close_matches(name.lower(), known, n=5, cutoff=0.5)
        hint = f"the nearest names are {', '.join(nearest)}" if nearest else f"such as {', '.join(known[:3])}"
        raise UnknownModel(f"torchvision has no classifier named {name.removeprefix(PREFIX)!r}; {hint}.")


def build_torchvision(
    name: str, pretrained: bool = False, num_classes: int | None = None, **arguments: Any
) -> nn.Module:
    """torchvision's classifier, with the preprocessing of its published weights in ``pretrained_cfg``, as timm has it.

    ``pretrained`` loads those weights; with another ``num_classes`` the classifier starts anew. The other keywords are
    torchvision's. Raises `UnknownModel` where it has no such classifier, `InputError` for ``features_only``.
    """
    check_torchvision_name(name)
    own = name.removeprefix(PREFIX)
    if arguments.pop("features_only", False):
        raise InputError(
            f"'{name}' gives no maps of its stages, as features_only and heads ask for; name one of timm or refold."
        )
    weights = get_model_weights(own).DEFAULT
    categories = len(weights.meta["categories"])
    if own in _WITH_AUXILIARIES and not pretrained:
        arguments = {"aux_logits": False, "init_weights": True, **arguments}
    classes = categories if num_classes is None else num_classes
    network: Any = get_model(
        own,
        weights=weights if pretrained else None,
        num_classes=categories if pretrained else classes,
        **arguments,
    )
    if hasattr(network, "AuxLogits"):  # comes with the weights of inception_v3
        network.aux_logits, network.AuxLogits = False, None
    if pretrained and classes != categories:
        _replace_classifier(network, categories, classes)
    network.pretrained_cfg = _preprocessing(name, weights, classes)
    built: nn.Module = network
    return built


def _replace_classifier(network: nn.Module, categories: int, classes: int) -> None:
    name, last = [
        (name, module)
        for name, module in network.named_modules()
        if getattr(module, "out_features", getattr(module, "out_channels", None)) == categories
    ][-1]
    new: nn.Module
    if isinstance(last, nn.Linear):
        new = nn.Linear(last.in_features, classes, bias=last.bias is not None)
    else:
        assert isinstance(last, nn.Conv2d)
        new = nn.Conv2d(last.in_channels, classes, 1)
    network.set_submodule(name, new)


def _preprocessing(name: str, weights: Any, classes: int) -> dict[str, Any]:
    transform = weights.transforms()
    crop, resize = transform.crop_size[0], transform.resize_size[0]
    return {
        "architecture": name,
        "num_classes": classes,
        "input_size": (3, crop, crop),
        "mean": tuple(transform.mean),
        "std": tuple(transform.std),
        "interpolation": transform.interpolation.value,
        "crop_pct": crop / resize,
    }
