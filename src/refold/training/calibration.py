"""Photos for a quantisation, read as predictions read them: some for the ranges, the others to measure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.data import create_transform
from torch import Tensor, nn

from refold.errors import InputError, printable, some
from refold.export.metadata import Preprocessing
from refold.export.preparing import known_preprocessing
from refold.files import PathLike
from refold.training.pictures import LeftOut, find_images, read_image
from refold.training.predicting import completed

# The share of few photos that measures.
_MEASURING = 0.5
_MOST_MEASURING = 2000


@dataclass(frozen=True)
class Photos:
    """Prepared photos ``(n, 3, height, width)``: for the ranges, and others to measure on with their classes."""

    images: Tensor
    held_out: Tensor | None
    labels: list[int] | None


def read_images(
    folder: PathLike | Sequence[PathLike],
    model: nn.Module,
    *,
    size: tuple[int, ...] | None = None,
    limit: int | None = None,
) -> Tensor:
    """The photos of a folder and the folders in it, prepared as a model takes them: ``(n, 3, height, width)``.

    How they are prepared is what the model's checkpoint or ``pretrained_cfg`` says; ``size`` is another (channels,
    height, width). With ``limit`` that many are taken, evenly spread over the sorted files.
    Raises `InputError` where there are none, or none that can be read.

    Examples:
        >>> import refold
        >>> from PIL import Image
        >>> for name in "ab":
        ...     Image.new("RGB", (80, 60), "red").save(f"{name}.jpg")
        >>> refold.read_images(".", refold.create_model("repghostnet_050")).shape
        torch.Size([2, 3, 224, 224])
    """
    paths = (
        [Path(folder)]
        if isinstance(folder, (str, Path)) or hasattr(folder, "__fspath__")
        else map(Path, folder)
    )
    found, _ = _found(list(paths))
    return _read(spread(found, limit), model, size, lambda _: None)[0]


def split_photos(
    folder: Path,
    model: nn.Module,
    size: tuple[int, ...],
    calibration: int,
    *,
    labelled: bool,
    say: Callable[[str], None],
) -> Photos:
    """Photos for the ranges, ``calibration`` of them or half of what there is, and up to 2,000 others to measure on.

    With ``labelled`` the folder of each photo is its class: by the network's class names where it has some, else in
    their sorted order. What was left out is said.
    """
    found, left_out = _found([folder])
    for line in left_out:
        say(line)
    count = min(calibration, max(1, round(len(found) * (1 - _MEASURING))))
    chosen = set(spread(found, count))
    others = spread([path for path in found if path not in chosen], _MOST_MEASURING)
    images, _ = _read(sorted(chosen), model, size, say)
    if labelled:
        _check_spread(sorted(chosen), say)
    if not others:
        return Photos(images, None, None)
    held_out, kept = _read(others, model, size, say)
    labels = _labels(kept, found, model) if labelled else None
    return Photos(images, held_out, labels)


def spread(paths: Sequence[Path], count: int | None) -> list[Path]:
    """As many of the paths, evenly spread."""
    if count is None or count >= len(paths):
        return list(paths)
    return [paths[int(index * len(paths) / count)] for index in range(count)]


def _found(paths: Sequence[Path]) -> tuple[list[Path], list[str]]:
    left_out = LeftOut()
    found = find_images(paths, left_out)
    if not found:
        raise InputError(
            f"There are no photos in '{', '.join(map(str, paths))}'; give a folder with photos such as the network "
            "will see."
        )
    return sorted(found), left_out.notes()


def _read(
    paths: Sequence[Path], model: nn.Module, size: tuple[int, ...] | None, say: Callable[[str], None]
) -> tuple[Tensor, list[Path]]:
    """The photos that can be read, prepared, and their paths."""
    notes: list[str] = []
    known = Preprocessing(**known_preprocessing(model))
    preprocessing = completed(known, type(model).__name__, notes)
    if size is not None:
        preprocessing = preprocessing.model_copy(update={"input_size": size})
    for note in notes:
        say(note)
    prepare = create_transform(is_training=False, **preprocessing.known())
    unreadable: list[str] = []

    def read(path: Path) -> Tensor | None:
        try:
            prepared: Tensor = prepare(read_image(path))
        except InputError as error:
            unreadable.append(str(error))
            return None
        return prepared

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(read, paths))
    kept = [path for path, image in zip(paths, found, strict=True) if image is not None]
    if not kept:
        raise InputError(f"None of {len(paths)} photos can be read; the first: {printable(unreadable[0])}")
    if unreadable:
        say(
            f"{len(unreadable)} of {len(paths)} photos cannot be read and were left out; the first: {unreadable[0]}"
        )
    return torch.stack([image for image in found if image is not None]), kept


def _check_spread(paths: Sequence[Path], say: Callable[[str], None]) -> None:
    classes = Counter(path.parent.name for path in paths)
    if len(classes) == 1 and len(paths) > 1:
        say(f"All photos for the ranges are of one class, '{next(iter(classes))}'; give some of each.")


def _labels(paths: Sequence[Path], every: Sequence[Path], model: nn.Module) -> list[int]:
    names = getattr(getattr(model, "card", None), "class_names", None)
    folders = sorted({path.parent.name for path in every})
    order = list(names) if names else folders
    strangers = [name for name in folders if name not in order]
    if strangers:
        raise InputError(
            f"The folders {some(strangers)} are no classes of the network; name the folders as its classes, or leave "
            "--labels out."
        )
    outputs = getattr(model, "num_classes", None)
    if not names and outputs not in (None, len(order)):
        raise InputError(
            f"There are {len(order)} folders for {outputs} classes of the network; give one folder for each, or leave "
            "--labels out."
        )
    place = {name: index for index, name in enumerate(order)}
    return [place[path.parent.name] for path in paths]
