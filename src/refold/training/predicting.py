"""What a trained network sees in images: the likeliest classes by name."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from timm.data import (
    DEFAULT_CROP_PCT,
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ImageNetInfo,
    create_transform,
)
from torch import Tensor, nn

from refold.errors import InputError, RefoldError, first_line
from refold.export.metadata import (
    OutputKind,
    Preprocessing,
    are_probabilities,
    check_probabilities,
)
from refold.export.preparing import known_preprocessing
from refold.models.classes import check_class_names
from refold.training.drawing import draw_names
from refold.training.pictures import read_image
from refold.training.tasks.classification import likeliest

_BATCH = 32
# Values of prepared images that are kept at once: a gigabyte, and where a file may take any number a quarter of it.
_MOST_VALUES = 2**28


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one image with their probabilities, or why there are none."""

    columns: ClassVar[tuple[str, ...]] = ("image", "rank", "class", "probability")

    image: str
    classes: list[tuple[str, float]]
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON-able values."""
        classes = [{"name": name, "probability": probability} for name, probability in self.classes]
        return {"image": self.image, "classes": classes, "error": self.error}

    def line(self) -> str:
        """The same in words."""
        return f"{self.image}: {', '.join(f'{name} {probability:.1%}' for name, probability in self.classes)}"

    def rows(self) -> list[tuple[object, ...]]:
        """The same as rows of a table with ``columns``."""
        return [(self.image, rank, n, f"{p:.6g}") for rank, (n, p) in enumerate(self.classes, start=1)]

    def drawn(self, picture: Image.Image) -> dict[str, Image.Image]:
        """The picture with the classes beside its upper edge."""
        names = [f"{name} {probability:.0%}" for name, probability in self.classes]
        return {".png": draw_names(picture, names)}


@dataclass(frozen=True)
class ImagePredictor:
    """A function from prepared images ``(n, 3, height, width)`` to outputs ``(n, classes)``, and what they mean.

    ``title`` is what messages call the network. ``output`` says whether the outputs are logits or probabilities,
    ``batch`` how many images a call must have, None for any number. ``notes`` are sentences on what was not
    known for sure.
    """

    title: str
    run: Callable[[Tensor], Tensor]
    preprocessing: Preprocessing
    class_names: Sequence[str] | None
    output: OutputKind = "logits"
    batch: int | None = None
    notes: list[str] = field(default_factory=list)

    def predict(self, images: Sequence[Path], top: int = 5) -> Iterator[Prediction]:
        """The ``top`` likeliest classes of each image, in order.

        An image that cannot be read, or for which the outputs are not finite, carries its error. Raises `InputError`
        where the network cannot run on such images, or what is said of its outputs is not so.
        """
        prepare = create_transform(is_training=False, **self.preprocessing.known())
        size = self._images_a_call
        for start in range(0, len(images), size):
            paths, errors = images[start : start + size], {}
            prepared = []
            for path in paths:
                try:
                    prepared.append(prepare(read_image(path)))
                except InputError as error:
                    errors[path] = str(error)
            answers = iter(self._answers(torch.stack(prepared), top) if prepared else [])
            for path in paths:
                if path in errors:
                    yield Prediction(str(path), [], errors[path])
                    continue
                classes = next(answers)
                yield Prediction(str(path), classes or [], None if classes else self._not_finite(path))

    @property
    def _images_a_call(self) -> int:
        """As many as the file takes, or as there is memory for; raises `InputError` where it takes more."""
        assert self.preprocessing.input_size is not None
        values = math.prod(self.preprocessing.input_size)
        if self.batch is None:
            return max(1, min(_BATCH, _MOST_VALUES // 4 // values))
        if not 0 < self.batch * values <= _MOST_VALUES:
            raise InputError(
                f"{self.title} says that a call takes {self.batch} images of {self.preprocessing.input_size}, which "
                "predict does not prepare; export the network with a free batch."
            )
        return self.batch

    def _not_finite(self, path: Path) -> str:
        return (
            f"The image '{path}' has no prediction: {self.title} gives NaN or infinity for it; look for weights that "
            "are not finite."
        )

    def _answers(self, batch: Tensor, top: int) -> list[list[tuple[str, float]] | None]:
        """The likeliest classes of each image; None where its outputs are not finite."""
        outputs = self._outputs(batch)
        finite = outputs.isfinite().all(dim=1)
        rows = outputs[finite]
        if self.output == "probabilities" and len(rows):
            check_probabilities(rows, self.title)
        logits = rows.log() if self.output == "probabilities" else rows
        rows_of_classes = iter(likeliest(logits, top, self.class_names))
        return [next(rows_of_classes) if is_finite else None for is_finite in finite.tolist()]

    def _outputs(self, batch: Tensor) -> Tensor:
        count = len(batch)
        if self.batch is not None:
            # A file of a fixed batch takes no fewer; the last image stands in for those that are missing.
            batch = torch.cat([batch, batch[-1:].expand(self.batch - count, *batch.shape[1:])])
        outputs = outputs_of(self.title, self.run, batch)
        if not isinstance(outputs, Tensor) or outputs.dim() != 2 or len(outputs) != len(batch):
            shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise InputError(
                f"{self.title} gives {shape} for {len(batch)} images, not one row of classes for each; predict "
                "names the classes of networks that classify images."
            )
        if self.class_names is not None:
            check_class_names(self.class_names, outputs.shape[1], self.title)
        return outputs[:count]

    def probed(self) -> ImagePredictor:
        """The same, for probabilities where the outputs for noise are such, though nothing says so, which a note does.

        Of photos, a few logits may happen to look like probabilities; of noise, all do behind a softmax alone.
        """
        assert self.preprocessing.input_size is not None
        generator = torch.Generator().manual_seed(0)
        count = self._images_a_call if self.batch is not None else min(8, self._images_a_call)
        noise = torch.randn(count, *self.preprocessing.input_size, generator=generator)
        if self.output == "probabilities" or not are_probabilities(self._outputs(noise)):
            return self
        note = f"{self.title} gives probabilities, though nothing says so; no softmax was applied."
        return dataclasses.replace(self, output="probabilities", notes=[*self.notes, note])


def outputs_of(title: str, run: Callable[[Tensor], Any], batch: Tensor) -> Any:
    """What a network gives for prepared images; raises `InputError`, with its title, where it cannot run on them."""
    with torch.inference_mode():
        try:
            return run(batch)
        except RefoldError:
            raise
        except Exception as error:
            raise InputError(
                f"{title} cannot run on images of shape {tuple(batch.shape)}: {first_line(error)}."
            ) from error


def network_classifier(net: nn.Module, title: str | None = None) -> ImagePredictor:
    """A network with what its checkpoint says, or as timm knows its name; a thousand classes are ImageNet's.

    ``title`` is what messages call it. Raises `InputError` where its preprocessing is not understood.
    """
    card = getattr(net, "card", None)
    notes: list[str] = []
    title = f"'{title}'" if title else type(net).__name__
    known = Preprocessing(**known_preprocessing(net))
    names = None if card is None else card.class_names
    return ImagePredictor(
        title,
        net.eval(),
        completed(known, title, notes),
        named_classes(names, getattr(net, "num_classes", None), title, notes),
        notes=notes,
    ).probed()


def completed(preprocessing: Preprocessing, title: str, notes: list[str]) -> Preprocessing:
    """The preprocessing with ImageNet's usual values for what is not known, and a note of which these are.

    Raises `InputError` where the means or deviations are not one for each of three channels.
    """
    usual: dict[str, Any] = {
        "input_size": (3, 224, 224),
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "interpolation": "bicubic",
        "crop_pct": DEFAULT_CROP_PCT,
    }
    missing = [name for name in usual if getattr(preprocessing, name) is None]
    if missing:
        values = ", ".join(f"{name} {usual[name]}" for name in missing)
        notes.append(f"{title} does not say how images are prepared in full; taken as usual: {values}.")
    full = preprocessing.model_copy(update={name: usual[name] for name in missing})
    assert full.input_size is not None
    assert full.mean is not None
    assert full.std is not None
    if not full.input_size[0] == len(full.mean) == len(full.std) == 3:
        raise InputError(
            f"{title} takes images of {full.input_size[0]} channels with {len(full.mean)} means and {len(full.std)} "
            "deviations; predict prepares images of three: red, green and blue."
        )
    return full


def named_classes(
    names: Sequence[str] | None, classes: int | None, title: str, notes: list[str]
) -> Sequence[str] | None:
    """The names given; ImageNet's where there are none for a thousand classes, which a note says."""
    if names is not None or classes != 1000:
        return names
    notes.append(f"{title} has no class names; its thousand classes are taken for those of ImageNet.")
    imagenet = ImageNetInfo()
    return [imagenet.index_to_description(index) for index in range(classes)]
