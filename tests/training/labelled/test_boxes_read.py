"""Sets with boxes: what lies in a folder is recognised, repaired or refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from refold.cli import app
from refold.errors import InputError
from refold.training.data import open_data
from refold.training.images import LabelledImages
from refold.training.split import same_split, write_split
from refold.training.survey import draw_sample, survey

COCO128 = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "coco128.tar"


def picture(path: Path, size: tuple[int, int] = (100, 50)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (9, 99, 199)).save(path)


def box(identity: int, corners: list[float], **changes: Any) -> dict[str, Any]:
    return {"id": identity, "image_id": 10, "category_id": 7, "bbox": corners, **changes}


def coco(root: Path, part: str = "train", **changes: Any) -> dict[str, Any]:
    """Three images and three boxes; category ids have gaps and do not begin at 0."""
    for number in range(3):
        picture(root / part / f"{number}.jpg")
    document: dict[str, Any] = {
        "images": [{"id": 10 + i, "file_name": f"{i}.jpg", "width": 100, "height": 50} for i in range(3)],
        "categories": [{"id": 90, "name": "zebra"}, {"id": 7, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 10, "category_id": 90, "bbox": [10, 10, 20, 30]},
            {"id": 2, "image_id": 10, "category_id": 7, "bbox": [0, 0, 5, 5], "iscrowd": 1},
            {"id": 3, "image_id": 11, "category_id": 7, "bbox": [50, 20, 30, 20]},
        ],
        **changes,
    }
    (root / f"instances_{part}.json").write_text(json.dumps(document))
    return document


def yolo(root: Path, lines: str = "1 0.5 0.5 0.2 0.4\n", names: str = "{0: cat, 1: zebra}") -> Path:
    for part in ("train", "val"):
        for number in range(2):
            picture(root / "images" / part / f"{part}{number}.jpg")
            label = root / "labels" / part / f"{part}{number}.txt"
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text(lines)
    file = root / "data.yaml"
    file.write_text(f"train: images/train\nval: images/val\nnames: {names}\n")
    return file


def voc(root: Path, box: str = "<xmin>11</xmin><ymin>6</ymin><xmax>30</xmax><ymax>25</ymax>") -> None:
    (root / "Annotations").mkdir(parents=True)
    (root / "ImageSets" / "Main").mkdir(parents=True)
    for name, difficult in (("a", 0), ("b", 1), ("c", 0)):
        picture(root / "JPEGImages" / f"{name}.jpg")
        (root / "Annotations" / f"{name}.xml").write_text(
            f"<annotation><size><width>100</width><height>50</height></size><object><name>dog</name>"
            f"<difficult>{difficult}</difficult><bndbox>{box}</bndbox></object></annotation>"
        )
    (root / "ImageSets" / "Main" / "train.txt").write_text("a\nb\n")
    (root / "ImageSets" / "Main" / "val.txt").write_text("c\n")


def said(images: LabelledImages) -> str:
    return " ".join(images.notes)


def test_cocos_categories_are_mapped_by_name(tmp_path: Path) -> None:
    coco(tmp_path)
    swapped = [{"id": 1, "name": "zebra"}, {"id": 2, "name": "cat"}]
    boxes = [{"id": 9, "image_id": 10, "category_id": 1, "bbox": [1, 2, 3, 4]}]
    coco(tmp_path, "val", categories=swapped, annotations=boxes)
    images = open_data(str(tmp_path))
    assert images.task == "detect"
    assert images.class_names == ["cat", "zebra"]
    first = images.training.targets[0]
    assert first.boxes == ((10, 10, 30, 40), (0, 0, 5, 5))
    assert first.labels == (1, 0)
    assert first.crowds == (False, True)
    assert images.held_out.targets[0].labels == (1,)
    assert images.held_out.targets[0].boxes == ((1, 2, 4, 6),)
    assert "1 training and 2 held-out images have no box" in said(images)
    assert "1 boxes are crowds" in said(images)


def test_one_file_of_coco_holds_a_fifth_out(tmp_path: Path) -> None:
    coco(tmp_path)
    images = open_data(str(tmp_path / "instances_train.json"), seed=1)
    assert (len(images.training), len(images.held_out)) == (2, 1)
    assert images.is_drawn


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"categories": [{"id": 7, "name": "cat"}, {"id": 90, "name": "cat"}]}, "two categories named 'cat'"),
        ({"annotations": [box(5, [1, 1, 2, 2], category_id=8)]}, "annotation 5: there is no category 8"),
        ({"annotations": [box(5, [1, 1, 2])]}, "not x, y, width and height"),
        ({"annotations": [box(5, [1, 1, float("nan"), 2])]}, "no number"),
        ({"annotations": [{"id": 5, "category_id": 7, "bbox": [1, 1, 2, 2]}]}, "lacks 'image_id'"),
        ({"images": [{"id": 1}]}, "lacks 'file_name'"),
        ({"images": [{"id": 10, "file_name": "../../etc/passwd"}]}, "lies outside"),
        ({"images": [{"id": 10, "file_name": "nowhere.jpg"}]}, "None of the 1 images"),
        ({"annotations": []}, "has a label"),
        (
            {"annotations": [box(i, [i, 1, 0, 2]) for i in range(4)]},
            r"4 of the 4 boxes .* annotation 0, .* annotation 1, .* annotation 2 and 1 more",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_file_of_coco_is_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    coco(tmp_path, **changes)
    with pytest.raises(InputError, match=message):
        open_data(str(tmp_path))


def test_a_cut_file_of_coco_is_named(tmp_path: Path) -> None:
    coco(tmp_path)
    file = tmp_path / "instances_train.json"
    file.write_text(file.read_text()[:-30])
    with pytest.raises(InputError, match="no whole file of COCO's annotations"):
        open_data(str(tmp_path))


def test_boxes_are_clipped_and_empty_double_and_missing_ones_counted(tmp_path: Path) -> None:
    many = [{"id": i, "image_id": 11, "category_id": 7, "bbox": [i, 1, 5, 5]} for i in range(20, 40)]
    coco(
        tmp_path,
        annotations=[
            {"id": 1, "image_id": 10, "category_id": 90, "bbox": [-10, 10, 20, 90]},
            {"id": 2, "image_id": 10, "category_id": 7, "bbox": [5, 5, 0, 5]},
            {"id": 3, "image_id": 10, "category_id": 7, "bbox": [50, 20, 30, 20]},
            {"id": 4, "image_id": 10, "category_id": 7, "bbox": [50, 20, 30, 20]},
            {"id": 5, "image_id": 99, "category_id": 7, "bbox": [50, 20, 30, 20]},
            {"id": 6, "image_id": 10, "category_id": 7},
            *many,
        ],
    )
    (tmp_path / "train" / "2.jpg").unlink()
    images = open_data(str(tmp_path))
    both = [*images.training.targets, *images.held_out.targets]
    assert {box for target in both for box in target.boxes} >= {(0, 10, 10, 50), (50, 20, 80, 40)}
    for expected in (
        "1 boxes reach beyond their image, clipped",
        "1 boxes without area, left out (instances_train.json, annotation 2)",
        "1 boxes are there twice", "1 annotations of images that are not named", "1 annotations without a box",
        "1 images are named and not there, left out (2.jpg)",
    ):  # fmt: skip
        assert expected in said(images)


def test_yolos_shares_become_pixels(tmp_path: Path) -> None:
    file = yolo(tmp_path, "1 0.5 0.5 0.2 0.4\n\n0 0.1 0.1 0.4 0.2 0.3 0.1 0.5 0.6\n")
    for given in (file, tmp_path):
        images = open_data(str(given))
        assert images.class_names == ["cat", "zebra"]
        image = Image.open(images.training.sources[0])  # type: ignore[arg-type]  # a path
        boxes, labels, _ = images.training.targets[0].on(image)
        assert labels.tolist() == [1, 0]
        assert boxes[0].tolist() == pytest.approx([40, 15, 60, 35])
        assert boxes[1].tolist() == pytest.approx([10, 5, 50, 30])
        assert "outlines, whose boxes are taken" in said(images)


def test_yolo_without_names_or_files_of_labels(tmp_path: Path) -> None:
    yolo(tmp_path)
    (tmp_path / "data.yaml").unlink()
    (tmp_path / "labels" / "train" / "train0.txt").unlink()
    (tmp_path / "labels" / "train" / "stray.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    images = open_data(str(tmp_path))
    assert images.class_names == ["0", "1"]
    assert "1 images have no file of labels and are taken for background (train0.jpg)" in said(images)
    assert "1 files of labels have no image, left out (stray.txt)" in said(images)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("0 0.5 0.5 0.2\n", "train0.txt, line 1: it has 4 columns"),
        ("0 0.5 0.5 0.2 0.2 0.9\n", "line 1: it has 6 columns"),
        ("0 0.5 0.5 0.2 0.2\n1 40 20 30 20\n", "line 2: 40 is no part of an image"),
        ("0 0.5 0.5 nan 0.2\n", "line 1: the box .* no number"),
        ("0 0.5 0.5 wide 0.2\n", "line 1: could not convert"),
        ("5 0.5 0.5 0.2 0.2\n", "line 1: there is no class 5; the names are of 0 to 1"),
    ],
)
def test_what_is_wrong_in_a_line_of_yolos_is_named(tmp_path: Path, lines: str, message: str) -> None:
    yolo(tmp_path, lines)
    with pytest.raises(InputError, match=message):
        open_data(str(tmp_path))


def test_yolos_description_is_checked(tmp_path: Path) -> None:
    yolo(tmp_path, names="{1: cat, 3: dog}")
    with pytest.raises(InputError, match="number them without gaps"):
        open_data(str(tmp_path))
    (tmp_path / "data.yaml").write_text("train: images/nowhere\nval: images/val\nnames: [cat, dog]\n")
    with pytest.raises(InputError, match="names 'images/nowhere' to train on"):
        open_data(str(tmp_path))


def test_vocs_pixels_begin_at_one_and_difficult_ones_do_not_count(tmp_path: Path) -> None:
    voc(tmp_path)
    images = open_data(str(tmp_path))
    assert images.class_names == ["dog"]
    assert images.training.targets[0].boxes == ((10, 5, 30, 25),)
    assert [target.crowds for target in images.training.targets] == [(False,), (True,)]
    assert (len(images.training), len(images.held_out)) == (2, 1)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "Annotations" / "a.xml").write_text("<annotation>"), "a.xml' are no XML"),
        (lambda root: [(root / "Annotations" / f"{n}.xml").unlink() for n in "ab"], "nothing to train on"),
    ],
)
def test_what_is_wrong_in_vocs_layout_is_named(
    tmp_path: Path, spoil: Callable[[Path], Any], message: str
) -> None:
    voc(tmp_path)
    spoil(tmp_path)
    with pytest.raises(InputError, match=message):
        open_data(str(tmp_path))


def test_a_voc_box_without_corners_is_named(tmp_path: Path) -> None:
    voc(tmp_path, "<xmin>11</xmin>")
    with pytest.raises(InputError, match=r"a\.xml, object 1: its box has no xmin"):
        open_data(str(tmp_path))


def test_changed_boxes_are_seen_when_a_run_goes_on(tmp_path: Path) -> None:
    yolo(tmp_path / "data")
    images = open_data(str(tmp_path / "data"))
    write_split(images, tmp_path / "split.csv")
    same, changes = same_split(images, tmp_path / "split.csv", changes_allowed=False)
    assert not changes
    assert same.training.targets == images.training.targets
    (tmp_path / "data" / "labels" / "train" / "train0.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    with pytest.raises(InputError, match=r"1 image with other labels \(images/train/train0.jpg\)"):
        same_split(open_data(str(tmp_path / "data")), tmp_path / "split.csv", changes_allowed=False)


def test_the_survey_counts_boxes_and_draws_them(tmp_path: Path) -> None:
    coco(tmp_path / "data")
    coco(tmp_path / "data", "val")
    images = open_data(str(tmp_path / "data"))
    found = survey(images, Console(quiet=True))
    assert found.unit == "boxes"
    assert found.marks == {"cat": 4, "zebra": 2}
    assert (found.training, found.training_images) == ({"cat": 2, "zebra": 1}, 3)
    draw_sample(images, tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").size[0] == 4 * 360
    shown = CliRunner().invoke(app, ["check-data", str(tmp_path / "data")])
    assert shown.exit_code == 0
    assert "boxes" in shown.stdout
    wrong = CliRunner().invoke(app, ["check-data", str(tmp_path / "data"), "--task", "segment"])
    assert "holds no masks" in str(wrong.exception)


def test_both_kinds_of_labels_ask_which(tmp_path: Path) -> None:
    voc(tmp_path)
    (tmp_path / "SegmentationClass").mkdir()
    for name in "abc":
        Image.new("L", (100, 50), 1).save(tmp_path / "SegmentationClass" / f"{name}.png")
    with pytest.raises(InputError, match="--task detect or --task segment"):
        open_data(str(tmp_path))
    assert open_data(str(tmp_path), task="detect").task == "detect"
    masks = open_data(str(tmp_path), task="segment")
    assert masks.class_names[1] == "aeroplane"


@pytest.mark.skipif(not COCO128.exists(), reason="COCO's first images are not here")
def test_the_first_images_of_coco(tmp_path: Path) -> None:
    import tarfile

    with tarfile.open(COCO128) as archive:
        archive.extractall(tmp_path, filter="data")
    images = open_data(str(tmp_path / "object_detection"))
    assert (len(images.training), len(images.held_out), len(images.class_names)) == (128, 128, 80)
    assert "2 images have no file of labels" in said(images)
    assert "2 files of labels have no image" in said(images)
    masks = open_data(str(tmp_path / "semantic_segmentation"))
    assert (masks.task, len(masks.training), len(masks.class_names)) == ("segment", 100, 129)
    assert "the class unlabeled" in said(masks)
