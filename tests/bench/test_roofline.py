"""The least work of a network, and the time that it needs at the roofs."""

import pytest
import torch
from torch import nn

from refold.bench.machine import Roof
from refold.bench.roofline import least_work, measure_roof


def test_a_convolution_in_closed_form() -> None:
    net = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
    work = least_work(net, torch.randn(2, 8, 10, 10))
    assert work.flops == 2 * 2 * 16 * 8 * 9 * 100
    assert work.bytes == 4 * (2 * 8 * 100 + 16 * 8 * 9 + 16 + 2 * 16 * 100)
    assert work.floor is None
    assert next(net.parameters()).device.type == "cpu"
    assert net.training


def test_the_floor_is_the_longer_of_computing_and_moving_layer_by_layer() -> None:
    net = nn.Sequential(nn.Linear(100, 200, bias=False), nn.ReLU(), nn.Linear(200, 10, bias=False)).eval()
    moved = [4 * (50 * 100 + 100 * 200 + 50 * 200), 4 * (50 * 200 + 200 * 10 + 50 * 10)]
    flops = [2 * 50 * 100 * 200, 2 * 50 * 200 * 10]
    rates = ((60_000, 1e9), (1_000_000, 1e8))
    work = least_work(net, torch.randn(50, 100), Roof(1e9, rates))
    # The first layer moves more than the small copy: it has the bandwidth of the large one.
    expected = max(flops[0] / 1e9, moved[0] / 1e8) + max(flops[1] / 1e9, moved[1] / 1e9)
    assert work.flops == sum(flops)
    assert work.bytes == sum(moved)
    assert work.floor == pytest.approx(1000 * expected)


def test_bandwidth_of_a_working_set() -> None:
    roof = Roof(1.0, ((10, 5.0), (100, 3.0), (1000, 4.0)))
    assert [roof.bandwidth_at(size) for size in (1, 10, 11, 500, 5000)] == [5.0, 5.0, 4.0, 4.0, 4.0]
    assert roof.memory_bandwidth == 4.0


def test_roofs_are_measured() -> None:
    roof = measure_roof(seconds=0.0)
    assert roof.flops > 0
    sizes = [size for size, _ in roof.bandwidth]
    assert sizes == sorted(sizes)
    assert min(rate for _, rate in roof.bandwidth) > 0
