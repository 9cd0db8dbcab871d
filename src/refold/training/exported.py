"""Predicting with an exported file: it says itself what it takes and gives, and a run's card fills what it does not."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ValidationError
from torch import Tensor

from refold.errors import InputError
from refold.export.metadata import Description, Preprocessing
from refold.export.opening import ExportedFile, open_exported
from refold.training.finding import Finder
from refold.training.predicting import ImagePredictor, completed, named_classes
from refold.training.settings import CARD


class _Card(BaseModel):
    """What a run's card says that an exported file may not."""

    class_names: list[str] | None = None
    preprocessing: Preprocessing | None = None


def exported_classifier(path: Path, threads: int | None = None) -> ImagePredictor:
    """A predictor of an exported file of any engine, run with ``threads`` threads if given.

    What the file says counts. What it does not say is taken from the ``card.json`` of a run beside it, if there is
    one, and a note says so. Raises `InputError` where the file cannot be read or run, its description is not
    understood, or neither says how images are prepared.
    """
    return _classifier(open_exported(path, threads=threads), path)


def exported_predictor(path: Path, threshold: float, threads: int | None = None) -> ImagePredictor | Finder:
    """A predictor of an exported classifier, detector or segmenter, by what the file says that it gives.

    Raises `InputError` where `exported_classifier` does, and for a detector that was exported without its boxes.
    """
    file = open_exported(path, threads=threads)
    kind = file.description.output
    if kind == "maps":
        raise InputError(
            f"'{path}' gives the maps of a detector, not boxes; export it again with --detections."
        )
    if kind not in ("detections", "instances", "segmentation"):
        return _classifier(file, path)
    title, notes = f"'{path}'", list[str]()
    description, preprocessing = _described(file, path, notes)
    return Finder(
        title,
        file.run,
        completed(preprocessing, title, notes),
        description.class_names,
        kind == "segmentation",
        threshold,
        description.batch,
        notes,
    )


def _classifier(file: ExportedFile, path: Path) -> ImagePredictor:
    title, notes = f"'{path}'", list[str]()
    description, preprocessing = _described(file, path, notes)
    if description.output is None:
        notes.append(f"{title} does not say whether it gives logits or probabilities; taken for logits.")
    return ImagePredictor(
        title,
        lambda batch: _only_output(file, batch),
        completed(preprocessing, title, notes),
        named_classes(description.class_names, _classes(description), title, notes),
        description.output or "logits",
        description.batch,
        notes,
    ).probed()


def _described(file: ExportedFile, path: Path, notes: list[str]) -> tuple[Description, Preprocessing]:
    """What a file, and the card of a run beside it, say, and how its images are prepared."""
    description = _filled(file.description, path, notes)
    if description.preprocessing is None:
        raise InputError(
            f"'{path}' does not say how its images are prepared, for refold did not write it; predict with the network "
            "that it was made from, or export that with refold."
        )
    return description, _of_its_size(description, description.preprocessing, f"'{path}'")


def _filled(description: Description, path: Path, notes: list[str]) -> Description:
    """The description with what the card of a run beside the file says and the file does not."""
    card = path.with_name(CARD)
    said = {} if description.preprocessing is None else description.preprocessing.known()
    # Where no crop mode is said, it is the usual one.
    silent = [name for name in Preprocessing.model_fields if name not in said and name != "crop_mode"]
    if not card.is_file() or (not silent and description.class_names is not None):
        return description
    try:
        found = _Card.model_validate_json(card.read_bytes(), strict=True)
    except (OSError, ValidationError) as error:
        raise InputError(
            f"'{path}' does not say all of its classes and preprocessing, and '{card}' beside it cannot be read as the "
            "card of a run; remove the card, or export the network again."
        ) from error
    known = {} if found.preprocessing is None else found.preprocessing.known()
    filling = {name: known[name] for name in silent if name in known}
    taken = ["class_names"] if description.class_names is None and found.class_names is not None else []
    if taken or filling:
        notes.append(f"'{path}' does not say {', '.join([*taken, *filling])}; taken from '{card}' beside it.")
    return description.model_copy(
        update={
            "class_names": found.class_names if taken else description.class_names,
            "preprocessing": Preprocessing(**said | filling) if said or filling else None,
        }
    )


def _of_its_size(description: Description, preprocessing: Preprocessing, title: str) -> Preprocessing:
    """The preprocessing, of images as the file takes them; raises `InputError` where it says two sizes."""
    port = description.inputs[0] if description.inputs else None
    if port is None or len(port.shape) != 4:
        return preprocessing
    size = tuple(port.shape[1:])
    if any(isinstance(side, str) for side in size):
        return preprocessing  # any will do
    if preprocessing.input_size not in (None, size):
        raise InputError(
            f"{title} takes images of {size}, but says that they are prepared as {preprocessing.input_size} "
            "(channels, height, width); export the network again."
        )
    return preprocessing.model_copy(update={"input_size": size})


def _classes(description: Description) -> int | None:
    shape = description.outputs[0].shape if description.outputs else []
    return shape[1] if len(shape) == 2 and isinstance(shape[1], int) else None


def _only_output(file: ExportedFile, batch: Tensor) -> Tensor:
    outputs = file.run(batch)
    if len(outputs) != 1:
        raise InputError(
            f"'{file.path}' gives {len(outputs)} outputs; predict names the classes of networks that give one."
        )
    return outputs[0]
