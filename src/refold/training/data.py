"""Images for training and held-out images for measuring: a bundled data set, or the user's class folders."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path

from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from refold.errors import InputError
from refold.models.composed import task_of
from refold.own_code import is_own_code
from refold.training.digits import bundled_digits, digit_scenes
from refold.training.folders import class_folders
from refold.training.images import Images, LabelledImages
from refold.training.labelled import open_labelled
from refold.training.own_data import open_own
from refold.training.pictures import SUFFIXES, sizes_of
from refold.training.recipe import list_recipes

# Short sides, in pixels, up to which pictures count as small; a few dozen of the first are looked at.
_SMALL = 64
_SAMPLE, _MOST_LOOKED_AT = 40, 4000

_CIFAR_FOLDERS = {dataset.base_folder: dataset for dataset in (CIFAR10, CIFAR100)}

# timm's names for what `refold.training.readers` opens.
READER_PREFIXES = ("hfds", "hfids", "wds")


def open_data(data: str, seed: int = 0, task: str | None = None) -> LabelledImages:
    """The images that ``data`` names: "digits", a folder of CIFAR as distributed, or class folders.

    Images with boxes (COCO's JSON, YOLO's text files, Pascal VOC's XML) and with masks are recognised by what lies in
    the folder; ``task`` ("classify", "detect", "instances" or "segment") says which where that is not clear.
    ``file.py:Name`` or ``package.module:name`` is a Dataset of the user's own (`own_data.open_own`).
    With one of timm's prefixes, ``hfds/``, ``hfids/`` or ``wds/``, they are those of `readers.open_reader`.
    Raises `InputError` where they cannot be used.
    """
    if data == "digits":
        if task not in (None, "classify", "detect"):
            raise InputError("The digits have boxes and no masks; give a folder of your own images.")
        return digit_scenes(seed) if task == "detect" else bundled_digits(seed)
    if data.partition("/")[0] in READER_PREFIXES and "/" in data:
        from refold.training.readers import open_reader  # needs what not everybody has

        return open_reader(data, seed)
    root = Path(data)
    if is_own_code(data) and not root.exists():
        return open_own(data, seed, task)
    for folder, dataset in _CIFAR_FOLDERS.items():
        if root.name == folder or (root / folder).is_dir():
            return _cifar(root.parent if root.name == folder else root, dataset)
    labelled = None if task == "classify" else open_labelled(root, seed, task)
    if labelled is not None:
        return labelled
    if task not in (None, "classify"):
        kinds = {
            "detect": "boxes: COCO's JSON, YOLO's labels with a data.yaml, or Pascal VOC's Annotations",
            "instances": "outlines of objects: COCO's JSON with segmentation, or YOLO's labels with outlines",
            "segment": "masks: folders of images and masks, or Pascal VOC's SegmentationClass",
        }
        raise InputError(f"'{data}' holds no {kinds[task]}.")
    return class_folders(root, seed)


def fitting_recipe(data: str | None, *, from_weights: bool, network: str = "") -> str:
    """The recipe for images when none is named: by their size, and by whether training starts from weights.

    Without ``data`` they are taken for photos. The ``network`` decides where it is a detector or a segmenter.
    """
    head = network.partition("/")[0]
    task = task_of(network)
    if task != "classify":
        usual = {"detect": "dense", "instances": "maskrcnn", "segment": "segmentation"}
        return head if head in list_recipes() else usual[task]
    if data is not None and _are_small(data):
        return "small_images"
    return "finetune" if from_weights else "photos"


def _are_small(data: str) -> bool:
    """Whether the images of ``data`` are small pictures, by a look at a few; True for the digits and CIFAR."""
    root = Path(data)
    if data == "digits" or any(
        (place / name).is_dir() for name in _CIFAR_FOLDERS for place in (root, root.parent)
    ):
        return True
    if data.partition("/")[0] in READER_PREFIXES:
        return False
    found = (Path(place) / name for place, _, names in os.walk(root) for name in names)
    pictures = [path for path in islice(found, _MOST_LOOKED_AT) if path.suffix.lower() in SUFFIXES]
    sides = sorted(min(size) for size in sizes_of(pictures[:: max(1, len(pictures) // _SAMPLE)]).elements())
    return bool(sides) and sides[len(sides) // 2] <= _SMALL


def _cifar(root: Path, dataset: type[CIFAR10]) -> LabelledImages:
    try:
        parts = [dataset(str(root), train=train) for train in (True, False)]
    except (RuntimeError, OSError, ValueError) as error:
        raise InputError(
            f"'{root / dataset.base_folder}' is no whole {dataset.__name__} ({' '.join(str(error).split())}); "
            "unpack the archive again."
        ) from error
    training, held_out = (
        Images([Image.fromarray(pixels) for pixels in part.data], list(part.targets)) for part in parts
    )
    return LabelledImages(dataset.__name__, list(parts[0].classes), training, held_out, mirror=True)
