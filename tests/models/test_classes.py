"""The number of a network's classes, and names that must be as many."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import refold
from refold.errors import InputError
from refold.models.classes import check_class_names, class_count


class Own(nn.Module):
    """A classifier that does not say how many classes it has."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.last = nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.conv(x)).mean((2, 3)))


def test_a_network_says_or_shows_how_many_classes_it_has() -> None:
    assert class_count(refold.create_model("repghostnet_050", num_classes=7)) == 7
    assert class_count(refold.create_model("resnet10t", num_classes=3)) == 3
    own = Own(6)
    own.norm.eval()
    statistics = own.norm.running_mean.clone()
    assert class_count(own) == 6
    assert (own.training, own.norm.training) == (True, False)
    assert torch.equal(own.norm.running_mean, statistics)
    assert class_count(nn.Conv2d(3, 5, 1)) is None  # a map
    assert class_count(nn.Linear(9, 5)) is None  # takes no image


def test_class_names_are_as_many_as_the_classes() -> None:
    check_class_names(["a", "b"], 2, "The file")
    with pytest.raises(InputError, match=r"The file has 3 class names for a network of 2 classes; give"):
        check_class_names(["a", "b", "c"], 2, "The file")


def test_a_checkpoint_is_not_saved_with_names_of_another_number(tmp_path: Path) -> None:
    network = refold.create_model("repghostnet_050", num_classes=3)
    with pytest.raises(InputError, match="of repghostnet_050 has 2 class names for a network of 3 classes"):
        refold.save(network, tmp_path / "net.safetensors", class_names=["a", "b"])
    with pytest.raises(InputError, match="of Own has 2 class names for a network of 3 classes"):
        refold.save(Own(3), tmp_path / "net.safetensors", class_names=["a", "b"])
    assert list(tmp_path.iterdir()) == []
