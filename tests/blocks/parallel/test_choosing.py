"""Which form is chosen for which layer: both sides of every bound, at the layers that were measured."""

import pytest
import torch
from torch import Tensor

from refold.blocks.parallel.branch import Geometry
from refold.blocks.parallel.choosing import Part, choose


def image(batch: int, channels: int, side: int) -> Tensor:
    """A map that takes no memory."""
    return torch.empty(1).expand(batch, channels, side, side)


def layer(
    inputs: int, outputs: int, kernel_size: int = 1, stride: int = 1, *, depthwise: bool = False
) -> Geometry:
    padding = (kernel_size // 2, kernel_size // 2)
    groups = inputs if depthwise else 1
    return Geometry(inputs, outputs, (kernel_size, kernel_size), padding, (stride, stride), (1, 1), groups)


@pytest.mark.parametrize(
    ("geometry", "x", "part", "branches", "skip", "form"),
    [
        # 1x1, as many outputs as inputs or more: the statistics of the input pay, with several branches or a skip.
        (layer(24, 36), image(16, 24, 56), "pointwise", 3, False, "moments"),
        (layer(160, 480), image(16, 160, 14), "pointwise", 3, False, "moments"),
        (layer(24, 36), image(16, 24, 56), "pointwise", 1, False, "looped"),
        (layer(24, 24), image(16, 24, 56), "pointwise", 1, True, "looped"),
        # Many channels to few: what is written is less than what is read.
        (layer(72, 16), image(16, 72, 56), "pointwise", 3, False, "stacked"),
        (layer(72, 20), image(16, 72, 56), "pointwise", 3, False, "moments"),
        (layer(72, 16), image(16, 72, 56), "pointwise", 3, True, "moments"),
        (layer(960, 80), image(16, 960, 7), "pointwise", 3, False, "looped"),
        # Fewer positions than eight a channel say too little about a covariance.
        (layer(160, 480), image(2, 160, 24), "pointwise", 3, False, "looped"),
        (layer(160, 480), image(2, 160, 26), "pointwise", 3, False, "moments"),
        # Depthwise 3x3 at stride 1: large maps and more than two branches.
        (layer(72, 72, 3, depthwise=True), image(16, 72, 56), "neighbourhood", 3, True, "moments"),
        (layer(72, 72, 3, depthwise=True), image(16, 72, 14), "neighbourhood", 3, False, "looped"),
        (layer(72, 72, 3, depthwise=True), image(16, 72, 56), "neighbourhood", 2, False, "looped"),
        # With a stride only where the map is larger than any cache, and only 3x3.
        (layer(72, 72, 3, 2, depthwise=True), image(16, 72, 112), "neighbourhood", 3, False, "moments"),
        (layer(72, 72, 3, 2, depthwise=True), image(16, 72, 56), "neighbourhood", 3, False, "looped"),
        (layer(72, 72, 5, 2, depthwise=True), image(16, 72, 112), "neighbourhood", 3, False, "looped"),
        # Dense kernels see too many values.
        (layer(64, 64, 3), image(16, 64, 56), "spatial", 4, True, "looped"),
    ],
)
def test_the_form_of_a_layer(
    geometry: Geometry, x: Tensor, part: Part, branches: int, skip: bool, form: str
) -> None:
    assert choose(geometry, x, part, branches, skip) == form


def test_nothing_was_measured_elsewhere() -> None:
    x = torch.empty(16, 24, 56, 56, device="meta")
    assert choose(layer(24, 36), x, "pointwise", 3, False) == "looped"
