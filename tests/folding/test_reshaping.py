"""1x1 convolutions of one pixel as linear layers and the other way round: on request, and only for one pixel."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checking import LARGEST, Net, distance, normal
from torch import Tensor, nn

import refold
from refold.folding.alternatives import RESHAPE, Alternative


def reshaped(model: nn.Module, x: Tensor) -> Any:
    """The network with every such layer written in the other way, checked in float64."""

    def judge(alternatives: Sequence[Alternative]) -> Alternative | None:
        return alternatives[0] if alternatives[0].kind == RESHAPE else None

    model = model.double().eval()
    plain: Any = refold.folding.fold(model, x, rewrites=judge)
    for side in (5, 8):
        other = normal(2, x.shape[1], side, side + 1)
        with torch.no_grad():
            assert distance(model(other), plain(other)) <= LARGEST
    return plain


def convolutions_and_linears(plain: Any) -> tuple[int, int]:
    operators = plain.fold_report.after.operators
    return operators.get("convolution", 0), operators.get("linear", 0)


@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_behind_a_global_average(bias: bool) -> None:
    pool = nn.AdaptiveAvgPool2d(1)
    net = nn.Sequential(pool, nn.Conv2d(512, 512, 1, bias=bias), nn.ReLU(), nn.Conv2d(512, 512, 1, stride=2))
    plain = reshaped(net, normal(1, 512, 6, 6))
    assert convolutions_and_linears(plain) == (0, 2)
    assert len(plain.fold_report.options["rewrites"]) == 2


def test_an_average_as_a_method() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.last(x.mean((2, 3), keepdim=True)))

    assert convolutions_and_linears(
        reshaped(Net(forward, last=nn.Conv2d(512, 512, 1)), normal(1, 512, 6, 6))
    ) == (
        0,
        1,
    )


def test_a_linear_layer_as_a_convolution() -> None:
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 512))
    assert convolutions_and_linears(reshaped(net, normal(1, 512, 6, 6))) == (1, 0)


@pytest.mark.parametrize(
    "net",
    [
        nn.Sequential(nn.AvgPool2d(6), nn.Conv2d(512, 512, 1)),  # one pixel of this image only
        nn.Sequential(nn.AdaptiveAvgPool2d((1, None)), nn.Conv2d(512, 512, 1)),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(512, 512, 3, padding=1)),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(512, 64, 1)),  # too small to matter
    ],
)
def test_what_is_left(net: nn.Module) -> None:
    plain: Any = refold.folding.fold(net, torch.randn(1, 512, 6, 6), rewrites=lambda offered: offered[0])
    assert not any(name.startswith(RESHAPE) for name in plain.fold_report.options.get("rewrites", []))


def test_a_mean_over_one_axis_is_no_pixel() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.last(F.relu(x.mean(2, keepdim=True)))

    plain: Any = refold.folding.fold(
        Net(forward, last=nn.Conv2d(512, 512, 1)),
        torch.randn(1, 512, 6, 1),
        rewrites=lambda offered: offered[0],
    )
    assert "rewrites" not in plain.fold_report.options
