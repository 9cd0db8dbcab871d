"""Self-describing checkpoints: weights, architecture, form and provenance in one safetensors file."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, load_model, save_model
from torch import Tensor, nn

from refold.cards import FORMS, Card, Form, card_from, is_harmless
from refold.errors import CheckpointError, InputError, RefoldError, first_line
from refold.files import PathLike, written_aside
from refold.models import create_model, load_checkpoint
from refold.models.bounded import bounded
from refold.models.classes import check_class_names, class_count
from refold.models.images import example_input
from refold.models.loading import OpenedCheckpoint, checkpoint_classes, open_checkpoint
from refold.models.pretrained import hub_file, loading_failure
from refold.own_code import takes
from refold.rebuilding import architecture_of, network_of_run, own_preprocessing, reshaped
from refold.runs import RUN, STATE, TRAINING
from refold.unfolding import UnfoldReport, original_state_dict

__all__ = [
    "FORMS",
    "Card",
    "Form",
    "check_class_names",
    "class_count",
    "example_input",
    "load",
    "original",
    "read_card",
    "save",
]

HUB = ("hf-hub:", "hf_hub:")
_METADATA_KEY = "refold"


def save(
    model: nn.Module,
    path: PathLike,
    *,
    class_names: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write a network, in training or in plain form, to one self-describing safetensors file.

    Tensors keep their dtype. Class names, preprocessing and provenance that are not given are taken over from
    the checkpoint that the model was loaded from.
    Raises `InputError` where ``path`` cannot be written or the class names are not as many as the network's classes,
    and `CheckpointError` where an architecture argument or the provenance has no JSON form.

    Examples:
        >>> import refold
        >>> net = refold.create_model("repghostnet_050", num_classes=2)
        >>> refold.save(net, "net.safetensors", class_names=["cat", "dog"])
    """
    card = _describe(model, class_names, preprocessing, provenance)
    _check_names(card, model)
    try:
        text = json.dumps(dataclasses.asdict(card))
        card_from(text)  # what is written can be read
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"The description of {card.title} cannot be written as JSON ({first_line(error)}); "
            "use plain values: numbers, strings, lists."
        ) from error
    with written_aside(path) as aside:
        try:
            save_model(model, str(aside), metadata={_METADATA_KEY: text})
        except SafetensorError as error:
            raise InputError(f"'{path}' cannot be written: {error}.") from error


def load(
    path: PathLike,
    architecture: str | Callable[..., nn.Module] | None = None,
    *,
    form: Form | None = None,
    allow_pickle: bool = False,
    **arguments: Any,
) -> nn.Module:
    """Build the network that a checkpoint holds, in the form it holds, in eval mode on the CPU.

    A file of `refold.save` needs nothing more, unless the network is not one of `refold.create_model`: then
    ``architecture`` is the class, or any callable that builds it as it was before it was unfolded or folded.
    A foreign checkpoint (a ``.pth`` of the official repositories or of timm) needs ``architecture``, a model
    name. ``hf-hub:owner/name``, or with ``@revision``, names the network that `refold.push` published there.
    ``arguments`` go to `refold.create_model` or to the callable, over those that the file records.
    ``form`` states what the caller expects. Nothing is unpickled beyond tensors and plain containers unless
    ``allow_pickle`` says so.
    The network carries the file's `Card` as its attribute ``card``.

    Raises `CheckpointError` where the file cannot be read, has another form, does not fit the architecture or describes
    what no network is built of.

    Examples:
        >>> import refold
        >>> refold.save(refold.create_model("repghostnet_050", num_classes=2), "net.safetensors")
        >>> refold.load("net.safetensors", form="training").num_classes
        2
    """
    return load_with_notes(path, architecture, form=form, allow_pickle=allow_pickle, **arguments)[0]


def load_with_notes(
    path: PathLike,
    architecture: str | Callable[..., nn.Module] | None = None,
    *,
    form: Form | None = None,
    allow_pickle: bool = False,
    **arguments: Any,
) -> tuple[nn.Module, tuple[str, ...]]:
    """`load`, and what of a foreign file was chosen, stripped from its names and left out, a fact each."""
    if form is not None and form not in FORMS:
        raise InputError(f"form is '{form}'; expected 'training', 'plain' or None.")
    if str(path).startswith(HUB):
        path = fetched(str(path))
    if not Path(path).is_file():
        raise CheckpointError(f"There is no checkpoint file '{path}'; check the path.")
    card = read_card(path)
    if card is None:
        return _load_foreign(path, architecture, form, allow_pickle, arguments)
    if form is not None and card.form != form:
        raise CheckpointError(_wrong_form(path, card, form))
    model = _shaped(card, architecture, arguments, path, read_from=path)
    _fill(model, path, card)
    return model.eval(), ()


def fetched(name: str) -> Path:
    """The file of a network of the hub, ``hf-hub:owner/name``; raises `CheckpointError` where it cannot be had."""
    try:
        return hub_file(name.partition(":")[2])
    except CheckpointError:
        raise
    except Exception as error:  # whatever the network and the hub raise
        raise loading_failure(name, error) from error


def original(model: nn.Module, architecture: Callable[[], nn.Module] | None = None) -> nn.Module:
    """The network that was unfolded, of its own class, with the weights that training its branches gave.

    ``model`` is what `refold.unfold` returned, or its fold; `refold.create_model` must know the network by name, or
    ``architecture`` builds it.
    It computes the same in eval mode, which it is in, and has the same card.
    Raises `InputError` where the model was not unfolded, or folding merged layers of the original, and
    `CheckpointError` where the network has no name.
    """
    state = original_state_dict(model)
    report: Any = model.unfold_report
    named: Any = getattr(model, "architecture", None)
    if architecture is not None:
        made = architecture()
    elif named is not None:
        made = create_model(named["name"], **named["arguments"])
    else:
        raise CheckpointError(
            f"This {type(model).__name__} is none of refold.create_model, so that only you can build its class; load "
            "what refold.original_state_dict gives into it."
        )
    if report.before is not None:
        made = reshaped(made, report.before["unfold"], report.before["fold"])
    _take_dtypes(made, state)
    made.load_state_dict(state, strict=True)
    card: Card | None = getattr(model, "card", None)
    if card is not None:
        made.card = dataclasses.replace(card, form="training", fold=None, unfold=None)  # type: ignore[assignment]  # nn.Module types its attributes as tensors and modules
    return made.eval()


def read_card(path: PathLike) -> Card | None:
    """Read what a checkpoint says about itself; None for a file that `refold.save` did not write.

    Raises `CheckpointError` where a safetensors file is damaged or its description is not understood.
    """
    if Path(path).suffix != ".safetensors":
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get(_METADATA_KEY)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"'{path}' is no readable safetensors file ({error}); it may be truncated: copy or save it again."
        ) from error
    if text is None:
        return None
    try:
        return card_from(text)
    except ValueError as error:
        raise CheckpointError(
            f"The description in '{path}' is not understood by refold {version('refold')} ({error}); "
            "it is damaged or comes from a newer version."
        ) from error


def _describe(
    model: nn.Module,
    class_names: Sequence[str] | None,
    preprocessing: Mapping[str, Any] | None,
    provenance: Mapping[str, Any] | None,
) -> Card:
    known: Card | None = getattr(model, "card", None)
    report, unfolded = getattr(model, "fold_report", None), getattr(model, "unfold_report", None)
    if known is not None:
        class_names = known.class_names if class_names is None else class_names
        preprocessing = known.preprocessing if preprocessing is None else preprocessing
        provenance = known.provenance if provenance is None else provenance
    architecture, built_from = architecture_of(model), None
    if architecture is not None and preprocessing is None:
        preprocessing = own_preprocessing(model, architecture["name"])
    elif architecture is None:
        built: dict[str, Any] = getattr(model, "built_from", None) or {"name": None, "arguments": {}}
        built_from = built["name"]
        arguments = {key: value for key, value in built["arguments"].items() if is_harmless(key)}
        architecture = {"name": None, "arguments": arguments}
    return Card(
        form="training" if report is None else "plain",
        model_class=type(model).__name__,
        architecture=architecture["name"],
        arguments=copy.deepcopy(dict(architecture["arguments"])),
        class_names=None if class_names is None else list(class_names),
        preprocessing=None if preprocessing is None else dict(preprocessing),
        fold=None if report is None else report.to_dict(),
        unfold=unfolded.to_dict() if isinstance(unfolded, UnfoldReport) else None,
        provenance=dict(provenance or {}),
        built_from=built_from,
    )


def _check_names(card: Card, model: nn.Module) -> None:
    classes = None if card.class_names is None else class_count(model)
    if card.class_names is not None and classes is not None:
        check_class_names(card.class_names, classes, f"The checkpoint of {card.title}")


def _shaped(
    card: Card,
    architecture: str | Callable[..., nn.Module] | None,
    arguments: dict[str, Any],
    path: PathLike,
    read_from: PathLike,
) -> nn.Module:
    """The network of a card, in the card's form, its weights not set; ``read_from`` is the file that has the card."""
    shapes = _shapes(read_from)
    numbers = sum(math.prod(shape) for shape in shapes.values())
    model: nn.Module | None = None
    if callable(architecture):
        recorded = {key: value for key, value in card.arguments.items() if takes(architecture, key)}
        model = architecture(**{**recorded, **arguments})
    elif "num_classes" not in arguments:
        _check_count(card, shapes, read_from)
    try:
        with bounded(numbers, len(shapes), f"The description in '{read_from}'"):
            if model is None:
                model = _build(card, architecture, arguments, path)
            model = reshaped(model, card.unfold, None if card.form == "training" else card.fold or {})
    except RefoldError:
        raise
    except Exception as error:  # a description that nobody wrote can fail anywhere where networks are built
        raise CheckpointError(
            f"The description in '{read_from}' is none of a network that can be built ({first_line(error)}); it is "
            "damaged or comes from another version: save it again."
        ) from error
    model.card = card  # type: ignore[assignment]  # nn.Module types its attributes as tensors and modules
    try:
        _check_names(card, model)
    except InputError as error:
        raise CheckpointError(f"'{read_from}' cannot be used. {error}") from error
    return model


def _build(
    card: Card, architecture: str | Callable[..., nn.Module] | None, arguments: dict[str, Any], path: PathLike
) -> nn.Module:
    name = architecture or card.architecture
    if not isinstance(name, str):
        before = ", as it was before refold.unfold" if card.unfold else ""
        built = f", built from {card.built_from}" if card.built_from else ""
        fact = f"'{path}' holds a network of class {card.model_class}{built}, not one of refold.create_model"
        raise CheckpointError(
            f"{fact}; give the class{before}: refold.load(path, architecture=...).",
            f"{fact}; name its class and give the file as --checkpoint: "
            f"{card.built_from or 'net.py:' + card.model_class} --checkpoint {path}",
        )
    return create_model(name, **{**card.arguments, **arguments})


def _shapes(path: PathLike) -> dict[str, list[int]]:
    with safe_open(str(path), framework="pt") as file:
        return {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118  # no mapping


def _check_count(card: Card, shapes: Mapping[str, list[int]], path: PathLike) -> None:
    classes = card.arguments.get("num_classes", 0)
    largest = max((shape[0] for shape in shapes.values() if shape), default=0)
    if classes > largest and not card.arguments.get("features_only"):
        raise CheckpointError(
            f"The description in '{path}' says {classes:,} classes, but none of its weights has more than {largest:,} "
            "rows; it is damaged: save it again."
        )


def _fill(model: nn.Module, path: PathLike, card: Card) -> None:
    """Give the model the file's dtypes and values; every tensor must be there and have its shape."""
    written = load_file(path)
    expected = model.state_dict(keep_vars=True)
    for key, tensor in expected.items():
        if key not in written:
            continue  # one of several names of a shared tensor, or missing: told apart below
        if written[key].shape != tensor.shape:
            fact = (
                f"'{path}' does not fit {card.title}: '{key}' has shape "
                f"{tuple(written[key].shape)}, expected {tuple(tensor.shape)}"
            )
            raise CheckpointError(
                f"{fact}; build it with the arguments of the checkpoint, such as num_classes.",
                f"{fact}; give the arguments that it was saved with, or none.",
            )
    _take_dtypes(model, written)
    try:
        load_model(model, path)
    except RuntimeError as error:
        strangers = sorted(written.keys() ^ expected.keys())
        raise CheckpointError(
            f"'{path}' does not fit {card.title} in {card.form} form: {len(strangers)} tensor names differ, "
            f"such as '{strangers[0]}'; was it built with other arguments or by another version "
            f"(the file: {card.refold_version})?"
        ) from error


def _take_dtypes(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in model.state_dict(keep_vars=True).items():
        if key in tensors:
            tensor.data = tensor.data.to(tensors[key].dtype)


def _load_foreign(
    path: PathLike,
    architecture: str | Callable[..., nn.Module] | None,
    form: Form | None,
    allow_pickle: bool,
    arguments: dict[str, Any],
) -> tuple[nn.Module, tuple[str, ...]]:
    if form == "plain":
        raise CheckpointError(
            f"'{path}' was not written by refold.save and is read as a training form; load it with "
            "form='training' and fold it.",
            f"'{path}' was not written by refold and is read as a training form; fold it first.",
        )
    beside = Path(path).with_name(TRAINING)
    is_state = Path(path).name == STATE
    card = read_card(beside) if is_state and beside.is_file() else None
    of_run = network_of_run(Path(path).parent) if architecture is None and card is None and is_state else None
    if of_run is None and architecture is None and card is None:
        fact = f"'{path}' was not written by refold.save, so it does not name its network"
        raise CheckpointError(
            f"{fact}; give the architecture, such as architecture='repvgg_a0'.",
            f"{fact}; name the network and give the file as --checkpoint: repvgg_a0 --checkpoint {path}",
        )
    opened = open_checkpoint(_unpickle(path) if allow_pickle else path)
    notes: tuple[str, ...] = ()
    if card is not None:
        # What it says of an epoch is said of another one.
        card = dataclasses.replace(card, provenance={})
        model = _shaped(card, architecture, arguments, path, read_from=beside)
        notes = (f"took the description in {TRAINING} beside it",)
    elif of_run is not None:
        model = network_for(opened, partial(create_model, of_run), arguments)
        notes = (f"took the network's name, {of_run}, from {RUN} beside it",)
    elif callable(architecture):
        model = architecture(**arguments)
    else:
        assert architecture is not None
        model = create_model(architecture, **arguments)
    return model.eval(), (*notes, *load_checkpoint(model, opened).notes)


def network_for(
    opened: OpenedCheckpoint, build: Callable[..., nn.Module], arguments: Mapping[str, Any]
) -> nn.Module:
    """What ``build`` gives for a foreign checkpoint: with as many classes as that has, unless ``arguments`` say."""
    model = build(**arguments)
    classes = checkpoint_classes(opened, model)
    is_said = arguments.get("num_classes") is not None or not takes(build, "num_classes")
    if is_said or classes in (None, class_count(model)):
        return model
    return build(**{**arguments, "num_classes": classes})


def _unpickle(path: PathLike) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # unpickling runs code of the file, which may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"'{path}' cannot be unpickled ({reason}); it may be truncated.") from error


def _wrong_form(path: PathLike, card: Card, expected: Form) -> str:
    if card.form == "plain":
        return (
            f"'{path}' holds the plain form of {card.title}, the training form is expected here: a fold "
            "cannot be undone, so load the checkpoint that was saved before folding."
        )
    return (
        f"'{path}' holds the training form of {card.title}, the plain form is expected here: "
        f"fold it first (refold fold '{path}' -o plain.safetensors)."
    )
