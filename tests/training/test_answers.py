"""A teacher's answers on disk are those that it gives, and only what changed is asked again."""

import io
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

import refold
from refold.errors import InputError
from refold.training import run as running
from refold.training.recipe import load_recipe
from refold.training.run import Settings, train
from refold.training.teacher import Teacher

STILL = {"crop_scale": [1, 1], "crop_ratio": [1, 1], "horizontal_flip": 0, "color_jitter": 0}
QUICK = {
    "epochs": 2,
    "optimizer": "momentum",
    "learning_rate": 0.01,
    "batch_size": 8,
    "image_size": 16,
    "label_smoothing": 0.0,
    **STILL,
}
PREPROCESSING = {"input_size": [3, 16, 16], "mean": [0.4] * 3, "std": [0.2] * 3}


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """A folder with ``data`` of 16 and 4 pictures, and ``teacher.safetensors``."""
    generator = np.random.default_rng(0)
    for name in ("train/a", "train/b", "val/a", "val/b"):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        for index in range(8 if "train" in name else 2):
            pixels = generator.integers(0, 255, (18, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
    torch.manual_seed(0)
    save_teacher(tmp_path / "teacher.safetensors", 1.0)
    return tmp_path


@pytest.fixture
def run(given: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[dict[str, Tensor], int]]:
    """Distil; the weights of the student, and how many training images the teacher was asked about."""
    monkeypatch.setattr(running, "finish", lambda *_: None)
    asked = 0
    answer = Teacher.__call__

    def counted(teacher: Teacher, images: Tensor) -> Tensor:
        nonlocal asked
        asked += len(images)
        return answer(teacher, images)

    monkeypatch.setattr(Teacher, "__call__", counted)

    number = count()

    def run(cache: str | None, **others: Any) -> tuple[dict[str, Tensor], int]:
        nonlocal asked
        asked = 0
        settings = told(given, f"run{next(number)}", cache, others)
        train(settings, Console(file=io.StringIO()))
        weights = load_file(settings.output / "training.safetensors")
        return weights, asked - 4  # the held-out ones are asked about once

    return run


def told(folder: Path, output: str, cache: str | None, recipe: dict[str, Any], **others: Any) -> Settings:
    return Settings(
        folder / output,
        str(folder / "data"),
        "resnet10t",
        load_recipe("small_images", {**QUICK, **recipe}),
        teacher=str(folder / "teacher.safetensors"),
        teacher_cache=None if cache is None else str(folder / cache),
        **others,
    )


def save_teacher(path: Path, scale: float) -> None:
    teacher = refold.create_model("resnet10t", num_classes=2)
    nn.init.normal_(teacher.get_classifier().weight, std=scale)  # type: ignore[operator]  # a linear layer
    refold.save(teacher, path, class_names=["a", "b"], preprocessing=PREPROCESSING)


def test_training_is_the_same_and_the_teacher_is_asked_once(
    run: Callable[..., tuple[dict[str, Tensor], int]], tmp_path: Path
) -> None:
    live, asked = run(None)
    assert asked == 32  # two epochs of sixteen
    first, asked = run("cache")
    assert asked == 16
    again, asked = run("cache")
    assert asked == 0
    for name, weights in live.items():
        assert torch.allclose(weights, first[name], atol=1e-5)
        assert torch.equal(first[name], again[name])
    (file,) = (tmp_path / "cache").iterdir()
    assert {name: tuple(value.shape) for name, value in load_file(file).items()} == {
        "images": (16, 16),
        "answers": (16, 2),
    }
    # A changed image is asked about again, and it alone.
    changed = tmp_path / "data" / "train" / "a" / "3.png"
    Image.fromarray(255 - np.asarray(Image.open(changed))).save(changed)
    assert run("cache")[1] == 1
    # Another size of the images, and another teacher, have a file of their own.
    assert run("cache", image_size=15)[1] == 16
    save_teacher(tmp_path / "teacher.safetensors", 2.0)
    assert run("cache")[1] == 16
    assert len(list((tmp_path / "cache").iterdir())) == 3
    # What was cut off is asked again.
    for damaged in (tmp_path / "cache").iterdir():
        damaged.write_bytes(damaged.read_bytes()[:100])
    assert run("cache")[1] == 16


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"horizontal_flip": 0.5}, "horizontal_flip of"),
        ({"crop_scale": [0.9, 1]}, "crop_scale, crop_ratio of"),
        ({"crop_padding": 2}, "crop_padding of"),
        ({"random_erasing": 0.1, "mixup": 0.2}, "random_erasing, mixup of"),
        ({"auto_augment": "rand-m9", "color_jitter": 0.1}, "color_jitter, auto_augment of"),
        ({"relation_weight": 1.0}, "kept, not its features"),
    ],
)
def test_answers_are_not_kept_where_images_change(
    run: Callable[..., Any], tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(InputError, match=named):
        run("cache", **change)
    assert not (tmp_path / "cache").exists()
    assert not list(tmp_path.glob("run*"))


def test_features_are_learnt_along(run: Callable[..., Any], tmp_path: Path) -> None:
    """The loss counts them, their projection stays out of the student, and the history tells the divergence."""
    plain = run(None)[0]
    guided = run(None, feature_weight=0.5, relation_weight=0.5)[0]
    assert guided.keys() == plain.keys()
    assert any(not torch.equal(plain[name], guided[name]) for name in plain)
    header, *lines = (tmp_path / "run1" / "history.csv").read_text().splitlines()
    rows = [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines]
    assert len(rows) == 2
    assert all(float(row["held_out_divergence_trained"]) > 0 for row in rows)


@pytest.mark.slow
def test_processes_share_the_questions(given: Path) -> None:
    """Two processes keep the top-1 agreement as one, and train to the same weights."""
    kept, weights = [], []
    for devices in (1, 2):
        settings = told(
            given,
            f"run{devices}",
            f"cache{devices}",
            {"epochs": 1},
            devices=devices,
            accelerator="cpu",
            sync_batch_norm=True,
        )
        train(settings, Console(file=io.StringIO()))
        (file,) = (given / f"cache{devices}").iterdir()
        answers = load_file(file)
        kept.append(
            {bytes(k.tolist()): v for k, v in zip(answers["images"], answers["answers"], strict=True)}
        )
        weights.append(load_file(settings.output / "training.safetensors"))
    assert kept[0].keys() == kept[1].keys()
    assert all(torch.allclose(kept[0][digest], kept[1][digest], atol=1e-5) for digest in kept[0])
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-5) for name in weights[0])
