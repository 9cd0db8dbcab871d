"""Models that are not written as the textbook has them: calls by name, other compilers' modules, foreign containers."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from checking import LARGEST, Net, Parallel, call, check_fold, conv_bn, distance, images, trained
from torch import Tensor, nn

import refold
from refold.errors import NotEquivalent


def branches(act: nn.Module | None = None) -> Parallel:
    return Parallel(conv_bn(4, 4, 3), conv_bn(4, 4, 1), act=act)


class Reads(nn.Module):
    """Reads one of its two inputs."""

    def __init__(self, second: bool) -> None:
        super().__init__()
        self.second = second
        self.a, self.b = conv_bn(4, 4, 3), conv_bn(4, 4, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = y if self.second else x
        return self.a(z) + self.b(z)


@pytest.mark.parametrize("second", [False, True])
def test_a_block_that_ignores_an_input_still_takes_it(second: bool) -> None:
    model = Net(lambda net, x: net.block(x.relu(), x.sigmoid()).relu(), block=Reads(second))
    check_fold(model, images(4), convolutions=1)


def test_a_block_called_by_position_and_by_name() -> None:
    """A bare convolution would not know the name of the block's argument."""

    def forward(net: Net, x: Tensor) -> Tensor:
        return net.block(x).relu() + net.block(x=x.sigmoid()).relu()

    model = trained(Net(forward, block=branches(nn.Identity())).double())
    plain: Any = refold.fold(model, images(4)[0])
    assert plain.fold_report.after.convolutions == 2
    assert distance(call(model, images(4)[1]), call(plain, images(4)[1])) <= LARGEST


class Switchable(nn.Module):
    """Chooses its forward when it is made, as detection code does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_bn(4, 4, 3), conv_bn(4, 4, 1)
        self.forward = self.other  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        return (self.a(x) + self.b(x)).relu()

    def other(self, x: Tensor) -> Tensor:
        return (self.a(x) - self.b(x)).relu()


def test_a_compiled_model_and_a_compiled_part() -> None:
    for model in (
        torch.compile(branches(), backend="eager"),
        nn.Sequential(torch.compile(branches(), backend="eager")),
    ):
        torch._dynamo.reset()
        trained(model.double())
        plain: Any = refold.fold(model, images(4)[0])
        assert plain.fold_report.after.convolutions == 1
        assert distance(call(model, images(4)[1]), call(plain, images(4)[1])) <= LARGEST


@dataclass
class Detections:
    """An output that torch's pytrees do not know."""

    scores: Tensor
    boxes: list[Tensor]
    name: str = "boxes"


class Detector(nn.Module):
    """Returns its tensors inside an object."""

    def __init__(self) -> None:
        super().__init__()
        self.block = branches()

    def forward(self, x: Tensor) -> Detections:
        y = self.block(x)
        return Detections(y, [y.mean((2, 3))])


def test_whole_numbers_are_compared_exactly() -> None:
    """Predicted classes: equal, or not equivalent."""
    model = trained(Net(lambda net, x: net.block(x).argmax(1), block=branches()))
    (x, *_) = images(4)
    plain: Any = refold.fold(model, x.float())
    assert plain.fold_report.after.convolutions == 1
    assert torch.equal(call(model, x.float()), call(plain, x.float()))
    wrong = copy.deepcopy(model)
    wrong.block.branches[0][1].bias.data[0] += 100
    with pytest.raises(NotEquivalent):
        refold.verify(model, wrong, x.float())
