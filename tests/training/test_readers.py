"""WebDataset shards and Hugging Face data sets give the images that were put in, and name what cannot be read."""

import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from refold.errors import InputError
from refold.training.batches import held_out_loader
from refold.training.data import open_data
from refold.training.images import Images
from refold.training.pictures import read_image


def encoded(colour: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 5), (colour, 0, 0)).save(file, "png")
    return file.getvalue()


def write_shard(path: Path, samples: dict[str, tuple[str, bytes, str]]) -> None:
    with tarfile.open(path, "w") as archive:
        for key, (ending, image, label) in samples.items():
            for name, content in ((f"{key}.{ending}", image), (f"{key}.cls", label.encode())):
                if content:
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


def colours(images: Images) -> list[tuple[int, int]]:
    """The red of each image, and its class."""
    return [
        (np.asarray(read_image(source))[0, 0, 0].item(), target)
        for source, target in zip(images.sources, images.targets, strict=True)
    ]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    write_shard(folder / "set-train-000.tar", {f"a/{i}": ("png", encoded(i), str(i % 2)) for i in range(3)})
    write_shard(folder / "set-train-001.tar", {"3": ("png", encoded(3), "1"), "4": ("jpeg", b"junk", "0")})
    write_shard(folder / "set-val-000.tar", {"9": ("png", encoded(9), "2")})
    return folder


def test_shards_are_read_in_any_order(shards: Path) -> None:
    images = open_data(f"wds/{shards}")
    assert images.class_names == ["0", "1", "2"]
    assert images.training.targets == [0, 1, 0, 1, 0]
    whole = Images(images.training.sources[:4], images.training.targets[:4])
    assert colours(whole) == [(0, 0), (1, 1), (2, 0), (3, 1)]
    assert colours(Images(whole.sources[::-1], whole.targets[::-1])) == [(3, 1), (2, 0), (1, 1), (0, 0)]
    assert colours(images.held_out) == [(9, 2)]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_cannot_be_read_in_a_shard_is_named_and_left_out(shards: Path, workers: int) -> None:
    images = open_data(f"wds/{shards}").training

    def red(image: Image.Image, target: int) -> tuple[torch.Tensor, int]:
        return torch.tensor(np.asarray(image)[0, 0, 0].item()), target

    (batch,) = held_out_loader(images, red, 5, workers=workers)
    assert batch.images.tolist() == [0, 1, 2, 3]
    (message,) = batch.unreadable
    assert "set-train-001.tar:4.jpeg" in message
    assert "no kind of image" in message


def test_shards_of_an_information_file(shards: Path) -> None:
    """timm's file: splits with the names and lengths of their shards, whatever those are called."""
    pytest.importorskip("webdataset")
    (shards / "set-train-001.tar").rename(shards / "other.tar")
    split = {"name": "train", "num_samples": 2, "filenames": ["other.tar"], "shard_lengths": [2]}
    held = {"name": "validation", "num_samples": 1, "filenames": ["set-val-000.tar"], "shard_lengths": [1]}
    (shards / "_info.json").write_text(json.dumps({"splits": {"train": split, "validation": held}}))
    images = open_data(f"wds/{shards}")
    assert [str(source) for source in images.training.sources] == [
        f"{shards / 'other.tar'}:{name}" for name in ("3.png", "4.jpeg")
    ]
    assert len(images.held_out) == 1


def test_a_fifth_of_unnamed_shards_is_held_out(tmp_path: Path) -> None:
    write_shard(tmp_path / "all.tar", {str(i): ("png", encoded(i), str(i % 2)) for i in range(20)})
    images = open_data(f"wds/{tmp_path}", seed=3)
    assert (len(images.training), len(images.held_out)) == (16, 4)
    assert sorted(colours(images.training) + colours(images.held_out)) == [(i, i % 2) for i in range(20)]


def test_shards_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no folder"):
        open_data(f"wds/{tmp_path / 'nowhere'}")
    with pytest.raises(InputError, match="holds no tar files"):
        open_data(f"wds/{tmp_path}")
    write_shard(tmp_path / "train.tar", {"7": ("png", b"", "1")})
    with pytest.raises(
        InputError, match=r"train\.tar:7' holds \['cls'\]; each image needs its class's number"
    ):
        open_data(f"wds/{tmp_path}")
    (tmp_path / "train.tar").write_bytes(b"no archive")
    with pytest.raises(InputError, match="cannot be read: "):
        open_data(f"wds/{tmp_path}")


def datasets_with_readers() -> Any:
    """The hub's library; skips where timm's readers of it are too old to tell classes and targets."""
    datasets = pytest.importorskip("datasets")
    from timm.data.readers.reader_hfds import ReaderHfds

    if not hasattr(ReaderHfds, "iter_targets"):
        pytest.skip("this version of timm does not tell the targets of the hub's sets")
    return datasets


@pytest.mark.parametrize("kind", ["hfds", "hfids"])
def test_a_local_set_of_the_hub_library(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = datasets_with_readers()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for split, first in (("train", 0), ("validation", 100)):
        for index, name in enumerate(("cat", "dog")):
            folder = tmp_path / "pets" / split / name
            folder.mkdir(parents=True)
            for number in range(2):
                (folder / f"{number}.png").write_bytes(encoded(first + 10 * index + number))
    (tmp_path / "pets" / "train" / "dog" / "1.png").write_bytes(b"junk")
    images = open_data(f"{kind}/{tmp_path / 'pets'}")
    assert images.class_names == ["cat", "dog"]
    assert sorted(colours(images.held_out)) == [(100, 0), (101, 0), (110, 1), (111, 1)]
    assert list(images.training.targets) == [0, 0, 1, 1]
    assert colours(Images(images.training.sources[:3], [0, 0, 1])) == [(0, 0), (1, 0), (10, 1)]
    with pytest.raises(InputError, match="train, image 3' cannot be read"):
        read_image(images.training.sources[3])


def test_the_extra_is_named_where_a_package_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "_info.json").write_text("{}")
    for package, data, extra in (("webdataset", f"wds/{tmp_path}", "wds"), ("datasets", "hfds/x", "hf")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(InputError, match=rf"need the package {package}; .*'refold\[{extra}\]'"):
            open_data(data)


def test_columns_are_found_by_their_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = datasets_with_readers()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    columns = {
        "id": datasets.Value("int64"),
        "img": datasets.Image(),
        "fine": datasets.ClassLabel(names=["x", "y"]),
    }
    rows = {
        "id": range(10),
        "img": [{"bytes": encoded(i), "path": None} for i in range(10)],
        "fine": [0, 1] * 5,
    }
    datasets.Dataset.from_dict(rows, datasets.Features(columns)).to_parquet(
        str(tmp_path / "set" / "train.parquet")
    )
    images = open_data(f"hfds/{tmp_path / 'set'}")
    assert images.class_names == ["x", "y"]
    assert (len(images.training), len(images.held_out)) == (8, 2)
    assert sorted(colours(images.training) + colours(images.held_out)) == [(i, i % 2) for i in range(10)]
    datasets.Dataset.from_dict({"id": range(3)}).to_parquet(str(tmp_path / "numbers.parquet"))
    (tmp_path / "numbers").mkdir()
    (tmp_path / "numbers.parquet").rename(tmp_path / "numbers" / "train.parquet")
    with pytest.raises(InputError, match="has no column of the kind Image, only id"):
        open_data(f"hfds/{tmp_path / 'numbers'}")
