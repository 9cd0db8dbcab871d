"""What a trained network sees in images: the likeliest classes by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from torch import Tensor, nn
from torchvision.datasets.folder import IMG_EXTENSIONS

from refold.errors import InputError
from refold.export import get_engine
from refold.training.pictures import read_image
from refold.training.task import ClassificationTask, Task

_BATCH = 32


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one image with their probabilities, or why it could not be read."""

    image: str
    classes: list[tuple[str, float]]
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON-able values."""
        classes = [{"name": name, "probability": probability} for name, probability in self.classes]
        return {"image": self.image, "classes": classes, "error": self.error}


@dataclass(frozen=True)
class ImagePredictor:
    """A function from prepared images ``(n, 3, height, width)`` to outputs, how to prepare them, and what they mean."""

    run: Callable[[Tensor], Tensor]
    preprocessing: dict[str, Any]
    task: Task

    def predict(self, images: Sequence[Path], top: int = 5) -> Iterator[Prediction]:
        """The ``top`` likeliest classes of each image, in order; an unreadable image carries its error."""
        keys = ("input_size", "interpolation", "mean", "std", "crop_pct")
        settings = {key: self.preprocessing[key] for key in keys if self.preprocessing.get(key) is not None}
        prepare = create_transform(
            is_training=False,
            **{key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()},
        )
        for start in range(0, len(images), _BATCH):
            paths, prepared, errors = images[start : start + _BATCH], [], {}
            for path in paths:
                try:
                    prepared.append(prepare(read_image(path)))
                except InputError as error:
                    errors[path] = str(error)
            answers: Iterator[list[tuple[str, float]]] = iter(())
            if prepared:
                with torch.inference_mode():
                    answers = iter(self.task.likeliest(self.run(torch.stack(prepared)), top))
            for path in paths:
                if path in errors:
                    yield Prediction(str(path), [], errors[path])
                else:
                    yield Prediction(str(path), next(answers))


def network_classifier(net: nn.Module) -> ImagePredictor:
    """A network with what its checkpoint says, or as timm knows its name; a thousand classes are ImageNet's."""
    card = getattr(net, "card", None)
    preprocessing = dict(resolve_model_data_config(net))
    if card is not None and card.preprocessing is not None:
        preprocessing |= card.preprocessing
    names = None if card is None else card.class_names
    if names is None and getattr(net, "num_classes", None) == 1000:
        imagenet = ImageNetInfo()
        names = [imagenet.index_to_description(index) for index in range(1000)]
    return ImagePredictor(net.eval(), preprocessing, ClassificationTask(names))


def onnx_classifier(path: Path, threads: int = 1) -> ImagePredictor:
    """An ONNX file of a training run, with the ``card.json`` beside it.

    Raises `InputError` where the file or the card is missing or not understood.
    """
    if not path.is_file():
        raise InputError(f"There is no file '{path}'; check the path.")
    card = path.with_name("card.json")
    try:
        described = json.loads(card.read_text(encoding="utf-8"))
        names, preprocessing = described["class_names"], described["preprocessing"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"'{path}' has no readable card.json of a training run beside it, so its classes and preprocessing "
            "are not known; give the checkpoint that it was exported from."
        ) from error
    session = get_engine("onnxruntime").open(path, threads=threads)
    return ImagePredictor(lambda batch: session(batch)[0], preprocessing, ClassificationTask(names))


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The files given, and the images in the folders given, in order.

    Raises `InputError` where a path does not exist or a folder holds no images.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMG_EXTENSIONS)
            if not inside:
                raise InputError(f"The folder '{path}' holds no images ({', '.join(IMG_EXTENSIONS)}).")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise InputError(f"There is no image '{path}'; check the path.")
    return found
