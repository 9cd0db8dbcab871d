import pytest
import torch
from torch import nn

from chains import Chain
from refold.algebra import (
    Convolution,
    balancing,
    largest_of_inputs,
    largest_of_outputs,
    scale_outputs,
    unscale_inputs,
)
from refold.folding.balancing import balanced_channels
from refold.folding.dead_channels import live_channels
from refold.folding.fold import apply_passes

IMAGE = torch.randn(2, 3, 12, 12)


def drawn(channels_in, channels_out, kernel=(3, 3), groups=1):
    weight = torch.randn(channels_out, channels_in // groups, *kernel, dtype=torch.float64)
    bias = torch.randn(channels_out, dtype=torch.float64)
    return Convolution(weight, bias, (1, 1), ((1, 1), (1, 1)), (1, 1), groups)


def applied(net, find, rounds=1):
    regions = []
    for _ in range(rounds):
        net = apply_passes(net, IMAGE, [find])
        regions += net.fold_report.regions
        assert net.fold_report.proof.distance_float64 < 1e-9
    return net, regions


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_a_scale_between_two_layers_is_undone(groups):
    first, second = drawn(4, 8), drawn(8, 8, groups=groups)
    scale = torch.rand(8, dtype=torch.float64) + 0.5
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    scaled = scale_outputs(first, scale, None)(x)
    torch.testing.assert_close(unscale_inputs(second, scale)(scaled), second(first(x)))


def test_balancing_makes_largest_weights_alike_by_powers_of_two():
    first, second = drawn(4, 8), drawn(8, 8, groups=2)
    written, read = largest_of_outputs(first), largest_of_inputs(second)
    assert written.tolist() == [first.weight[i].abs().max() for i in range(8)]
    assert read.tolist() == [second.weight[i // 4 * 4 : i // 4 * 4 + 4, i % 4].abs().max() for i in range(8)]
    scale = balancing(torch.tensor([1.0, 4.0, 0.0, 3.0]), torch.tensor([64.0, 1.0, 5.0, 0.0]))
    assert scale.tolist() == [8.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", [nn.ReLU, nn.LeakyReLU])
def test_channels_are_balanced_without_a_bit_of_difference(kind, inplace):
    net = Chain(lambda: kind(inplace=inplace)).eval()
    found, regions = applied(net, balanced_channels, rounds=3)
    assert {region.layer for region in regions} == {"8 channels scaled"}
    # Powers of two round nothing.
    assert torch.equal(found(IMAGE), net(IMAGE))
    before, after = (each.mix[0].weight.flatten(1).abs().amax(1) for each in (net, found))
    assert after.max() / after.min() < 0.2 * before.max() / before.min()
    assert not applied(found, balanced_channels)[1] or len(regions) > 3


def test_prelu_takes_scales_and_relu6_does_not():
    net = Chain(lambda: nn.PReLU(8)).eval()
    with torch.no_grad():
        net.first[1].weight.copy_(torch.linspace(-1, 1, 8))
    found, regions = applied(net, balanced_channels)
    assert regions
    torch.testing.assert_close(found(IMAGE), net(IMAGE))
    for capped in (nn.ReLU6, nn.Hardswish, nn.SiLU):
        assert not applied(Chain(capped).eval(), balanced_channels)[1]


def test_dead_channels_are_left_out():
    net = Chain(nn.ReLU6).eval()
    with torch.no_grad():
        net.first[0].weight[1] = 0  # and what it gives, cut off
        net.first[0].bias[1] = -0.5
        net.filter[0].bias[1] = 0.0
        net.mix[0].weight[2] = 0  # always two
        net.mix[0].bias[2] = 2.0
        net.head.weight[:, 5] = 0  # read by nobody
    found, regions = applied(net, live_channels, rounds=2)
    assert {region.layer for region in regions} == {"1 of 8 channels left out", "2 of 8 channels left out"}
    assert [m.out_channels for m in found.modules() if isinstance(m, nn.Conv2d)] == [7, 7, 6]
    assert found.filter[0].groups == 7
    torch.testing.assert_close(found(IMAGE), net(IMAGE))


def test_a_constant_that_ends_at_the_border_stays():
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1)).eval()
    with torch.no_grad():
        net[0].weight[3] = 0
        net[0].bias[3] = 1.0
    assert not applied(net, live_channels)[1]
    with torch.no_grad():
        net[0].bias[3] = -1.0
    found, (region,) = applied(net, live_channels)
    assert region.layer == "1 of 6 channels left out"
    torch.testing.assert_close(found(IMAGE), net(IMAGE))


def test_of_a_sum_only_what_is_constant_in_all_terms_is_left_out():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.block = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 3, padding=1)
            self.leave = nn.Conv2d(6, 4, 1)

        def forward(self, image):
            return self.leave(torch.relu(self.enter(image) + self.block(image[:, [2, 1, 0]])))

    net = Residual().eval()
    with torch.no_grad():
        net.enter.weight[:2] = 0
        net.block.weight[1:3] = 0
    found, (region,) = applied(net, live_channels)
    assert region.layer == "1 of 6 channels left out"
    torch.testing.assert_close(found(IMAGE), net(IMAGE))
