"""What is marked in an image besides its one class: boxes, or a class for every pixel."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from refold.errors import InputError, first_line
from refold.training.contents import digest_of
from refold.training.drawing import draw_boxes, draw_mask, draw_objects

IGNORED = 255
"""The number of pixels of a mask that belong to no class and count nowhere."""


class Labels(Protocol):
    """What belongs to an image, for the classes of a set by their numbers; ``unit`` is what is counted of them.

    ``is_in_memory`` says that counting reads no file.
    """

    unit: ClassVar[str]
    is_in_memory: ClassVar[bool]

    def on(self, image: Image.Image) -> Any:
        """The labels as tensors; raises `InputError` where they are none of this image."""

    def numbers(self) -> Counter[int]:
        """How often each class occurs."""

    def fingerprint(self) -> str:
        """A short text that is another one when the labels are."""

    def drawn(self, image: Image.Image, class_names: Sequence[str]) -> Image.Image:
        """The image with its labels on it."""


@dataclass(frozen=True)
class BoxLabels:
    """What is in an image: boxes x1, y1, x2, y2, the numbers of their classes, and which of them are crowds.

    They are pixels of the upright picture, or with ``are_shares`` parts of its width and height. ``size`` is the width
    and height that they were written for, if that is known.
    """

    unit: ClassVar[str] = "boxes"
    is_in_memory: ClassVar[bool] = True

    boxes: Sequence[Sequence[float]] = ()
    labels: Sequence[int] = ()
    crowds: Sequence[bool] = ()
    size: tuple[int, int] | None = None
    are_shares: bool = False

    def on(self, image: Image.Image) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes ``(n, 4)`` in pixels, labels and crowds ``(n,)``; raises `InputError` for an image of another size."""
        if self.size is not None and self.size != image.size:
            own, theirs = (" x ".join(map(str, size)) for size in (image.size, self.size))
            raise InputError(f"An image has {own} pixels, and its labels are for {theirs}; label it again.")
        boxes = torch.tensor(self.boxes, dtype=torch.float32).reshape(-1, 4)
        if self.are_shares:
            boxes = boxes * torch.tensor(image.size * 2)
        crowds = self.crowds or [False] * len(self.labels)
        return boxes, torch.tensor(self.labels, dtype=torch.int64), torch.tensor(crowds, dtype=torch.bool)

    def numbers(self) -> Counter[int]:
        return Counter(self.labels)

    def fingerprint(self) -> str:
        return hashlib.blake2b(repr(self).encode(), digest_size=8).hexdigest()

    def drawn(self, image: Image.Image, class_names: Sequence[str]) -> Image.Image:
        boxes, labels, _ = self.on(image)
        names = [class_names[label] for label in labels.tolist()]
        return draw_boxes(image, boxes.tolist(), names, labels.tolist())


Outline = Sequence[Sequence[float]] | Mapping[str, Any]
"""What of an image belongs to an object: polygons of x and y in turn, or COCO's run lengths."""


@dataclass(frozen=True)
class OutlinedLabels(BoxLabels):
    """Boxes, and an outline for each: polygons in the units of the boxes, or run lengths of the whole picture."""

    outlines: Sequence[Outline] = ()

    def masks_on(self, image: Image.Image) -> Tensor:
        """What belongs to each object, ``(n, height, width)`` uint8 of 0 and 1, as COCO's own tools draw it.

        Raises `InputError` where an outline is for an image of another size, or no outline at all.
        """
        coco = coco_masks()
        masks = torch.zeros(len(self.outlines), image.height, image.width, dtype=torch.uint8)
        scale = np.array(image.size if self.are_shares else (1.0, 1.0))
        for mask, outline in zip(masks, self.outlines, strict=True):
            if isinstance(outline, Mapping):
                self._check_size(outline, image)
                whole = coco.frPyObjects(dict(outline), *image.size[::-1]) if _is_list(outline) else outline
            else:
                polygons = [(np.reshape(part, (-1, 2)) * scale).ravel().tolist() for part in outline]
                whole = coco.merge(coco.frPyObjects(polygons, *image.size[::-1]))
            mask.copy_(torch.from_numpy(coco.decode(whole)))
        return masks

    def _check_size(self, outline: Mapping[str, Any], image: Image.Image) -> None:
        if list(outline["size"]) != [image.height, image.width]:
            height, width = outline["size"]
            raise InputError(
                f"An image has {image.width} x {image.height} pixels, and the run lengths of an object are for "
                f"{width} x {height}; label it again."
            )

    def drawn(self, image: Image.Image, class_names: Sequence[str]) -> Image.Image:
        painted = draw_objects(image, self.masks_on(image).bool(), list(self.labels))
        return super().drawn(painted, class_names)


def _is_list(outline: Mapping[str, Any]) -> bool:
    return not isinstance(outline["counts"], (str, bytes))


def coco_masks() -> Any:
    """COCO's tools for masks; raises `InputError` where the package that has them is missing."""
    try:
        from faster_coco_eval.core import mask
    except ImportError as error:
        raise InputError(
            "Masks of objects need the package faster-coco-eval; install it: pip install 'refold[detect]'."
        ) from error
    return mask


@dataclass(frozen=True)
class MaskFile:
    """A picture whose values are numbers of classes; ``classes`` tells the place of each, others belong to none."""

    unit: ClassVar[str] = "pixels"
    is_in_memory: ClassVar[bool] = False

    path: Path
    classes: Mapping[int, int]

    def values(self) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
        """The values as they are in the file ``(height, width)``.

        Raises `InputError` where it cannot be read, or has colours in place of numbers.
        """
        try:
            with Image.open(self.path) as image:
                if image.mode not in ("L", "P", "1", "I;16", "I"):
                    raise InputError(
                        f"The mask '{self.path}' has colours ({image.mode}); save the number of a class for each pixel "
                        "(an image with one channel or a palette)."
                    )
                return np.asarray(image)
        except InputError:
            raise
        except Exception as error:  # a damaged file may raise anything in Pillow's readers
            raise InputError(
                f"The mask '{self.path}' cannot be read ({first_line(error)}); repair or remove it."
            ) from error

    def on(self, image: Image.Image) -> Tensor:
        """The places of the classes ``(height, width)`` uint8, 255 for none; raises `InputError` for another size."""
        values = self.values()
        if values.shape != (image.height, image.width):
            own = f"{values.shape[1]} x {values.shape[0]}"
            raise InputError(
                f"The mask '{self.path}' has {own} pixels and its image {image.width} x {image.height}; make it anew."
            )
        table = np.full(int(max(values.max(), *self.classes)) + 1, IGNORED, dtype=np.uint8)
        for value, place in self.classes.items():
            table[value] = place
        return torch.from_numpy(table[values])

    def found(self) -> dict[int, int]:
        """How many pixels have which value."""
        values, counts = np.unique(self.values(), return_counts=True)
        return dict(zip(values.tolist(), counts.tolist(), strict=True))

    def numbers(self) -> Counter[int]:
        pairs = self.found().items()
        return Counter({self.classes[value]: count for value, count in pairs if value in self.classes})

    def fingerprint(self) -> str:
        return digest_of(self.path)

    def drawn(self, image: Image.Image, class_names: Sequence[str]) -> Image.Image:
        return draw_mask(image, self.on(image), class_names, ignored=IGNORED)
