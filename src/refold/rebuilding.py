"""A network built again from what is recorded about it, and the record of one that timm built."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg
from torch import nn

from refold.cards import is_harmless, is_recordable
from refold.errors import CheckpointError
from refold.folding import FoldReport, apply_record, fold
from refold.models import create_model, default_cfgs, list_models
from refold.models.images import example_input
from refold.runs import RUN, STATE, TRAINING
from refold.unfolding import UnfoldReport, rebuild

_PREPROCESSING = ("input_size", "mean", "std", "interpolation", "crop_pct")


def reshaped(model: nn.Module, unfolded: Any, folded: Any) -> nn.Module:
    """The model in the form of a record: with branches, after whatever was done to it before, and then folded.

    Raises what reading a record that nobody wrote raises: `RefoldError`, KeyError, TypeError and their like.
    """
    if unfolded is not None:
        before = unfolded["before"]
        model = rebuild(reshaped(model, before["unfold"], before["fold"]) if before else model, unfolded)
    if folded is None:
        return model
    if not folded.get("record"):  # written before folds were recorded, or one that cannot be: search again
        return fold(model, example_input(model), prove=False, **folded.get("options", folded))
    plain = apply_record(model, folded["record"])
    plain.fold_report = FoldReport.from_dict(folded)  # type: ignore[assignment]  # nn.Module types its attributes as tensors and modules
    return plain


def architecture_of(model: nn.Module) -> dict[str, Any] | None:
    """The name and the arguments with which `refold.create_model` builds the network in training form.

    None where no name is known, or what a name builds is another network.
    """
    known = getattr(model, "architecture", None)
    # Code of the user's own may have changed what it was given by name.
    is_as_built = not hasattr(model, "built_from")
    if known is not None and is_recordable(known) and (is_as_built or _builds(known, model)):
        return dict(known)
    found = _timm_architecture(model)
    return found if found is not None and is_recordable(found) and _builds(found, model) else None


def own_preprocessing(model: nn.Module, name: str) -> dict[str, Any] | None:
    """What the network's images look like, in timm's terms, where that is not what its name says."""
    own = getattr(model, "pretrained_cfg", None) or {}
    usual = default_cfgs.get(name) or get_pretrained_cfg(name)
    if not isinstance(own, Mapping) or usual is None:
        return None
    described = {key: own[key] for key in _PREPROCESSING if own.get(key) is not None}
    expected = {key: getattr(usual, key) for key in described}
    plain: dict[str, Any] = json.loads(json.dumps(described))
    return None if plain == json.loads(json.dumps(expected)) else plain


def network_of_run(folder: Path) -> str | None:
    """The name of the network that a run trains; None where its ``run.json`` is missing or names none of a registry.

    Raises `CheckpointError` where the run gives the network branches, which its name does not tell.
    """
    try:
        written = json.loads((folder / RUN).read_text(encoding="utf-8"))
        name, plan = written["network"], written.get("unfold")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    if not isinstance(name, str) or not is_recordable({"name": name, "arguments": {}}):
        return None
    if plan is not None:
        raise CheckpointError(
            f"'{folder / STATE}' holds {name} with the branches of a plan, which {TRAINING} beside it would describe; "
            "put that file back, or resume the run."
        )
    return name


def _timm_architecture(model: nn.Module) -> dict[str, Any] | None:
    configured = getattr(model, "pretrained_cfg", None)
    if not isinstance(configured, Mapping) or not isinstance(configured.get("architecture"), str):
        return None
    name = configured["architecture"]
    if not timm.is_model(name):
        return None
    if name in list_models():  # refold has another network of that name; timm's own is that with a tag
        name = f"{name}.{configured.get('tag')}"
    # How timm was called, but for what was changed since.
    arguments = dict(getattr(model, "_model_args", None) or {})
    for key in ("num_classes", "in_chans"):
        value = getattr(model, key, None)
        if value is None and key == "in_chans":  # older versions of timm do not keep it
            value = _channels_read(model)
        if isinstance(value, int) and not arguments.get("features_only"):
            arguments[key] = value
    return {"name": name, "arguments": {key: value for key, value in arguments.items() if is_harmless(key)}}


def _channels_read(model: nn.Module) -> int | None:
    """The channels of the images, by the first convolution; whether that was right, `_builds` finds out."""
    return next((part.in_channels for part in model.modules() if isinstance(part, nn.Conv2d)), None)


def _builds(architecture: Mapping[str, Any], model: nn.Module) -> bool:
    """Whether that gives the same layers, with tensors of the same names and shapes, as the model has."""
    report, folded = getattr(model, "unfold_report", None), getattr(model, "fold_report", None)
    if folded is not None and not folded.record:
        return False  # it would have to be folded to be compared
    try:
        with torch.device("meta"):
            built = reshaped(
                create_model(architecture["name"], **architecture["arguments"]),
                report.to_dict() if isinstance(report, UnfoldReport) else None,
                None if folded is None else folded.to_dict(),
            )
    except Exception:  # some networks need real tensors to begin with; this one stays without a name
        return False
    shapes = [{key: value.shape for key, value in net.state_dict().items()} for net in (built, model)]
    return shapes[0] == shapes[1] and repr(built) == repr(model)
