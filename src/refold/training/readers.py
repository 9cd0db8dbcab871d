"""Images inside something larger, found through timm's readers: WebDataset shards and Hugging Face data sets."""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from timm.data.readers import create_reader

from refold.errors import InputError, first_line
from refold.training.images import Images, LabelledImages, hold_out_share

_EXTRAS = {"datasets": "hf", "webdataset": "wds"}
_ENDINGS = ("jpg", "jpeg", "png", "webp")
_INFORMATION = ("_info.json", "info.json")
_HELD_OUT_SPLITS = ("validation", "val", "valid", "test")
_LARGEST_STREAM = 2 * 1024**3


@dataclass(frozen=True)
class Member:
    """The bytes of a file inside an uncompressed tar archive."""

    archive: Path
    name: str
    offset: int
    size: int

    def read_bytes(self) -> bytes:
        with self.archive.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def __str__(self) -> str:
        return f"{self.archive}:{self.name}"


@dataclass(frozen=True)
class HubImage:
    """An image of a Hugging Face data set on disk."""

    reader: Any
    index: int
    title: str

    def read_bytes(self) -> bytes:
        with self.reader[self.index][0] as file:
            encoded: bytes = file.read()
        return encoded

    def __str__(self) -> str:
        return f"{self.title}, image {self.index}"


@dataclass(frozen=True)
class Held:
    """The bytes of an image that came out of a stream."""

    encoded: bytes
    title: str

    def read_bytes(self) -> bytes:
        return self.encoded

    def __str__(self) -> str:
        return self.title


def open_reader(data: str, seed: int) -> LabelledImages:
    """The images of ``hfds/NAME``, ``hfids/NAME`` or ``wds/FOLDER``; the prefixes are timm's.

    NAME is a data set of the Hugging Face hub, or a folder that its library reads; ``hfds`` keeps it on disk,
    ``hfids`` streams it into memory. FOLDER holds WebDataset shards, uncompressed tar files of images with their
    class's number in a ``.cls`` beside each: those that its ``_info.json`` names, or else those with train and with
    val, valid, validation or test in their names. Where there is no such second split, a fifth of each class is held
    out by the seed.
    Raises `InputError` where the package is missing (it names the extra), or the images cannot be used.
    """
    kind, _, name = data.partition("/")
    try:
        parts, class_names = _shards(Path(name)) if kind == "wds" else _hub(kind, name)
    except InputError:
        raise
    except Exception as error:  # whatever the foreign reader raises
        raise InputError(f"'{data}' cannot be read: {first_line(error)}.") from error
    training, held_out = parts
    if held_out is None:
        return hold_out_share(data, class_names, training.sources, training.targets, seed, mirror=True)
    return LabelledImages(data, class_names, training, held_out, mirror=True)


Parts = tuple[Images, Images | None]


def _need(package: str) -> None:
    """Raise `InputError` where a package is missing; timm's readers say so in ways of their own."""
    try:
        import_module(package)
    except ImportError as error:
        raise InputError(
            f"These images need the package {package}; install it: pip install 'refold[{_EXTRAS[package]}]'."
        ) from error


def _shards(root: Path) -> tuple[Parts, list[str]]:
    if not root.is_dir():
        raise InputError(f"There is no folder '{root}'; give one that holds WebDataset shards (tar files).")
    found = {split: _split_shards(root, split) for split in ("train", *_HELD_OUT_SPLITS)}
    held_out = next((found[split] for split in _HELD_OUT_SPLITS if found[split]), None)
    everything = sorted(path.name for path in root.glob("*.tar"))
    training = found["train"] or ([] if held_out else everything)
    if not training:
        raise InputError(f"'{root}' holds no tar files to train on; name them train-0000.tar and so on.")
    parts = _members(root, training), _members(root, held_out) if held_out else None
    highest = max(target for part in parts if part for target in part.targets)
    return parts, [str(number) for number in range(highest + 1)]


def _split_shards(root: Path, split: str) -> list[str]:
    """The shards of a split, as timm's reader takes them from the folder's ``_info.json``, or by their names."""
    if any((root / name).is_file() for name in _INFORMATION):
        _need("webdataset")
        try:
            reader = create_reader("wds/", root=str(root), split=split)
        except RuntimeError as error:
            if "not found in info" in str(error):
                return []
            raise
        return list(reader.split_info.filenames)
    return sorted(path.name for path in root.glob("*.tar") if split in path.stem.lower().split("-"))


def _members(root: Path, shards: Iterable[str]) -> Images:
    """Where the images of shards are, in their order; the headers are read, not the images."""
    sources: list[Member] = []
    targets: list[int] = []
    for shard in shards:
        path = root / shard
        samples: dict[str, dict[str, tarfile.TarInfo]] = {}
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                folder, _, file = member.name.rpartition("/")
                key, _, ending = file.partition(".")
                if member.isfile():
                    samples.setdefault(f"{folder}/{key}", {})[ending.lower()] = member
            for key, files in samples.items():
                image = next((files[ending] for ending in _ENDINGS if ending in files), None)
                label = files.get("cls")
                if image is None or label is None:
                    raise InputError(
                        f"'{path}:{key.strip('/')}' holds {sorted(files)}; each image needs its class's number "
                        f"beside it: one of {', '.join(_ENDINGS)}, and cls."
                    )
                stream: Any = archive.extractfile(label)
                sources.append(Member(path, image.name, image.offset_data, image.size))
                targets.append(int(stream.read()))
    return Images(sources, targets)


def _hub(kind: str, name: str) -> tuple[Parts, list[str]]:
    _need("datasets")
    import datasets

    splits = datasets.get_dataset_split_names(name)
    training = "train" if "train" in splits else splits[0]
    held_out = next((split for split in _HELD_OUT_SPLITS if split in splits and split != training), None)
    keys = _columns(name)
    readers = [_hub_reader(kind, name, split, keys) for split in (training, held_out) if split is not None]
    class_names = sorted(readers[0].class_to_idx, key=readers[0].class_to_idx.__getitem__)
    parts = [
        (_rows if kind == "hfds" else _stream)(reader, f"{kind}/{name}, {split}")
        for reader, split in zip(readers, (training, held_out), strict=False)
    ]
    return (parts[0], parts[1] if len(parts) > 1 else None), class_names


def _columns(name: str) -> tuple[str, str]:
    """The columns of the image and of its class: those of that kind, the usual names first."""
    import datasets

    features = dict(datasets.load_dataset_builder(name).info.features or {})
    if not features:  # not known before the files were looked at
        features = dict(next(iter(datasets.load_dataset(name).values())).features)
    chosen = []
    for usual, feature in (("image", datasets.Image), ("label", datasets.ClassLabel)):
        found = [column for column, value in features.items() if isinstance(value, feature)]
        if not found:
            raise InputError(
                f"'{name}' has no column of the kind {feature.__name__}, only {', '.join(features)}; give a data set "
                "of images with classes."
            )
        chosen.append(usual if usual in found else found[0])
    return chosen[0], chosen[1]


def _hub_reader(kind: str, name: str, split: str, keys: tuple[str, str]) -> Any:
    image, label = keys
    # A stream's length decides how long timm reads it in training; here it is read once to its end.
    streaming = {"num_samples": 1} if kind == "hfids" else {}
    return create_reader(f"{kind}/{name}", split=split, input_key=image, target_key=label, **streaming)


def _rows(reader: Any, title: str) -> Images:
    sources = [HubImage(reader, index, title) for index in range(len(reader))]
    if not hasattr(reader, "iter_targets"):
        raise InputError(
            "Sets of the hub's library need a newer timm; update it: pip install --upgrade timm."
        )
    return Images(sources, [int(target) for target in reader.iter_targets()])


def _stream(reader: Any, title: str) -> Images:
    sources: list[Held] = []
    targets: list[int] = []
    total = 0
    for encoded, target in _encoded(reader):
        total += len(encoded)
        if total > _LARGEST_STREAM:
            raise InputError(
                f"'{title}' holds more than {_LARGEST_STREAM / 2**30:.0f} GiB of images, too many to keep in memory; "
                "give hfds/ instead of hfids/, which keeps them on disk."
            )
        sources.append(Held(encoded, f"{title}, image {len(sources)}"))
        targets.append(int(target))
    return Images(sources, targets)


def _encoded(reader: Any) -> Iterator[tuple[bytes, int]]:
    """The stream of timm's reader before it decodes, so that an unreadable image does not end it."""
    import datasets

    reader._lazy_init()
    for row in reader.ds.cast_column(reader.input_key, datasets.Image(decode=False)):
        image = row[reader.input_key]
        yield image["bytes"] or Path(image["path"]).read_bytes(), row[reader.target_key]
