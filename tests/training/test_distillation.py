"""The distillation loss against closed forms, and what a student learns by it."""

import io
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import refold
from refold.errors import InputError
from refold.training import run as running
from refold.training.distillation import (
    FeatureLosses,
    distillation_loss,
    divergence,
    feature_loss,
    relation_loss,
)
from refold.training.recipe import load_recipe
from refold.training.run import Settings, train

STUDENT = {"input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.5] * 3}


def as_printed(student: Tensor, teacher: Tensor, temperature: float, *, inside: bool) -> Tensor:
    """GhostNetV3's eq. 4, word for word but for where the temperature stands."""
    if inside:
        s, t = (logits / temperature for logits in (student, teacher))
        s, t = s.softmax(1), t.softmax(1)
    else:
        s, t = student.softmax(1) / temperature, teacher.softmax(1) / temperature
    return temperature**2 * (t * (t.log() - s.log())).sum(1).mean()


def test_equation_4_and_the_usual_form_agree_at_temperature_one() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64) * 3
    usual = divergence(student, teacher)
    for inside in (True, False):
        assert torch.allclose(as_printed(student, teacher, 1.0, inside=inside), usual, rtol=1e-12)
    # Elsewhere the temperature counts: inside is the form in use, outside is τ times that of temperature one.
    for temperature in (0.5, 2.0, 4.0):
        used = divergence(student, teacher, temperature)
        assert torch.allclose(as_printed(student, teacher, temperature, inside=True), used, rtol=1e-12)
        outside = as_printed(student, teacher, temperature, inside=False)
        assert torch.allclose(outside, temperature * usual, rtol=1e-12)
        assert not torch.allclose(outside, used, rtol=0.01)


def test_the_loss_against_a_case_by_hand() -> None:
    # Student one half each, teacher three quarters and one quarter: KL = ¾ ln(3/2) + ¼ ln(1/2).
    student, teacher = torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]])
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert divergence(student, teacher).item() == pytest.approx(expected, rel=1e-6)
    total = distillation_loss(torch.tensor(2.0), divergence(student, teacher), alpha=0.25)
    assert total.item() == pytest.approx(0.75 * 2.0 + 0.25 * expected, rel=1e-6)
    assert divergence(teacher, teacher, 3.0).item() == pytest.approx(0, abs=1e-7)


def test_the_feature_loss_against_a_case_by_hand() -> None:
    # Differences 1, 2, 0 and 3: (1 + 4 + 0 + 9) / 4.
    student, teacher = torch.tensor([[1.0, 0.0], [2.0, 2.0]]), torch.tensor([[0.0, 2.0], [2.0, 5.0]])
    assert feature_loss(student, teacher).item() == pytest.approx(14 / 4)


def test_the_relation_loss_against_a_case_by_hand() -> None:
    """Only proportions count: neither scale nor place nor width of the features."""
    # Distances 1, 2, 1 of mean 4/3 against 3, 5, 4 of mean 4, in the order of the pairs 0-1, 0-2, 1-2.
    student = torch.tensor([[0.0], [1.0], [2.0]])
    teacher = torch.tensor([[0.0, 0.0], [3.0, 0.0], [3.0, 4.0]])
    expected = sum((s - t) ** 2 / 2 for s, t in ((0.75, 0.75), (1.5, 1.25), (0.75, 1.0))) / 3
    assert relation_loss(student, teacher).item() == pytest.approx(expected, rel=1e-6)
    assert relation_loss(student * 7 - 3, teacher).item() == pytest.approx(expected, rel=1e-5)
    # Beyond a difference of one the loss is linear: one image far from three others that are one.
    far, equal = torch.tensor([[0.0], [0.0], [0.0], [8.0]]), torch.eye(4)
    # Distances 0, 0, 0, 8, 8, 8 of mean 4 are 0 and 2; three equal ones are 1.
    assert relation_loss(far, equal).item() == pytest.approx(1 / 2, rel=1e-6)
    farther = torch.tensor([[0.0], [0.0], [0.0], [0.0], [8.0]])
    # Ten pairs, four of distance 8: the mean is 3.2, 8 is 2.5, off by 1.5: 1.5 - 1/2.
    assert relation_loss(farther, torch.eye(5)).item() == pytest.approx((6 / 2 + 4) / 10, rel=1e-6)
    # Features that are all the same have no proportions, and still a gradient that is a number.
    same = torch.ones(3, 2, requires_grad=True)
    relation_loss(same, teacher).backward()
    assert same.grad is not None
    assert same.grad.isfinite().all()


def test_features_are_what_the_classifiers_read() -> None:
    torch.manual_seed(0)
    student, teacher = (refold.create_model(name, num_classes=4) for name in ("resnet10t", "ghostnetv3_050"))
    images = torch.randn(3, 3, 32, 32)
    losses = FeatureLosses(student, teacher, feature_weight=2.0, relation_weight=0.5)
    losses.attach(student, teacher)
    student(images), teacher(images)
    read = {}
    for name, net in (("s", student), ("t", teacher)):
        read[name] = net.eval().forward_head(net.forward_features(images), pre_logits=True)
    student(images), teacher(images)
    expected = (
        2 * feature_loss(losses.projection(read["s"]), read["t"]) + relation_loss(read["s"], read["t"]) / 2
    )
    assert losses().item() == pytest.approx(expected.item(), rel=1e-5)
    assert [tuple(p.shape) for p in losses.parameters()] == [(1280, 512)]
    alone = FeatureLosses(student, teacher, feature_weight=0.0, relation_weight=1.0)
    assert not list(alone.parameters())
    with pytest.raises(InputError, match="Sequential has no linear layer as its classifier"):
        FeatureLosses(nn.Sequential(nn.Linear(3, 4)), teacher, feature_weight=1.0, relation_weight=0.0)


def test_a_student_learns_what_only_its_teacher_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With α = 1 the classes of the images count for nothing: the divergence alone can be what falls."""
    monkeypatch.setattr(running, "finish", lambda *_: None)
    names = [str(digit) for digit in range(10)]
    torch.manual_seed(0)
    teacher = refold.create_model("resnet10t", num_classes=10)
    nn.init.normal_(teacher.get_classifier().weight, std=0.5)  # type: ignore[operator]  # strong opinions
    refold.save(teacher, tmp_path / "teacher.safetensors", class_names=names, preprocessing=STUDENT)
    recipe = {"epochs": 2, "image_size": 16, "alpha": 1.0, "label_smoothing": 0.0, "batch_size": 128}
    settings = Settings(
        tmp_path / "run",
        "digits",
        "resnet10t",
        load_recipe("small_images", recipe),
        teacher=str(tmp_path / "teacher.safetensors"),
    )
    train(settings, Console(file=io.StringIO()))
    rows = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["callbacks"]
    losses = [row["loss"] for row in next(s for s in rows.values() if "rows" in s)["rows"]]
    assert losses[1] < 0.7 * losses[0]
    kept = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(key.startswith("net.") for key in kept)
