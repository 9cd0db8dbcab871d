"""Which folder is what: splits under any of their names, and what of a folder is no class or no image of one."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from refold.errors import InputError
from refold.training.folders import class_folders

Make = Callable[..., Path]


@pytest.mark.parametrize(
    ("training", "held_out"),
    [
        ("Train", "Test"), ("TRAIN", "VAL"), ("training", "validation"), ("Training", "Testing"),
        ("train_set", "test_set"), ("train-set", "eval"), ("trainset", "dev"), ("train_images", "val_images"),
        ("training_data", "evaluation"), ("train2017", "val2017"), ("train", "holdout"), ("train", "held_out"),
        ("Train Split", "dev-split"),
    ],
)  # fmt: skip
def test_a_split_is_known_by_any_of_its_names(make: Make, training: str, held_out: str) -> None:
    root = make({f"{training}/a": 3, f"{training}/b": 2, f"{held_out}/a": 1, f"{held_out}/b": 2})
    images = class_folders(root)
    assert images.class_names == ["a", "b"]
    assert (len(images.training), len(images.held_out)) == (5, 3)
    assert f"Trained on '{training}' of '{root}', measured on '{held_out}'." in images.notes


def test_the_validation_images_are_measured_on_where_there_are_test_images_too(make: Make) -> None:
    images = class_folders(make({f"{part}/{name}": 2 for part in ("test", "Train", "Val") for name in "ab"}))
    assert {Path(str(source)).parent.parent.name for source in images.held_out.sources} == {"Val"}
    assert "Left out: 1 folders beside them (test)." in images.notes


def test_test_images_without_classes_are_left_out(make: Make) -> None:
    images = class_folders(make({"train/a": 10, "train/b": 10, "test": 7}))
    assert (images.class_names, len(images.training), len(images.held_out)) == (["a", "b"], 16, 4)
    assert any("measured on a fifth of each class of it" in note for note in images.notes)
    assert "Left out: 1 folders beside them (test)." in images.notes


def test_training_images_without_classes_are_refused(make: Make) -> None:
    with pytest.raises(
        InputError, match=r"train' is what to train on by its name, but holds no class folders"
    ):
        class_folders(make({"train": 4, "val": 4}))


def test_a_class_may_be_called_train(make: Make) -> None:
    images = class_folders(make({"train": 10, "bus": 10, "car": 10}))
    assert images.class_names == ["bus", "car", "train"]
    assert images.notes == ()


@pytest.mark.parametrize("inside", [("cat", "dog"), ("cat",), ("train", "val")])
def test_folders_that_all_hold_the_same_folders_are_refused(make: Make, inside: tuple[str, ...]) -> None:
    root = make({f"{outer}/{inner}": 2 for outer in ("fold1", "fold2", "fold3") for inner in inside})
    with pytest.raises(
        InputError, match=r"Each folder of .* \(fold1, fold2, fold3\) holds the same folders \("
    ):
        class_folders(root)


def test_a_folder_of_images_in_each_class_is_none_of_the_data(make: Make) -> None:
    images = class_folders(make({f"{name}/images": 5 for name in ("n01", "n02")}))
    assert (images.class_names, len(images.training) + len(images.held_out)) == (["n01", "n02"], 10)


def test_what_lies_around_is_no_class(make: Make) -> None:
    root = make(
        {"a": 5, "b": 5, ".ipynb_checkpoints": 2, "__MACOSX/a": 2, "a/.thumbs": 1, "b/deep/__MACOSX": 1}
    )
    Image.new("L", (4, 4)).save(root / "loose.png")
    (root / "b" / "clip.gif").write_bytes(b"")
    images = class_folders(root)
    assert images.class_names == ["a", "b"]
    assert len(images.training) + len(images.held_out) == 10
    said = " ".join(images.notes)
    assert "4 hidden or system folders (.ipynb_checkpoints, __MACOSX, a/.thumbs and 1 more)" in said
    assert "1 images beside the class folders, of no class (loose.png)" in said
    assert "1 pictures of another format" in said


def test_a_double_in_a_class_is_used_once_and_one_in_two_classes_is_named(make: Make) -> None:
    root = make({"a": 6, "b": 6})
    shutil.copy(root / "a" / "1.png", root / "a" / "copy of 1.png")
    shutil.copy(root / "a" / "2.png", root / "b" / "stray.png")
    images = class_folders(root)
    sources = [str(source) for source in (*images.training.sources, *images.held_out.sources)]
    assert len(sources) == 13
    assert str(root / "a" / "copy of 1.png") not in sources
    assert "Left out: 1 doubles of another file of their class (a/copy of 1.png)." in images.notes
    assert "1 images are in more than one class: a/2.png = b/stray.png." in images.notes


def test_files_of_one_size_that_differ_only_within_are_no_doubles(make: Make) -> None:
    root = make({"a": 3, "b": 3})
    for index, name in enumerate("xy"):
        content = bytearray(50_000)
        content[25_000] = index
        (root / "a" / f"{name}.png").write_bytes(content)
    assert class_folders(root).notes == ()


def test_an_image_that_is_trained_on_and_measured_on_is_named(make: Make) -> None:
    root = make({f"{part}/{name}": 3 for part in ("train", "val") for name in "ab"})
    shutil.copy(root / "train" / "a" / "1.png", root / "val" / "a" / "again.png")
    notes = class_folders(root).notes
    assert any(
        note.startswith("1 of the 7 held-out images are among the training images, too (val/a/again.png)")
        for note in notes
    )


def test_a_folder_around_the_data_is_named(make: Make) -> None:
    root = make({"photos/a": 2, "photos/b": 2})
    with pytest.raises(InputError, match=r"holds only the class 'photos'; give a .*, such as '.*photos'"):
        class_folders(root)


def test_a_class_of_doubles_is_refused_with_the_reason(make: Make) -> None:
    root = make({"a": 3, "b": 1})
    shutil.copy(root / "b" / "0.png", root / "b" / "1.png")
    with pytest.raises(InputError, match=r"class 'b' of .* has one image; .* 1 doubles .* \(b/1\.png\)"):
        class_folders(root)


def test_a_split_without_held_out_images_is_a_split_whatever_lies_beside_it(make: Make) -> None:
    root = make({"train/a": 10, "train/b": 10, "unlabeled/x": 4})
    images = class_folders(root)
    assert (images.class_names, len(images.training), len(images.held_out)) == (["a", "b"], 16, 4)
    assert f"Trained on 'train' of '{root}', measured on a fifth of each class of it." in images.notes
    assert any("(unlabeled)" in note for note in images.notes)


@pytest.mark.parametrize("held_out", ["val", "Test"])
def test_held_out_images_alone_are_no_class(make: Make, held_out: str) -> None:
    root = make({f"{held_out}/a": 5, f"{held_out}/b": 5, "extra/a": 5})
    with pytest.raises(
        InputError, match=rf"holds '{held_out}' to measure on by name, but nothing to train on"
    ):
        class_folders(root)


def test_a_split_in_a_class_is_refused(make: Make) -> None:
    root = make({"a/train": 5, "a/test": 2, "b/train": 5})
    with pytest.raises(
        InputError,
        match=r"class folder '.*a' holds a split of its own \(test, train\); give a folder with 'train'",
    ):
        class_folders(root)


def test_vehicles_may_be_trains(make: Make) -> None:
    assert class_folders(make({"rail/train": 5, "rail/tram": 5, "road": 5})).class_names == ["rail", "road"]


def test_classes_that_differ_in_case_alone_are_named(make: Make) -> None:
    images = class_folders(make({"Cat": 5, "cat": 5, "dog": 5}))
    assert "Classes whose names differ in case or spelling alone: Cat = cat." in images.notes


def test_a_class_whose_name_is_no_text_is_refused_before_training(make: Make) -> None:
    root = make({"a": 5, "b\udcff": 5})
    with pytest.raises(InputError, match=r"has a name that is not UTF-8; rename it"):
        class_folders(root)
