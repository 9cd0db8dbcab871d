import numpy as np
import pytest
import torch
from PIL import Image

import refold
from refold.errors import InputError
from refold.training.calibration import split_photos, spread


@pytest.fixture
def network():
    return refold.create_model("repghostnet_050", num_classes=2).eval()


def write(folder, name, value):
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.full((50, 70, 3), value, np.uint8)
    pixels[::2] //= 2
    Image.fromarray(pixels).save(folder / f"{name}.png")


def classes(folder, count=6):
    for index, name in enumerate(("cat", "dog")):
        for number in range(count):
            write(folder / name, f"{number:02}", 40 * (index + 1) + number)
    return folder


def test_photos_are_prepared_as_predictions_prepare_them(tmp_path, network):
    write(tmp_path, "one", 200)
    images = refold.read_images(tmp_path, network)
    assert images.shape == (1, 3, 224, 224)
    mean, std = (torch.tensor(network.pretrained_cfg[key]) for key in ("mean", "std"))
    # 200 and 100 in turns; the middle of them after the resizing.
    torch.testing.assert_close(images.mean((0, 2, 3)), (150 / 255 - mean) / std, atol=0.05, rtol=0)


def test_photos_are_divided_and_labelled_by_their_folders(tmp_path, network):
    said = []
    photos = split_photos(
        classes(tmp_path / "photos"), network, (3, 32, 32), 4, labelled=True, say=said.append
    )
    assert len(photos.images) == 4
    assert photos.held_out.shape == (8, 3, 32, 32)
    assert photos.labels == [0, 0, 0, 0, 1, 1, 1, 1]
    # No photo is in both.
    rows = torch.cat([photos.images, photos.held_out]).flatten(1)
    assert len(rows.unique(dim=0)) == 12


def test_photos_that_cannot_be_read_are_said(tmp_path, network):
    folder = classes(tmp_path / "photos")
    (folder / "cat" / "00.png").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("x")
    said = []
    photos = split_photos(folder, network, (3, 32, 32), 200, labelled=False, say=said.append)
    assert len(photos.images) + len(photos.held_out) == 11
    assert any("1 of 6 photos cannot be read" in line for line in said)
    assert any("notes.txt" in line for line in said)


@pytest.mark.parametrize("make", [lambda folder: None, lambda folder: (folder / "a.png").write_bytes(b"x")])
def test_no_photos_is_an_error(tmp_path, network, make):
    make(tmp_path)
    with pytest.raises(InputError, match=r"holds no images|None of 1 photos can be read"):
        refold.read_images(tmp_path, network)


def test_folders_that_are_no_classes_of_the_network(tmp_path, network):
    folder = classes(tmp_path / "photos")
    write(folder / "horse", "0", 9)
    write(folder / "horse", "1", 19)
    with pytest.raises(InputError, match="3 folders for 2 classes"):
        split_photos(folder, network, (3, 32, 32), 6, labelled=True, say=print)


def test_photos_of_one_class_are_said(tmp_path, network):
    for number in range(4):
        write(tmp_path / "cat", str(number), 50 + number)
    said = []
    split_photos(tmp_path, network, (3, 32, 32), 2, labelled=False, say=said.append)
    assert not [line for line in said if "of one class" in line]
    with pytest.raises(InputError, match="1 folders for 2 classes"):
        split_photos(tmp_path, network, (3, 32, 32), 2, labelled=True, say=said.append)
    assert [line for line in said if "of one class, 'cat'" in line]


def test_a_spread_takes_from_everywhere():
    assert spread(list(range(10)), 4) == [0, 2, 5, 7]
    assert spread([1, 2], None) == spread([1, 2], 9) == [1, 2]
