"""Self-describing checkpoints: weights, architecture, form and provenance in one safetensors file."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, load_model, save_model
from torch import Tensor, nn

from refold.errors import CheckpointError, InputError
from refold.files import PathLike, written_aside
from refold.folding import FoldReport, apply_record, fold
from refold.models import create_model, load_checkpoint
from refold.models.classes import check_class_names, class_count
from refold.models.images import example_input
from refold.unfolding import UnfoldReport, original_state_dict, rebuild

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

Form = Literal["training", "plain"]
FORMS: tuple[Form, ...] = ("training", "plain")

_METADATA_KEY = "refold"


@dataclass(frozen=True)
class Card:
    """What a checkpoint says about its network.

    ``architecture`` is a name for `refold.create_model`, with its ``arguments``, or None for a network that
    was built otherwise; ``model_class`` is its Python class. ``preprocessing`` speaks timm's terms
    (``input_size`` as channels, height, width; ``mean``, ``std``, ``interpolation``). ``fold`` is the report
    of the fold that made a plain network, ``unfold`` the record of the branches that `refold.unfold` gave the
    architecture before that, ``provenance`` whatever the writer wanted to keep.
    """

    form: Form
    model_class: str
    architecture: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    class_names: list[str] | None = None
    preprocessing: dict[str, Any] | None = None
    fold: dict[str, Any] | None = None
    unfold: dict[str, Any] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    refold_version: str = field(default_factory=lambda: version("refold"))

    @property
    def title(self) -> str:
        """The architecture's name, or the class of a network that has none."""
        return self.architecture or self.model_class


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
    """
    card = _describe(model, class_names, preprocessing, provenance)
    _check_names(card, model)
    try:
        metadata = {_METADATA_KEY: json.dumps(dataclasses.asdict(card))}
    except TypeError as error:
        raise CheckpointError(
            f"The description of {card.title} cannot be written as JSON ({error}); "
            "use plain values: numbers, strings, lists."
        ) from error
    with written_aside(path) as aside:
        try:
            save_model(model, str(aside), metadata=metadata)
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
    name. ``arguments`` go to `refold.create_model` or to the callable, over those that the file records.
    ``form`` states what the caller expects. Nothing is unpickled beyond tensors and plain containers unless
    ``allow_pickle`` says so.
    The network carries the file's `Card` as its attribute ``card``.

    Raises `CheckpointError` where the file cannot be read, has another form or does not fit the architecture.
    """
    if form is not None and form not in FORMS:
        raise InputError(f"form is '{form}'; expected 'training', 'plain' or None.")
    if not Path(path).is_file():
        raise CheckpointError(f"There is no checkpoint file '{path}'; check the path.")
    card = read_card(path)
    if card is None:
        return _load_foreign(path, architecture, form, allow_pickle, arguments)
    if form is not None and card.form != form:
        raise CheckpointError(_wrong_form(path, card, form))
    model = _build(card, architecture, arguments, path)
    model.card = card  # type: ignore[assignment]  # nn.Module types its attributes as tensors and modules
    model = _reshaped(model, card.unfold, None if card.form == "training" else card.fold or {})
    _fill(model, path, card)
    return model.eval()


def original(model: nn.Module) -> nn.Module:
    """The network that was unfolded, of its own class, with the weights that training its branches gave.

    ``model`` is what `refold.unfold` returned, or its fold; `refold.create_model` must know the network by name.
    It computes the same in eval mode, which it is in, and has the same card.
    Raises `InputError` where the model was not unfolded, or folding merged layers of the original, and
    `CheckpointError` where the network has no name.
    """
    state = original_state_dict(model)
    report: Any = model.unfold_report
    architecture: Any = getattr(model, "architecture", None)
    if architecture is None:
        raise CheckpointError(
            f"This {type(model).__name__} is none of refold.create_model, so that only you can build its class; load "
            "what refold.original_state_dict gives into it."
        )
    made = create_model(architecture["name"], **architecture["arguments"])
    if report.before is not None:
        made = _reshaped(made, report.before["unfold"], report.before["fold"])
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
        return Card(**json.loads(text))
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"The description in '{path}' is not understood by refold {version('refold')} ({error}); "
            "it may come from a newer version."
        ) from error


def _describe(
    model: nn.Module,
    class_names: Sequence[str] | None,
    preprocessing: Mapping[str, Any] | None,
    provenance: Mapping[str, Any] | None,
) -> Card:
    known: Card | None = getattr(model, "card", None)
    architecture = getattr(model, "architecture", None) or {"name": None, "arguments": {}}
    report = getattr(model, "fold_report", None)
    folded = None
    if report is not None:
        folded = report.to_dict()
    unfolded = getattr(model, "unfold_report", None)
    if known is not None:
        class_names = known.class_names if class_names is None else class_names
        preprocessing = known.preprocessing if preprocessing is None else preprocessing
        provenance = known.provenance if provenance is None else provenance
    return Card(
        form="training" if report is None else "plain",
        model_class=type(model).__name__,
        architecture=architecture["name"],
        arguments=copy.deepcopy(dict(architecture["arguments"])),
        class_names=None if class_names is None else list(class_names),
        preprocessing=None if preprocessing is None else dict(preprocessing),
        fold=folded,
        unfold=unfolded.to_dict() if isinstance(unfolded, UnfoldReport) else None,
        provenance=dict(provenance or {}),
    )


def _check_names(card: Card, model: nn.Module) -> None:
    classes = None if card.class_names is None else class_count(model)
    if card.class_names is not None and classes is not None:
        check_class_names(card.class_names, classes, f"The checkpoint of {card.title}")


def _build(
    card: Card,
    architecture: str | Callable[..., nn.Module] | None,
    arguments: dict[str, Any],
    path: PathLike,
) -> nn.Module:
    if callable(architecture):
        model: nn.Module = architecture(**arguments)
        return model
    name = architecture or card.architecture
    if name is None:
        raise CheckpointError(
            f"'{path}' holds a network of class {card.model_class}, not one of refold.create_model; "
            f"give the class{', as it was before refold.unfold' if card.unfold else ''}: "
            "refold.load(path, architecture=...)."
        )
    return create_model(name, **{**card.arguments, **arguments})


def _reshaped(model: nn.Module, unfolded: Any, folded: Any) -> nn.Module:
    """The model in the form of a record: with branches, after whatever was done to it before, and then folded."""
    if unfolded is not None:
        before = unfolded["before"]
        model = rebuild(_reshaped(model, before["unfold"], before["fold"]) if before else model, unfolded)
    if folded is None:
        return model
    if not folded.get("record"):  # written before folds were recorded, or one that cannot be: search again
        return fold(model, example_input(model), prove=False, **folded.get("options", folded))
    plain = apply_record(model, folded["record"])
    plain.fold_report = FoldReport.from_dict(folded)  # type: ignore[assignment]  # nn.Module types its attributes as tensors and modules
    return plain


def _fill(model: nn.Module, path: PathLike, card: Card) -> None:
    """Give the model the file's dtypes and values; every tensor must be there and have its shape."""
    written = load_file(path)
    expected = model.state_dict(keep_vars=True)
    for key, tensor in expected.items():
        if key not in written:
            continue  # one of several names of a shared tensor, or missing: told apart below
        if written[key].shape != tensor.shape:
            raise CheckpointError(
                f"'{path}' does not fit {card.title}: '{key}' has shape "
                f"{tuple(written[key].shape)}, expected {tuple(tensor.shape)}; "
                "build it with the arguments of the checkpoint, such as num_classes."
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
) -> nn.Module:
    if architecture is None:
        raise CheckpointError(
            f"'{path}' was not written by refold.save, so it does not name its network; give the "
            "architecture, such as architecture='repvgg_a0' (--architecture on the command line)."
        )
    if form == "plain":
        raise CheckpointError(
            f"'{path}' was not written by refold.save and is read as a training form; load it with "
            "form='training' and fold it."
        )
    model = architecture(**arguments) if callable(architecture) else create_model(architecture, **arguments)
    if allow_pickle:
        load_checkpoint(model, _unpickle(path))
    else:
        load_checkpoint(model, path)
    return model.eval()


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
