"""Teachers see images their own way, and know the classes of the data."""

from pathlib import Path

import pytest
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

import refold
from refold.errors import InputError
from refold.training.tasks import ClassificationTask
from refold.training.teacher import Teacher, open_teacher, teacher_network

STUDENT = {"input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.5] * 3}


class Remember(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.seen = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return self.bn(x).mean((2, 3))


def test_a_teacher_sees_images_prepared_its_own_way() -> None:
    pixels = torch.rand(2, 3, 16, 16)
    own = {"input_size": [3, 16, 16], "mean": list(IMAGENET_DEFAULT_MEAN), "std": list(IMAGENET_DEFAULT_STD)}
    network = Remember().train()
    teacher = Teacher(network, own, STUDENT)
    answers = teacher((pixels - 0.5) / 0.5)
    mean, std = (torch.tensor(own[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    assert torch.allclose(network.seen, (pixels - mean) / std, atol=1e-6)
    assert not network.training
    assert not answers.requires_grad
    assert not any(parameter.requires_grad for parameter in network.parameters())
    larger = Teacher(network, {**own, "input_size": [3, 24, 20]}, STUDENT)
    larger(torch.full((2, 3, 16, 16), 0.25))
    assert network.seen.shape == (2, 3, 24, 20)
    # An even picture stays even, whatever its size.
    assert torch.allclose(network.seen, network.seen[:, :, :1, :1].expand_as(network.seen), atol=1e-5)


def test_a_teacher_has_the_classes_of_the_data(tmp_path: Path) -> None:
    net = refold.create_model("repghostnet_050", num_classes=3)
    refold.save(net, tmp_path / "t.safetensors", class_names=["a", "b", "c"], preprocessing=STUDENT)
    network = teacher_network(str(tmp_path / "t.safetensors"))
    straight = open_teacher(network, "t", ClassificationTask(["a", "b", "c"]), STUDENT, network)
    turned = open_teacher(network, "t", ClassificationTask(["c", "a", "b"]), STUDENT, network)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(turned(images), straight(images)[:, [2, 0, 1]])
    assert straight.size == (16, 16)
    with pytest.raises(InputError, match="knows other classes than the data: 'c'"):
        open_teacher(network, "t", ClassificationTask(["a", "b", "d"]), STUDENT, network)
    unnamed = refold.create_model("repghostnet_050", num_classes=4)
    with pytest.raises(InputError, match="knows 4 classes and the data has 3"):
        open_teacher(unnamed, "u", ClassificationTask(["a", "b", "c"]), STUDENT, unnamed)
    with pytest.raises(InputError, match="is a checkpoint already"):
        teacher_network("t.safetensors", tmp_path / "t.safetensors")
