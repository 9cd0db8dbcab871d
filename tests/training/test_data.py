"""The data sets that a name or a folder stands for; what cannot be used is named."""

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import CIFAR10, CIFAR100

from refold.errors import InputError
from refold.training.data import open_data
from refold.training.digits import bundled_digits
from refold.training.folders import class_folders
from refold.training.images import Images
from refold.training.pictures import read_image


def test_digits_are_split_by_class_and_seed() -> None:
    first, again, other = bundled_digits(0), bundled_digits(0), bundled_digits(1)
    assert (len(first.training), len(first.held_out)) == (1438, 359)
    assert first.class_names == [str(digit) for digit in range(10)]
    assert not first.mirror
    counts = np.bincount(first.held_out.targets)
    everything = np.bincount([*first.training.targets, *first.held_out.targets])
    assert (abs(counts - 0.2 * everything) <= 1).all()

    def pixels(images: Images) -> list[bytes]:
        return [read_image(source).tobytes() for source in images.sources]

    assert pixels(first.held_out) == pixels(again.held_out) != pixels(other.held_out)
    # The grey values 0 … 16 span the whole range.
    values = np.concatenate([np.asarray(source).ravel() for source in first.training.sources])
    assert (values.min(), values.max()) == (0, 255)


def test_class_folders_hold_out_a_fifth_of_each_class(make: Callable[..., Path]) -> None:
    root = make({"cat": 10, "dog": 20, ".hidden": 3})
    images = class_folders(root)
    assert images.class_names == ["cat", "dog"]
    assert (len(images.training), len(images.held_out)) == (24, 6)
    assert sorted(images.held_out.targets) == [0, 0, 1, 1, 1, 1]
    assert not set(images.training.sources) & set(images.held_out.sources)
    assert all(
        Path(str(s)).parent.name == images.class_names[t]
        for s, t in zip(images.held_out.sources, images.held_out.targets, strict=True)
    )


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_a_split_on_disk_is_kept(make: Callable[..., Path], name: str) -> None:
    root = make({"train/a": 3, "train/b": 2, f"{name}/a": 1, f"{name}/b": 1})
    images = class_folders(root)
    assert images.class_names == ["a", "b"]
    assert (len(images.training), len(images.held_out)) == (5, 2)
    assert all("train" in str(source) for source in images.training.sources)


def test_folders_that_cannot_be_used(make: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no folder"):
        class_folders(tmp_path / "missing")
    root = make({"train/a": 2, "train/b": 2, "test/a": 1, "test/c": 1})
    with pytest.raises(InputError, match="The class 'b' is in only one of"):
        class_folders(root)
    with pytest.raises(InputError, match="holds no class folders; give"):
        class_folders(root / "train" / "a")
    (tmp_path / "one" / "only").mkdir(parents=True)
    with pytest.raises(InputError, match="only the class 'only'"):
        class_folders(tmp_path / "one")
    (tmp_path / "one" / "second").mkdir()
    with pytest.raises(InputError, match=r"The class folder '.*only' holds no images"):
        class_folders(tmp_path / "one")


@pytest.mark.parametrize(("kind", "classes"), [(CIFAR10, 10), (CIFAR100, 100)])
def test_cifar_as_distributed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[CIFAR10], classes: int
) -> None:
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    generator = np.random.default_rng(0)
    label = "labels" if classes == 10 else "fine_labels"
    written = []
    for name, _ in [*kind.train_list, *kind.test_list]:
        pixels = generator.integers(0, 255, (4, 3072), dtype=np.uint8)
        written.append(pixels)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, label: [0, 1, 2, classes - 1]}))
    names = [f"class {index}" for index in range(classes)]
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: names}))
    with pytest.raises(InputError, match=rf"is no whole {kind.__name__} \(.*; unpack the archive again"):
        open_data(str(tmp_path))
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    # torchvision checks the class names' file by its checksum as well.
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    for given in (tmp_path, folder):
        images = open_data(str(given))
        assert images.class_names == names
        assert len(images.training) == 4 * len(kind.train_list)
        assert list(images.held_out.targets) == [0, 1, 2, classes - 1]
        # A row holds the red, the green and the blue picture, one after the other.
        picture = np.asarray(images.held_out.sources[1])
        assert np.array_equal(picture, written[-1][1].reshape(3, 32, 32).transpose(1, 2, 0))
