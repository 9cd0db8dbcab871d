"""Runs with the rounding of an int8 file in the loop: what they start from, and the file that they end with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from refold.checkpoints import example_input, read_card
from refold.errors import InputError, NotEquivalent
from refold.folding import fold
from refold.models.classes import class_count
from refold.quantization import checking
from refold.quantization.config import QuantizationConfig
from refold.quantization.filling import Filled, in_parts
from refold.quantization.forms import forms_of
from refold.quantization.images import checked_images
from refold.quantization.lockstep import decibels
from refold.quantization.rounded import RoundedNetwork
from refold.quantization.skeleton import Array, Graph
from refold.targets import Say, model_arguments, network_file, open_network
from refold.training.batches import held_out_loader
from refold.training.callbacks import Keeper, Unreadable
from refold.training.curves import draw_curves
from refold.training.finishing import compared, write_cards
from refold.training.images import Images, LabelledImages
from refold.training.module import TrainingModule
from refold.training.recipe import Recipe
from refold.training.settings import CARD, CURVES, HISTORY, INT8, MODEL_CARD, Result, Settings
from refold.training.starting import preprocessing_for
from refold.training.tasks import task_for

# Held-out images on which distances are measured, and on which the engine is held to float arithmetic.
_MEASURED, _CHECKED = 500, 60
# What a file must be near to what was trained: less is more than single values that are rounded the other way.
_LEAST = 30.0


def fitted(settings: Settings) -> Settings:
    """The settings with the image size of the network that is to learn rounding, where the recipe leaves it open."""
    if not settings.rounds or settings.recipe.sources.get("image_size") != "default":
        return settings
    given = Path(settings.checkpoint or settings.network)
    is_named = settings.checkpoint is not None and given.is_file()  # whatever the file is called
    file = given if is_named else network_file(str(given), "plain")
    card = read_card(file) if file is not None and file.suffix != ".onnx" else None
    size = ((card.preprocessing if card is not None else None) or {}).get("input_size")
    if size is None:
        return settings
    recipe = settings.recipe.override({"image_size": size[-1]}, "what the network was trained at")
    return dataclasses.replace(settings, recipe=recipe)


def rounded_start(
    settings: Settings, images: LabelledImages, say: Say
) -> tuple[RoundedNetwork, dict[str, Any]]:
    """The network as `refold.quantize` would write it, to be trained, and how its images are prepared.

    Its ranges are those of the recipe's number of training images, prepared as for measuring.
    Raises `InputError` where there are no trained weights, they are of other classes, or a setting does not go with
    rounding.
    """
    recipe = settings.recipe.recipe
    _check(settings)
    net = _trained(settings, images, say)
    preprocessing = preprocessing_for(net, recipe)
    example = example_input(net, preprocessing["input_size"])
    plain = net if hasattr(net, "fold_report") else fold(net, example)
    config = QuantizationConfig(
        cpu=recipe.processor,
        weights=recipe.weight_scales,
        bits=recipe.weight_bits or 8,
        keep_identity=recipe.keep_identity,
    )
    notes: list[str] = []
    photos = checked_images(
        _some(images.training, images, recipe, preprocessing, recipe.calibration_images),
        "The training images",
        notes,
    )
    form = forms_of(plain, example, config)[0]
    with TemporaryDirectory() as folder:
        found = Filled(form.network, Path(folder), photos, config, images.class_names)
        found.fill()
    for note in (*notes, *found.notes, *found.result.notes):
        say(note)
    return RoundedNetwork(found, form.network), preprocessing


def _check(settings: Settings) -> None:
    if settings.unfold is not None:
        raise InputError("Rounding is learnt on the plain form, which has no branches; leave unfold out.")
    if settings.precision.endswith("-true") and settings.precision != "32-true":
        raise InputError(
            f"The precision is '{settings.precision}', and rounding to int8 is computed in float32; give 32-true."
        )


def _trained(settings: Settings, images: LabelledImages, say: Say) -> nn.Module:
    """The float network, in either form, of the classes of the data."""
    is_file = network_file(settings.network, "plain") is not None
    if not (is_file or settings.checkpoint or settings.pretrained):
        raise InputError(
            f"Rounding is learnt from trained weights, and {settings.network} has none; name a checkpoint or a run, or "
            "give checkpoint or pretrained."
        )
    net = open_network(
        settings.network,
        settings.checkpoint,
        model_arguments(settings.model_args),
        form="plain",
        pretrained=settings.pretrained,
        say=say,
    )
    found, classes = class_count(net), len(images.class_names)
    card: Any = getattr(net, "card", None)
    if found not in (None, classes):
        raise InputError(
            f"{settings.network} answers with {found} numbers and the data has {classes} classes; give the data that "
            "it was trained on."
        )
    if card is not None and card.class_names and list(card.class_names) != images.class_names:
        stranger = min(set(card.class_names) ^ set(images.class_names), default=card.class_names[0])
        raise InputError(
            f"{settings.network} has other classes than the data, or another order of them ('{stranger}'); give the "
            "data that it was trained on."
        )
    if card is not None and card.preprocessing is not None:
        net.pretrained_cfg = (getattr(net, "pretrained_cfg", None) or {}) | card.preprocessing
    return net


def _some(
    part: Images, images: LabelledImages, recipe: Recipe, preprocessing: dict[str, Any], count: int
) -> Tensor:
    """As many images of a part, evenly spread, prepared as for measuring; those that cannot be read are left out."""
    task = task_for(images, recipe)
    if task.export_options:
        raise InputError(
            f"Rounding is learnt for networks whose files hold nothing but the network, and for '{task.name}' they "
            "hold more; quantise it without training (refold quantize)."
        )
    _, measure = task.transforms(recipe, preprocessing, images.mirror)
    places = (
        [int(place * len(part) / count) for place in range(count)] if count < len(part) else range(len(part))
    )
    chosen = Images([part.sources[i] for i in places], [part.targets[i] for i in places])
    batches = held_out_loader(chosen, measure, 64, workers=0, collate=task.collate)
    found = [batch.images for batch in batches if len(batch.images)]
    if not found:
        raise InputError(f"No image of '{images.title}' can be read; repair or replace them.")
    return torch.cat(found)


def finish_rounded(
    settings: Settings, module: TrainingModule, keeper: Keeper, unreadable: Unreadable, console: Console
) -> Result:
    """Hold the int8 file of the best epoch to what was trained, write what belongs to the run, and say what it gave.

    Raises `NotEquivalent` where the file computes something else.
    """
    folder, images, task = settings.output, module.images, module.task
    assert isinstance(module.net, RoundedNetwork)
    assert keeper.best is not None
    trained = module.net.cpu().with_integers(folder / INT8).eval()
    plain: Any = trained.plain.cpu().eval()
    start, file = checking.opened(Path(), data=trained.start), checking.opened(folder / INT8)
    with console.status("Holding the int8 file to what was trained"):
        facts = _facts(settings, module, trained, start, file)
    with console.status("Asking each form about the held-out images"):
        found = compared(module, [plain, trained], [_of_tensors(start), _of_tensors(file)])
    draw_curves(
        folder / CURVES, f"{settings.network}, {images.title}", keeper.rows, task.score, task.score_title
    )
    facts |= {"start_score": found.scores[2], "start_same_answers": found.same[2]}
    result = Result(
        best=keeper.best,
        epochs=len(keeper.rows),
        score=task.score_title,
        training_score=found.scores[1],
        plain_score=found.scores[0],
        onnx_score=found.scores[3],
        same_answers=found.same[1],
        onnx_same_answers=found.same[3],
        held_out_images=found.images,
        unreadable=list(unreadable.messages),
        proof=plain.fold_report.proof.to_dict(),
        export_difference=facts.pop("export_difference"),
        files={name: str(folder / name) for name in (MODEL_CARD, INT8, CARD, HISTORY, CURVES)},
        int8=facts,
    )
    write_cards(settings, module, unreadable, result)
    return result


def _facts(
    settings: Settings,
    module: TrainingModule,
    trained: RoundedNetwork,
    start: checking.Session,
    file: checking.Session,
) -> dict[str, Any]:
    """Distances of the file on held-out images, and what its integers show."""
    recipe = settings.recipe.recipe
    path = settings.output / INT8
    held_out = _some(module.images.held_out, module.images, recipe, module.preprocessing, _MEASURED)
    parts = in_parts(held_out)
    with torch.inference_mode():
        wanted, rounded = (_outputs(net, parts) for net in (trained.plain, trained))
    first, last = (checking.outputs_of(run, parts) for run in (start, file))
    near = decibels(rounded, last)
    if near < _LEAST:
        raise NotEquivalent(
            f"The int8 file is {near:.1f} dB from what was trained, and {_LEAST:g} are the least; give processor=any, "
            "whose scales fit every arithmetic."
        )
    graph = Graph(onnx.load(str(path)))
    some = parts[: max(1, _CHECKED // len(parts[0]))]
    count = sum(map(len, some))
    gap = checking.check_engine(path, graph, [value[:count] for value in wanted], some, file, "ONNX Runtime")
    layers = checking.layer_reports(graph, [], recipe.weight_bits or 8)
    return {
        "bits": recipe.weight_bits,
        "weights": recipe.weight_scales,
        "decibels": decibels(wanted, last),
        "start_decibels": decibels(wanted, first),
        "decibels_from_trained": near,
        "saturating_channels": sum(layer.saturating_channels for layer in layers),
        "engine_gap": gap,
        "bytes": path.stat().st_size,
        "export_difference": max(float(np.abs(a - b).max()) for a, b in zip(rounded, last, strict=True)),
    }


def _outputs(net: nn.Module, parts: list[Array]) -> list[Array]:
    found = [[value.numpy() for value in tree_leaves(net(torch.from_numpy(part)))] for part in parts]
    return [np.concatenate(values) for values in zip(*found, strict=True)]


def _of_tensors(session: checking.Session) -> Callable[..., list[Tensor]]:
    return lambda images: [torch.from_numpy(value) for value in session(images.numpy())]
