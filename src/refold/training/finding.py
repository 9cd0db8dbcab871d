"""What a trained detector or segmenter sees in images: boxes with names, or the share of each class."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from refold.boxes import Letterbox, detections
from refold.boxes.pasting import pasted, run_lengths
from refold.errors import InputError
from refold.export.metadata import Preprocessing
from refold.export.preparing import known_preprocessing
from refold.training.drawing import draw_boxes, draw_mask, draw_objects
from refold.training.pictures import read_image
from refold.training.predicting import completed, outputs_of
from refold.training.tasks.augmentation import normalized, resampling

_LARGEST_MASK = 100_000_000


class Seen(Protocol):
    """What was seen in one image, or why nothing was."""

    columns: ClassVar[tuple[str, ...]]

    @property
    def image(self) -> str:
        """The file."""

    @property
    def error(self) -> str | None:
        """Why nothing was seen."""

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON-able values."""

    def line(self) -> str:
        """The same in words."""

    def rows(self) -> list[tuple[object, ...]]:
        """The same as rows of a table with ``columns``."""

    def drawn(self, picture: Image.Image) -> dict[str, Image.Image]:
        """Pictures of it, by what their names end with."""


@dataclass(frozen=True)
class FoundBox:
    """A box x1, y1, x2, y2 in pixels of its image, the name and the number of its class, and its score from 0 to 1.

    ``mask`` ``(side, side)`` tells how surely each point of the box belongs to it, where the network does.
    """

    name: str
    number: int
    score: float
    box: tuple[float, float, float, float]
    mask: Tensor | None = None

    def area(self, size: tuple[int, int]) -> Tensor:
        """The pixels of an image of ``size`` (height, width) that belong to it, where there is a mask."""
        assert self.mask is not None
        return pasted(self.mask[None], torch.tensor([self.box]), size)[0]


@dataclass(frozen=True)
class BoxPrediction:
    """The boxes of one image of ``size`` (height, width), the surest first."""

    columns: ClassVar[tuple[str, ...]] = ("image", "class", "score", "x1", "y1", "x2", "y2")

    image: str
    boxes: list[FoundBox]
    error: str | None = None
    size: tuple[int, int] = (0, 0)

    def to_dict(self) -> dict[str, Any]:
        boxes: list[dict[str, Any]] = []
        for b in self.boxes:
            boxes.append({"name": b.name, "score": b.score, "box": list(b.box)})
            if b.mask is not None:
                boxes[-1]["mask"] = run_lengths(b.area(self.size))
        return {"image": self.image, "boxes": boxes, "error": self.error}

    def line(self) -> str:
        shown = ", ".join(f"{b.name} {b.score:.1%}" for b in self.boxes)
        return f"{self.image}: {shown or 'nothing found'}"

    def rows(self) -> list[tuple[object, ...]]:
        return [(self.image, b.name, f"{b.score:.6g}", *(f"{v:.1f}" for v in b.box)) for b in self.boxes]

    def drawn(self, picture: Image.Image) -> dict[str, Image.Image]:
        # The surest last, over the others.
        boxes = self.boxes[::-1]
        names = [f"{b.name} {b.score:.0%}" for b in boxes]
        for b in boxes:  # one by one: a hundred masks of a large picture would fill the memory
            if b.mask is not None:
                picture = draw_objects(picture, b.area((picture.height, picture.width))[None], [b.number])
        return {".png": draw_boxes(picture, [b.box for b in boxes], names, [b.number for b in boxes])}


@dataclass(frozen=True)
class MaskPrediction:
    """The classes of an image's pixels: ``mask`` ``(height, width)`` holds their numbers, ``shares`` their parts."""

    columns: ClassVar[tuple[str, ...]] = ("image", "class", "share")

    image: str
    shares: list[tuple[str, float]]
    mask: Tensor | None
    class_names: Sequence[str]
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        classes = [{"name": name, "share": share} for name, share in self.shares]
        return {"image": self.image, "classes": classes, "error": self.error}

    def line(self) -> str:
        return f"{self.image}: {', '.join(f'{name} {share:.1%}' for name, share in self.shares)}"

    def rows(self) -> list[tuple[object, ...]]:
        return [(self.image, name, f"{share:.6g}") for name, share in self.shares]

    def drawn(self, picture: Image.Image) -> dict[str, Image.Image]:
        assert self.mask is not None
        return {
            ".png": draw_mask(picture, self.mask, self.class_names),
            ".mask.png": Image.fromarray(self.mask.to(torch.uint8).numpy()),
        }


@dataclass(frozen=True)
class Finder:
    """A function from prepared images ``(n, 3, height, width)`` to boxes or masks, and what they mean.

    ``run`` gives what `refold.detections` does, or with ``gives_masks`` logits for every pixel. Boxes below
    ``threshold`` are left out. ``batch`` is how many images a call must have, None for any number. ``notes`` are
    sentences on what was not known for sure.
    """

    title: str
    run: Callable[[Tensor], Sequence[Tensor]]
    preprocessing: Preprocessing
    class_names: Sequence[str] | None
    gives_masks: bool = False
    threshold: float = 0.3
    batch: int | None = None
    notes: list[str] = field(default_factory=list)

    def predict(self, images: Sequence[Path]) -> Iterator[Seen]:
        """What is seen in each image, in order; one that cannot be read carries its error.

        Raises `InputError` where the network cannot run on such images.
        """
        for path in images:
            try:
                yield self.see(read_image(path), str(path))
            except InputError as error:
                yield self._nothing(str(path), str(error))

    def see(self, picture: Image.Image, name: str = "") -> Seen:
        """What is seen in an RGB image, which messages call ``name``."""
        known = self.preprocessing.known()
        _, height, width = known["input_size"]
        fitted = Letterbox((picture.height, picture.width), (height, width))
        image = normalized(known)(fitted.picture(picture, resampling(known)))
        outputs = self._outputs(image[None])
        if any(not part.isfinite().all() for part in outputs if part.is_floating_point()):
            return self._nothing(
                name, f"The image '{name}' has no prediction: {self.title} gives NaN or infinity for it."
            )
        return (
            self._mask(name, outputs[0], fitted) if self.gives_masks else self._boxes(name, outputs, fitted)
        )

    def _nothing(self, name: str, error: str) -> Seen:
        if self.gives_masks:
            return MaskPrediction(name, [], None, self.class_names or (), error)
        return BoxPrediction(name, [], error)

    def _outputs(self, image: Tensor) -> Sequence[Tensor]:
        batch = image if self.batch is None else image.expand(self.batch, -1, -1, -1).contiguous()
        outputs = outputs_of(self.title, self.run, batch)
        if self.gives_masks:
            return [outputs[0][:1]]
        *found, image_index = outputs
        own = (image_index == 0) & (found[1] >= self.threshold)
        return [part[own] for part in found]

    def _boxes(self, name: str, outputs: Sequence[Tensor], fitted: Letterbox) -> BoxPrediction:
        boxes, scores, labels, *masks = outputs
        order = scores.argsort(descending=True, stable=True)
        found = [
            FoundBox(self._name(label), label, score, (box[0], box[1], box[2], box[3]), mask)
            for box, score, label, mask in zip(
                fitted.back(boxes[order].float()).tolist(),
                scores[order].tolist(),
                labels[order].tolist(),
                masks[0][order] if masks else [None] * len(order),
                strict=True,
            )
        ]
        return BoxPrediction(name, found, size=fitted.size)

    def _mask(self, name: str, logits: Tensor, fitted: Letterbox) -> MaskPrediction:
        height, width = fitted.inner
        inside = logits[:, :, :height, :width].float()
        if logits.shape[1] * fitted.size[0] * fitted.size[1] <= _LARGEST_MASK:
            mask = F.interpolate(inside, fitted.size, mode="bilinear", align_corners=False)[0].argmax(0)
        else:  # the scores of a large picture would fill the memory; the nearest class does
            small = inside[0].argmax(0)[None, None].float()
            mask = F.interpolate(small, fitted.size, mode="nearest")[0, 0].long()
        counts = torch.bincount(mask.flatten(), minlength=logits.shape[1])
        order = counts.argsort(descending=True, stable=True).tolist()
        names = [self._name(number) for number in range(logits.shape[1])]
        shares = [(names[number], int(counts[number]) / mask.numel()) for number in order if counts[number]]
        return MaskPrediction(name, shares, mask, names)

    def _name(self, number: int) -> str:
        return str(number) if self.class_names is None else self.class_names[number]


def network_finder(net: nn.Module, title: str, threshold: float) -> Finder:
    """A detector or segmenter with what its checkpoint says.

    Raises `InputError` where its preprocessing is not understood.
    """
    notes: list[str] = []
    card = getattr(net, "card", None)
    gives_masks = getattr(net, "output_kind", None) == "segmentation"
    title = f"'{title}'"
    net.eval()
    boxes = None if gives_masks else detections(net, threshold=min(threshold, 0.05))
    return Finder(
        title,
        (lambda batch: [net(batch)]) if boxes is None else boxes,
        completed(Preprocessing(**known_preprocessing(net)), title, notes),
        None if card is None else card.class_names,
        gives_masks,
        threshold,
        notes=notes,
    )
