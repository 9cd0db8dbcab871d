"""Sets with masks: recognised by what lies in a folder, repaired or refused by name."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from refold.errors import InputError
from refold.training.data import open_data


def masks(root: Path, layout: str, values: tuple[int, ...] = (0, 3)) -> None:
    """Two parts of three images, by ``images/train`` or by ``train/images``."""
    for part in ("train", "val"):
        for number in range(3):
            for kind in ("images", "masks"):
                folder = root / kind / part if layout == "kinds" else root / part / kind
                folder.mkdir(parents=True, exist_ok=True)
                pixels = np.zeros((20, 30), np.uint8)
                for place, value in enumerate(values):
                    pixels[:, place * 10 :] = value
                picture = Image.fromarray(pixels)
                (picture if kind == "masks" else picture.convert("RGB")).save(folder / f"{number}.png")


@pytest.mark.parametrize("layout", ["kinds", "parts"])
def test_parts_are_found_either_way(tmp_path: Path, layout: str) -> None:
    masks(tmp_path, layout)
    images = open_data(str(tmp_path))
    assert images.task == "segment"
    assert (len(images.training), len(images.held_out)) == (3, 3)
    assert images.class_names == ["0", "3"]
    assert "name them in a classes.txt" in " ".join(images.notes)
    image = Image.open(images.training.sources[0])  # type: ignore[arg-type]  # a path
    assert images.training.targets[0].on(image).unique().tolist() == [0, 1]


def test_names_values_and_what_belongs_to_nothing(tmp_path: Path) -> None:
    masks(tmp_path, "kinds", (0, 1, 9))
    (tmp_path / "classes.txt").write_text("void\nroad\n")
    (tmp_path / "masks" / "train" / "2.png").unlink()
    images = open_data(str(tmp_path))
    assert images.class_names == ["road"]
    said = " ".join(images.notes)
    assert "the class void" in said
    assert "values of no class (9)" in said
    assert "1 images of 'train' without a mask (2.png)" in said
    assert len(images.training) == 2
    image = Image.open(images.training.sources[0])  # type: ignore[arg-type]  # a path
    assert images.training.targets[0].on(image).unique().tolist() == [0, 255]


def test_a_mask_of_another_size_is_an_error(tmp_path: Path) -> None:
    masks(tmp_path, "kinds")
    Image.new("L", (31, 20)).save(tmp_path / "masks" / "train" / "1.png")
    with pytest.raises(InputError, match=r"1\.png' has 31 x 20 pixels and its image .* 30 x 20"):
        open_data(str(tmp_path))


def test_a_mask_with_colours_is_an_error(tmp_path: Path) -> None:
    masks(tmp_path, "kinds")
    Image.new("RGB", (30, 20)).save(tmp_path / "masks" / "train" / "1.png")
    with pytest.raises(InputError, match="has colours"):
        open_data(str(tmp_path))


def test_a_folder_without_labels_is_none_for_the_task(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no masks"):
        open_data(str(tmp_path), task="segment")
    with pytest.raises(InputError, match="holds no boxes"):
        open_data(str(tmp_path), task="detect")
