"""Detectors and segmenters learn from teachers, and wrong teachers are named."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import refold
from refold.errors import InputError
from refold.training.distillation import FeatureLosses
from refold.training.tasks import DetectionTask, SegmentationTask
from refold.training.teacher import open_teacher

STUDENT = {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.5] * 3}


def network(name: str, classes: int = 2) -> Any:
    return refold.create_model(name, num_classes=classes)


def test_a_detector_answers_at_the_students_size() -> None:
    student, teacher = network("dense/mobilenetv3_small_050"), network("dense/repghostnet_050")
    opened = open_teacher(teacher, "t", DetectionTask(["a", "b"]), STUDENT, student)
    maps = opened(torch.randn(2, 3, 64, 64))
    assert [tuple(map_.shape) for map_ in maps] == [(2, 6, 8, 8), (2, 6, 4, 4), (2, 6, 2, 2)]
    assert not teacher.training
    assert student.training


@pytest.mark.parametrize(
    ("name", "classes"),
    [("dense/repghostnet_050", 3), ("retinanet/repghostnet_050", 2), ("repghostnet_050", 2)],
)
def test_a_teacher_with_another_head_or_classes_is_named(name: str, classes: int) -> None:
    with pytest.raises(InputError, match="the same head"):
        open_teacher(
            network(name, classes),
            "t",
            DetectionTask(["a", "b"]),
            STUDENT,
            network("dense/mobilenetv3_small_050"),
        )


def test_a_teachers_classes_in_another_order_are_put_right_for_masks_and_refused_for_boxes(
    tmp_path: Path,
) -> None:
    for name, task in (
        ("lraspp/repghostnet_050", SegmentationTask),
        ("dense/repghostnet_050", DetectionTask),
    ):
        path = tmp_path / f"{task.name}.safetensors"
        refold.save(network(name).eval(), path, class_names=["b", "a"])
        loaded = refold.load(path)
        if task is DetectionTask:
            with pytest.raises(InputError, match="in another order"):
                open_teacher(loaded, "t", task(["a", "b"]), STUDENT, network(name))
            continue
        turned = open_teacher(loaded, "t", task(["a", "b"]), STUDENT, network(name))
        images = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            assert torch.equal(turned(images), loaded(turned.prepare(images))[:, [1, 0]])


def test_answers_about_places_are_not_kept() -> None:
    with pytest.raises(InputError, match="leave teacher_cache out"):
        DetectionTask(["a"]).check_answers_can_be_kept()


def test_the_last_maps_of_the_backbones_are_the_features() -> None:
    student, teacher = network("dense/mobilenetv3_small_050"), network("dense/repghostnet_050")
    losses = FeatureLosses(student, teacher, feature_weight=1.0, relation_weight=1.0)
    assert isinstance(losses.projection, nn.Linear)
    losses.attach(student, teacher)
    images = torch.randn(3, 3, 64, 64)
    student(images), teacher(images)
    loss = losses()
    loss.backward()
    assert loss.isfinite()
    assert any(p.grad is not None for p in student.backbone.parameters())
    assert losses.projection.weight.grad is not None
