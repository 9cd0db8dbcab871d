"""Images for training and held-out images for measuring: a bundled data set, or the user's class folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import IMG_EXTENSIONS

from refold.errors import InputError
from refold.files import PathLike
from refold.training.images import Images, LabelledImages, Source, hold_out_share

_TRAINING_FOLDER = "train"
_HELD_OUT_FOLDERS = ("val", "valid", "validation", "test")
_CIFAR_FOLDERS = {dataset.base_folder: dataset for dataset in (CIFAR10, CIFAR100)}

# timm's names for what `refold.training.readers` opens.
READER_PREFIXES = ("hfds", "hfids", "wds")


def bundled_digits(seed: int = 0) -> LabelledImages:
    """The 1,797 handwritten digits (8 x 8, grey) that scikit-learn bundles, a fifth of each held out."""
    digits = load_digits()
    pictures = (digits.images * (255 / 16)).round().astype(np.uint8)
    sources: list[Source] = [Image.fromarray(picture).convert("RGB") for picture in pictures]
    names = [str(name) for name in digits.target_names]
    return hold_out_share(
        "handwritten digits (scikit-learn)", names, sources, digits.target.tolist(), seed, mirror=False
    )


def class_folders(folder: PathLike, seed: int = 0) -> LabelledImages:
    """The images of a folder with one folder a class; a fifth of each class is held out.

    Where the folder holds ``train`` and ``val``, ``valid``, ``validation`` or ``test``, that split is
    used instead.
    Raises `InputError` where the folder is missing, a class has no images or there are fewer than two
    classes.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError(
            f"There is no folder '{root}'; give a folder that holds one folder of images a class."
        )
    held_out_root = next((root / name for name in _HELD_OUT_FOLDERS if (root / name).is_dir()), None)
    if held_out_root is None or not (root / _TRAINING_FOLDER).is_dir():
        names, images = _scan(root)
        return hold_out_share(str(root), names, images.sources, images.targets, seed, mirror=True)
    names, training = _scan(root / _TRAINING_FOLDER)
    held_out_names, held_out = _scan(held_out_root)
    if names != held_out_names:
        stranger = sorted(set(names) ^ set(held_out_names))[0]
        raise InputError(
            f"The class '{stranger}' is in only one of '{root / _TRAINING_FOLDER}' and '{held_out_root}'; "
            "both need the same class folders."
        )
    return LabelledImages(str(root), names, training, held_out, mirror=True)


def open_data(data: str, seed: int = 0) -> LabelledImages:
    """The images that ``data`` names: "digits", a folder of CIFAR as distributed, or class folders.

    With one of timm's prefixes, ``hfds/``, ``hfids/`` or ``wds/``, they are those of `readers.open_reader`.
    Raises `InputError` where they cannot be used.
    """
    if data == "digits":
        return bundled_digits(seed)
    if data.partition("/")[0] in READER_PREFIXES and "/" in data:
        from refold.training.readers import open_reader  # needs what not everybody has

        return open_reader(data, seed)
    root = Path(data)
    for folder, dataset in _CIFAR_FOLDERS.items():
        if root.name == folder or (root / folder).is_dir():
            return _cifar(root.parent if root.name == folder else root, dataset)
    return class_folders(root, seed)


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


def _scan(root: Path) -> tuple[list[str], Images]:
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if len(folders) < 2:
        found = f"only the class '{folders[0].name}'" if folders else "no class folders"
        raise InputError(
            f"'{root}' holds {found}; give a folder with two or more folders of images, one a class."
        )
    sources: list[Source] = []
    targets: list[int] = []
    for index, folder in enumerate(folders):
        files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMG_EXTENSIONS)
        if not files:
            raise InputError(
                f"The class folder '{folder}' holds no images; add some ({', '.join(IMG_EXTENSIONS)}) or "
                "remove it."
            )
        sources += files
        targets += [index] * len(files)
    return [folder.name for folder in folders], Images(sources, targets)
