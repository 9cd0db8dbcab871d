"""Images for training and held-out images for measuring: a bundled data set, or the user's class folders."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import IMG_EXTENSIONS

from refold.errors import InputError
from refold.files import PathLike

HELD_OUT_SHARE = 0.2
_TRAINING_FOLDER = "train"
_HELD_OUT_FOLDERS = ("val", "valid", "validation", "test")
_CIFAR_FOLDERS = {dataset.base_folder: dataset for dataset in (CIFAR10, CIFAR100)}

# timm's names for what `refold.training.readers` opens.
READER_PREFIXES = ("hfds", "hfids", "wds")


class Packed(Protocol):
    """An encoded image inside something larger; as text it says where."""

    def read_bytes(self) -> bytes: ...


Source = Image.Image | Path | Packed


@dataclass(frozen=True)
class Images:
    """Images, each in memory, a file or inside something larger, with the index of its class."""

    sources: Sequence[Source]
    targets: Sequence[int]

    def __len__(self) -> int:
        return len(self.sources)


@dataclass(frozen=True)
class LabelledImages:
    """Training images and held-out images of the same classes.

    ``mirror`` says whether a mirrored image still belongs to its class.
    """

    title: str
    class_names: list[str]
    training: Images
    held_out: Images
    mirror: bool


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


def read_image(source: Source) -> Image.Image:
    """Decode an image as RGB; raises `InputError`, naming the file, where that is not possible."""
    if isinstance(source, Image.Image):
        return source
    try:
        with Image.open(source if isinstance(source, Path) else io.BytesIO(source.read_bytes())) as image:
            return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise InputError(
            f"The image '{source}' cannot be read (no kind of image that is known); repair or remove it."
        ) from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"The image '{source}' cannot be read ({error}); repair or remove it.") from error


def read_into_memory(
    images: Images,
    image_size: int,
    on_image: Callable[[], object] = lambda: None,
    on_unreadable: Callable[[str], object] | None = None,
) -> Images:
    """Decode every image once, shrunk to a short side of ``image_size`` pixels if it is larger.

    An unreadable image is so found before training and not in the midst of it. ``on_image`` is called
    after each. ``on_unreadable`` gets the message of each image that cannot be read, which is then left out.
    Raises `InputError` at the first image that cannot be read where there is no ``on_unreadable``.
    """

    def read(source: Source) -> Image.Image | InputError:
        try:
            return _shrunk(read_image(source), image_size)
        except InputError as error:
            return error

    pictures: list[Source] = []
    targets: list[int] = []
    with ThreadPoolExecutor() as pool:
        try:
            for picture, target in zip(pool.map(read, images.sources), images.targets, strict=True):
                if not isinstance(picture, InputError):
                    pictures.append(picture)
                    targets.append(target)
                elif on_unreadable is None:
                    raise picture
                else:
                    on_unreadable(str(picture))
                on_image()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return Images(pictures, targets)


def _shrunk(image: Image.Image, image_size: int) -> Image.Image:
    factor = image_size / min(image.size)
    if factor >= 1:
        return image
    width, height = (max(image_size, round(side * factor)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


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


def hold_out_share(
    title: str,
    class_names: list[str],
    sources: Sequence[Source],
    targets: Sequence[int],
    seed: int,
    *,
    mirror: bool,
) -> LabelledImages:
    """Hold out a fifth of each class, chosen by the seed.

    Raises `InputError` where a class has but one image.
    """
    rarest, count = Counter(targets).most_common()[-1]
    if count < 2:
        raise InputError(
            f"The class '{class_names[rarest]}' of '{title}' has one image; each class needs at least two, "
            "one of them to hold out."
        )
    held_out_count = max(len(class_names), round(HELD_OUT_SHARE * len(targets)))
    training, held_out = train_test_split(
        range(len(targets)), test_size=held_out_count, stratify=targets, random_state=seed
    )
    return LabelledImages(
        title,
        class_names,
        training=_pick(sources, targets, training),
        held_out=_pick(sources, targets, held_out),
        mirror=mirror,
    )


def _pick(sources: Sequence[Source], targets: Sequence[int], indices: Iterable[int]) -> Images:
    chosen = sorted(indices)
    return Images([sources[index] for index in chosen], [targets[index] for index in chosen])
