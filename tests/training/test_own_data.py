"""Data sets of the user's own: items as torchvision's have them, in the two parts that they come in or held out."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from refold.cli import app
from refold.errors import InputError
from refold.training.data import open_data
from refold.training.labels import OutlinedLabels
from refold.training.pictures import read_image

CODE = """
import torch
from PIL import Image

class Squares(torch.utils.data.Dataset):
    classes = ["small", "large"]

    def __init__(self, count=10):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        side = 10 + 10 * (index % 2)
        image = torch.full((3, 48, 64), 9 + index, dtype=torch.uint8)
        image[:, 5 : 5 + side, 8 : 8 + side] = 255
        mask = image[:1] == 255
        boxes = torch.tensor([[8.0, 5, 8 + side, 5 + side]])
        return image, {"boxes": boxes, "labels": torch.tensor([index % 2]), "masks": mask}

class Classes(Squares):
    def __getitem__(self, index):
        image = Image.new("L", (20, 20), index)
        return image, torch.tensor(index % 2)

class Wrong(Squares):
    def __getitem__(self, index):
        return super().__getitem__(index)[0], TARGET

class Random(Squares):
    def __getitem__(self, index):
        image, target = super().__getitem__(index)
        return torch.randint(255, image.shape, dtype=torch.uint8), target

def both():
    return Squares(6), Squares(4)

def nothing():
    return 3
"""


@pytest.fixture
def code(tmp_path: Path) -> str:
    (tmp_path / "data.py").write_text(CODE)
    return str(tmp_path / "data.py")


def test_boxes_of_a_data_set_are_learnt_as_files_are(code: str) -> None:
    images = open_data(f"{code}:Squares")
    assert images.task == "detect"
    assert images.class_names == ["small", "large"]
    assert (len(images.training), len(images.held_out)) == (8, 2)
    assert images.is_drawn
    for source, target in zip(images.training.sources, images.training.targets, strict=True):
        picture = read_image(source)
        boxes, labels, _ = target.on(picture)
        (x1, y1, x2, y2), label = boxes[0].long().tolist(), int(labels[0])
        assert (x2 - x1, y2 - y1) == ((10, 10), (20, 20))[label]
        assert picture.crop((x1, y1, x2, y2)).getextrema() == ((255, 255),) * 3
        assert picture.getpixel((0, 0)) != (255, 255, 255)


def test_a_pair_is_trained_and_measured_on(code: str) -> None:
    images = open_data(f"{code}:both", task="instances")
    assert images.task == "instances"
    assert (len(images.training), len(images.held_out)) == (6, 4)
    target = images.training.targets[1]
    assert isinstance(target, OutlinedLabels)
    masks = target.masks_on(read_image(images.training.sources[1]))
    assert masks.sum() == masks[0, 5:25, 8:28].sum() == 400


def test_classes_of_a_data_set(code: str) -> None:
    images = open_data(f"{code}:Classes")
    assert images.task == "classify"
    assert sorted(images.training.targets) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert read_image(images.held_out.sources[0]).mode == "RGB"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ('"a"', "item 0: its target is 'a'; each item must be an image"),
        ("{'boxes': [[1, 2, 3, 4]]}", "item 0: it has no 'labels'"),
        ("{'boxes': [[1, 2, 3, 4]], 'labels': [1, 1]}", "1 boxes and 2 labels"),
        ("{'boxes': [[1, 2, 3, 4]], 'labels': [2]}", "has a label 2, and its classes are 2"),
        ("{'boxes': [[1, 2, 1, 4]], 'labels': [1]}", "10 of the 10 boxes .* have no area"),
    ],
)
def test_what_is_no_item_is_named(tmp_path: Path, target: str, message: str) -> None:
    (tmp_path / "wrong.py").write_text(CODE.replace("TARGET", target))
    with pytest.raises(InputError, match=message):
        open_data(f"{tmp_path / 'wrong.py'}:Wrong")


def test_code_that_gives_no_data_set_is_refused(code: str) -> None:
    for name, message in {
        "nothing": "gives int; give a Dataset",
        "nobody": "has no 'nobody'",
        "Random": "another image each time",
    }.items():
        with pytest.raises(InputError, match=message):
            open_data(f"{code}:{name}")


@pytest.mark.slow
def test_a_detector_is_trained_on_a_data_set_of_ones_own(code: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    told = [
        "train",
        "--data",
        f"{code}:Squares",
        "--network",
        "dense/mobilenetv3_small_050",
        "-o",
        str(folder),
    ]
    for value in ("image_size=64", "epochs=1", "batch_size=4"):
        told += ["--set", value]
    result = CliRunner().invoke(app, told)
    assert result.exit_code == 0, result.output
    card = json.loads((folder / "card.json").read_text())
    assert card["class_names"] == ["small", "large"]
    assert card["task"] == "detect"
    resumed = CliRunner().invoke(app, ["train", "--resume", str(folder), "--set", "epochs=2"])
    assert resumed.exit_code == 0, resumed.output
