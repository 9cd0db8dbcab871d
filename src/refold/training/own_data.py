"""Images of a Dataset of the user's own: `file.py:Name` or `package.module:name` as data."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from refold.errors import InputError, first_line
from refold.own_code import OwnCode
from refold.training.images import Images, LabelledImages, hold_out_labelled, hold_out_share
from refold.training.labelled.tidying import BoxesOfImage, Tally
from refold.training.labels import Outline, coco_masks
from refold.training.pictures import LARGEST_PICTURE

_EXPECTED = (
    "each item must be an image (Pillow's, or a uint8 tensor of three channels) and the number of its class, or a "
    "dictionary with boxes (x1, y1, x2, y2 in pixels) and labels, and masks for instances"
)


@dataclass(frozen=True)
class OwnImage:
    """An image of a data set, read when it is needed."""

    dataset: Any
    index: int
    title: str

    def read_bytes(self) -> bytes:
        encoded = io.BytesIO()
        item(self.dataset, self.index, self.title)[0].save(encoded, "BMP")  # exact, and quick to write
        return encoded.getvalue()

    def __str__(self) -> str:
        return f"{self.title}, item {self.index}"


def open_own(target: str, seed: int, task: str | None) -> LabelledImages:
    """The images of what a class or function of the user's own gives without arguments.

    That is a `torch.utils.data.Dataset`, of which a fifth is held out by the seed, or a pair of them: to train and to
    measure on. An item is an image and what belongs to it, as torchvision's data sets have it: the number of its class,
    or a dictionary with ``boxes`` ``(n, 4)``, ``labels`` ``(n,)`` from 0 and perhaps ``iscrowd`` ``(n,)`` and ``masks``
    ``(n, height, width)``. ``classes`` of the data set are the names. Every item is read once to begin with.
    Raises `InputError` where the code fails or an item is something else.
    """
    made = OwnCode(target).made()
    parts = list(made) if isinstance(made, tuple) else [made]
    if len(parts) not in (1, 2) or not all(_is_dataset(part) for part in parts):
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise InputError(f"'{target}' gives {kinds}; give a Dataset with a length, or a pair of them.")
    tally, kinds_met = Tally(), set[str]()
    read = [_read(part, target, task, tally, kinds_met) for part in parts]
    if len(kinds_met) != 1:
        raise InputError(
            f"The items of '{target}' are for {' and for '.join(sorted(kinds_met)) or 'nothing'}; {_EXPECTED}."
        )
    kind = kinds_met.pop()
    if task not in (None, kind):
        raise InputError(f"The items of '{target}' are for {kind}, not for {task}; {_EXPECTED}.")
    tally.check(target)
    names = _names(parts[0], target, [each for images in read for each in images.targets])
    notes = tuple(tally.notes())
    if len(read) == 2:
        return LabelledImages(target, names, read[0], read[1], mirror=True, notes=notes, task=kind)
    sources, targets = read[0].sources, read[0].targets
    if kind == "classify":
        return hold_out_share(target, names, sources, targets, seed, mirror=True)
    return hold_out_labelled(target, names, sources, targets, seed, task=kind, notes=notes)


def item(dataset: Any, index: int, title: str) -> tuple[Image.Image, Any]:
    """An RGB image of a data set, and what belongs to it; raises `InputError`, naming the item, where it has none."""
    place = f"'{title}', item {index}"
    try:
        image, target = dataset[index]
        if isinstance(image, Tensor):
            if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] != 3:
                raise ValueError(f"a {image.dtype} tensor of shape {tuple(image.shape)}")
            image = transforms.to_pil_image(image)
        if not isinstance(image, Image.Image):
            raise ValueError(f"a {type(image).__name__} in place of an image")
        if image.width * image.height > LARGEST_PICTURE:
            raise ValueError(f"{image.width} x {image.height} pixels, more than are read")
        return image.convert("RGB"), target
    except InputError:
        raise
    except Exception as error:  # other people's code
        raise InputError(f"{place} cannot be used ({first_line(error)}); {_EXPECTED}.") from error


def _is_dataset(part: Any) -> bool:
    return hasattr(part, "__len__") and hasattr(part, "__getitem__") and not isinstance(part, (str, Mapping))


def _read(dataset: Any, title: str, task: str | None, tally: Tally, kinds: set[str]) -> Images:
    if not len(dataset):
        raise InputError(f"'{title}' gives a data set without items; give one that holds images.")
    targets: list[Any] = []
    for index in range(len(dataset)):
        image, given = item(dataset, index, title)
        place = f"item {index}"
        if not index and item(dataset, 0, title)[0].tobytes() != image.tobytes():
            raise InputError(
                f"'{title}' gives another image each time that it is asked for one; leave changes by chance to the "
                "recipe."
            )
        if isinstance(given, Mapping):
            kind = "instances" if task == "instances" else "detect"
            targets.append(_boxes(given, image, title, place, tally, with_masks=kind == "instances"))
        else:
            kind = "classify"
            targets.append(_class(given, title, place))
        kinds.add(kind)
    return Images([OwnImage(dataset, index, title) for index in range(len(dataset))], targets)


def _class(given: Any, title: str, place: str) -> int:
    number = given.item() if isinstance(given, (Tensor, np.generic)) and np.ndim(given) == 0 else given
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise InputError(f"'{title}', {place}: its target is {given!r:.60}; {_EXPECTED}.")
    return number


def _boxes(
    given: Mapping[str, Any], image: Image.Image, title: str, place: str, tally: Tally, *, with_masks: bool
) -> Any:
    try:
        boxes = torch.as_tensor(given["boxes"], dtype=torch.float64).reshape(-1, 4)
        labels = torch.as_tensor(given["labels"]).reshape(-1).tolist()
        crowds = torch.as_tensor(given.get("iscrowd", [False] * len(labels))).bool().reshape(-1).tolist()
        outlines = _outlines(given["masks"], image) if with_masks else [None] * len(labels)
        if len({len(boxes), len(labels), len(crowds), len(outlines)}) > 1:
            raise ValueError(f"{len(boxes)} boxes and {len(labels)} labels")
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        lacking = f"it has no {error}" if isinstance(error, KeyError) else first_line(error)
        raise InputError(f"'{title}', {place}: {lacking}; {_EXPECTED}.") from error
    found = BoxesOfImage(image.size, tally, outlines=[] if with_masks else None)
    for box, label, crowd, outline in zip(boxes.tolist(), labels, crowds, outlines, strict=True):
        found.add(box, _class(label, title, place), place, crowd=crowd, outline=outline)
    return found.done(image.size)


def _outlines(given: Any, image: Image.Image) -> Sequence[Outline]:
    masks = torch.as_tensor(given).bool()
    if masks.dim() != 3 or masks.shape[1:] != (image.height, image.width):
        raise ValueError(
            f"masks of shape {tuple(masks.shape)} for an image of {image.width} x {image.height} pixels"
        )
    return [coco_masks().encode(np.asfortranarray(mask.numpy().astype(np.uint8))) for mask in masks]


def _names(dataset: Any, title: str, targets: Sequence[Any]) -> list[str]:
    numbers = {n for target in targets for n in ([target] if isinstance(target, int) else target.labels)}
    if not numbers:
        raise InputError(f"No item of '{title}' has a label; there is nothing to learn.")
    given = getattr(dataset, "classes", None)
    if given is None:
        return [str(number) for number in range(max(numbers) + 1)]
    names = [str(name) for name in given]
    if max(numbers) >= len(names):
        raise InputError(
            f"'{title}' has a label {max(numbers)}, and its classes are {len(names)}; count labels from 0."
        )
    return names
