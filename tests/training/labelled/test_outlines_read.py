"""Outlines of objects in COCO's and YOLO's files: read where they are asked for, repaired or refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from refold.errors import InputError
from refold.training.data import open_data
from refold.training.labels import OutlinedLabels

SQUARE = [10, 10, 30, 10, 30, 20, 10, 20]


def coco(root: Path, *annotations: dict[str, Any]) -> None:
    for number in range(2):
        (root / "train").mkdir(exist_ok=True)
        Image.new("RGB", (60, 40), (9, 99, 199)).save(root / "train" / f"{number}.png")
    document = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 60, "height": 40} for i in range(2)],
        "categories": [{"id": 7, "name": "cat"}],
        "annotations": [
            {"id": i, "image_id": i % 2, "category_id": 7, "bbox": [10, 10, 20, 10], **annotation}
            for i, annotation in enumerate(annotations)
        ],
    }
    (root / "instances_train.json").write_text(json.dumps(document))


def masks(root: Path) -> list[torch.Tensor]:
    """The masks of every image, in the order of their paths."""
    images = open_data(str(root), task="instances")
    assert images.task == "instances"
    found = {}
    for part in (images.training, images.held_out):
        for source, target in zip(part.sources, part.targets, strict=True):
            assert isinstance(source, Path)
            assert isinstance(target, OutlinedLabels)
            with Image.open(source) as image:
                found[source.name] = target.masks_on(image)
    return [found[name] for name in sorted(found)]


def test_polygons_and_run_lengths_are_drawn_as_cocos_tools_draw_them(tmp_path: Path) -> None:
    # 40 pixels a column: ten columns without, then three pixels of the eleventh.
    lengths = {"size": [40, 60], "counts": [405, 3, 40 * 60 - 408]}
    two = {"segmentation": [SQUARE, [40, 30, 50, 30, 50, 38, 40, 38]]}
    coco(
        tmp_path,
        two,
        {"segmentation": lengths, "iscrowd": 1},
        {"segmentation": [SQUARE], "bbox": [9, 9, 2, 2]},
    )
    first, second = masks(tmp_path)
    assert first.shape == (2, 40, 60)
    assert first[1].sum() == first[0, :25].sum() == 20 * 10
    assert first[0, 10:20, 10:30].all()
    assert first[0, 30:38, 40:50].all()
    assert second.nonzero().tolist() == [[0, 5, 10], [0, 6, 10], [0, 7, 10]]


def test_compressed_run_lengths_are_read(tmp_path: Path) -> None:
    tools = pytest.importorskip("pycocotools.mask")
    shape = torch.zeros(40, 60, dtype=torch.uint8)
    shape[3:9, 20:50] = 1
    encoded = tools.encode(shape.numpy().copy(order="F"))
    lengths = {"size": encoded["size"], "counts": encoded["counts"].decode()}
    coco(tmp_path, {"segmentation": lengths}, {"segmentation": [SQUARE]})
    assert torch.equal(masks(tmp_path)[0][0], shape)


def test_boxes_alone_know_nothing_of_outlines(tmp_path: Path) -> None:
    coco(tmp_path, {"segmentation": [SQUARE]}, {})
    images = open_data(str(tmp_path))
    assert images.task == "detect"
    assert not isinstance(images.training.targets[0], OutlinedLabels)
    outlined = open_data(str(tmp_path), task="instances")
    assert "1 boxes without an outline, left out (instances_train.json, annotation 1)" in " ".join(
        outlined.notes
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([[1, 2, 3, 4]], "annotation 0: the segmentation is .* three corners"),
        ([[1, 2, 3, 4, 5, float("nan")]], "annotation 0: the segmentation is"),
        ({"size": [40, 60]}, "annotation 0: the run lengths have no size and counts"),
    ],
)
def test_what_is_no_outline_is_named(tmp_path: Path, given: Any, message: str) -> None:
    coco(tmp_path, {"segmentation": given})
    with pytest.raises(InputError, match=message):
        open_data(str(tmp_path), task="instances")


def test_run_lengths_for_another_size_are_refused(tmp_path: Path) -> None:
    coco(tmp_path, {"segmentation": {"size": [20, 60], "counts": [1200]}}, {"segmentation": [SQUARE]})
    with pytest.raises(InputError, match="60 x 40 pixels, and the run lengths of an object are for 60 x 20"):
        masks(tmp_path)


def test_yolos_outlines_are_parts_of_the_image(tmp_path: Path) -> None:
    for number in range(2):
        for folder in ("images", "labels"):
            (tmp_path / folder).mkdir(exist_ok=True)
        Image.new("RGB", (60, 40)).save(tmp_path / "images" / f"{number}.png")
        corners = " ".join(str(v / (60, 40)[i % 2]) for i, v in enumerate(SQUARE))
        (tmp_path / "labels" / f"{number}.txt").write_text(f"0 {corners}\n0 0.5 0.5 0.1 0.1\n")
    for found in masks(tmp_path):
        assert found.shape == (1, 40, 60)
        assert found[0, 10:20, 10:30].all()
        assert found.sum() == 200


def test_sets_without_outlines_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(InputError, match="holds no outlines of objects"):
        open_data(str(tmp_path), task="instances")
    for task in ("instances", "segment"):
        with pytest.raises(InputError, match="digits have boxes and no masks"):
            open_data("digits", task=task)
