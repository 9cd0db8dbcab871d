"""The G-Ghost stage against its equations, RegNet's block, and the reduction ratios against counted stages."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from golden import drawn_weights
from refold.blocks import (
    ConvNorm,
    GGhostMix,
    GGhostStage,
    ResidualBottleneck,
    gghost_compression,
    gghost_speed_up,
    gghost_stage,
    thin_width,
)
from refold.errors import InputError
from refold.recording.cost import count

CONV = partial(ConvNorm, kernel_size=3, activation=True)


def drawn(module: nn.Module) -> nn.Module:
    module.double().load_state_dict(drawn_weights(module))
    return module.eval()


def normed(x: Tensor, layer: ConvNorm, **arguments: int) -> Tensor:
    bn = layer.bn
    y = F.conv2d(x, layer.conv.weight, None, **arguments)
    return F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("mix", [0, 1, 2])
@pytest.mark.parametrize("cheap", ["1x1", "5x5", "identity", "none"])
def test_a_stage_is_its_equations(cheap: str, mix: int, split: bool, end: bool) -> None:
    """Eq. 8 to 12 with 8 channels, 3 of them in the thin path."""
    (stage,) = drawn(
        gghost_stage(CONV, 4, 8, 4, stride=2, thin_channels=3, end=end, cheap=cheap, mix=mix, split=split)
    )
    x = torch.randn(2, 4, 9, 12, dtype=torch.float64)
    base = stage.base(x)
    y, thin = base[:, :3] if split else base, []
    for block in stage.thin:
        y = block(y)
        thin.append(y)
    assert [part.shape[1] for part in thin] == [3] * (len(thin) - 1) + [8 if cheap == "none" else 3]
    assert len(thin) == (2 if end else 3)
    if cheap == "none":
        ghost = thin[-1][:, 3:]
    elif cheap == "identity":
        ghost = base[:, 3:]
    else:
        ghost = normed(base[:, 3:] if split else base, stage.cheap, padding={"1x1": 0, "5x5": 2}[cheap])
    if mix:
        z = torch.cat([base, *thin], dim=1).mean((2, 3), keepdim=True)
        if mix == 1:
            ghost = ghost + F.conv2d(z, stage.mix.layers.weight, stage.mix.layers.bias)
        else:
            first, second = stage.mix.layers
            ghost = ghost + normed(normed(z, first).relu(), second)
    else:
        assert stage.mix is None
    expected = torch.cat([thin[-1][:, :3], ghost.relu()], dim=1)
    if end:
        expected = stage.end(expected)
    assert torch.allclose(stage(x), expected, rtol=1e-12, atol=1e-12)
    assert stage(x).shape == (2, 8, 5, 6)


def test_a_stage_without_a_thin_path_or_ghost_channels_stays_as_it_is() -> None:
    for stage in (
        gghost_stage(CONV, 4, 8, 2, stride=2, thin_channels=3),
        gghost_stage(CONV, 4, 8, 5, stride=2, thin_channels=8),
    ):
        assert all(isinstance(block, ConvNorm) for block in stage)
        assert [block.conv.stride[0] for block in stage] == [2] + [1] * (len(stage) - 1)
    assert len(gghost_stage(CONV, 4, 8, 1, stride=2, thin_channels=3)) == 1
    assert isinstance(gghost_stage(CONV, 4, 8, 2, stride=2, thin_channels=3, end=False)[0], GGhostStage)


@pytest.mark.parametrize("ghost_ratio", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("cheap", ["1x1", "3x3", "identity"])
@pytest.mark.parametrize("depth", [2, 3, 6])
def test_the_reduction_is_that_of_a_counted_stage(depth: int, cheap: str, ghost_ratio: float) -> None:
    """Eq. 13 and 14 are exact for a stage of single layers with one input and output width."""
    channels, x = 16, torch.empty(1, 16, 8, 8, device="meta")
    bare = partial(nn.Conv2d, kernel_size=3, padding=1, bias=False)
    with torch.device("meta"):
        blocks = [bare(channels, channels) for _ in range(depth)]
        stage = gghost_stage(
            bare,
            channels,
            channels,
            depth,
            stride=1,
            thin_channels=thin_width(channels, ghost_ratio),
            end=False,
            cheap=cheap,
            mix=0,
        )
        costs = [count(block, x) for block in blocks]
        ghost = count(stage, x)
        cheap_cost = count(stage[0].cheap, x)
    norms = sum(part.num_features * 2 for part in stage.modules() if isinstance(part, nn.BatchNorm2d))
    flops = gghost_speed_up([cost.macs for cost in costs], ghost_ratio, cheap_cost.macs)
    assert flops == pytest.approx(sum(cost.macs for cost in costs) / ghost.macs, rel=1e-12)
    parameters = [cost.parameters for cost in costs]
    reduction = gghost_compression(parameters, ghost_ratio, cheap_cost.parameters - norms)
    assert reduction == pytest.approx(sum(parameters) / (ghost.parameters - norms), rel=1e-12)


def test_the_reduction_tends_to_the_square_of_the_kept_share() -> None:
    assert gghost_speed_up([7.0], 0.5) == 1
    assert gghost_speed_up([1.0, 1.0], 0.5) == pytest.approx(2 / 1.5)
    assert gghost_speed_up([1.0] * 10_000, 0.5, 1) == pytest.approx(4, rel=1e-3)
    assert gghost_speed_up([3.0, 2.0, 1.0], 0) == 1


@pytest.mark.parametrize(("ratio", "kept"), [(0, 16), (0.3, 11), (0.4, 10), (0.5, 8), (0.99, 1)])
def test_the_thin_path_keeps_its_share(ratio: float, kept: int) -> None:
    assert thin_width(16, ratio) == kept


@pytest.mark.parametrize(("stride", "in_channels", "squeeze"), [(1, 8, None), (1, 6, 3), (2, 8, 3)])
@pytest.mark.parametrize("activation", [True, False])
def test_a_bottleneck_is_its_layers(
    activation: bool, stride: int, in_channels: int, squeeze: int | None
) -> None:
    block = drawn(
        ResidualBottleneck(
            in_channels,
            8,
            stride=stride,
            mid_channels=12,
            groups=3,
            squeeze_channels=squeeze,
            activation=activation,
        )
    )
    x = torch.randn(2, in_channels, 9, 6, dtype=torch.float64)
    y = normed(normed(x, block.conv1).relu(), block.conv2, stride=stride, padding=1, groups=3).relu()
    if squeeze:
        gate = F.relu(F.conv2d(y.mean((2, 3), keepdim=True), block.se.fc1.weight, block.se.fc1.bias))
        y = y * F.hardsigmoid(F.conv2d(gate, block.se.fc2.weight, block.se.fc2.bias))
    y = normed(y, block.conv3)
    y = y + x if (stride, in_channels) == (1, 8) else y + normed(x, block.shortcut, stride=stride)
    assert torch.allclose(block(x), y.relu() if activation else y, rtol=1e-12, atol=1e-12)
    assert ResidualBottleneck(4, 8).conv2.conv.out_channels == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cheap": "7x7"}, "cheap is '7x7'; choose one of '1x1', '3x3', '5x5', 'identity', 'none'"),
        ({"mix": 3}, "mix has 3 layers; give 1"),
        ({"thin_channels": 0}, "thin_channels is 0 of 8 channels"),
        ({"thin_channels": 9}, "thin_channels is 9 of 8 channels"),
    ],
)
def test_arguments_that_cannot_be_used(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as raised:
        GGhostStage(nn.Identity(), [], channels=8, **({"thin_channels": 3} | arguments))
    assert message in str(raised.value)


def test_ratios_that_cannot_be_used() -> None:
    for ratio in (-0.1, 1, 1.5):
        with pytest.raises(InputError, match="ghost_ratio is"):
            thin_width(16, ratio)
        with pytest.raises(InputError, match="ghost_ratio is"):
            gghost_speed_up([1.0], ratio)
    with pytest.raises(InputError, match="There are no blocks"):
        gghost_compression([], 0.5)


def test_the_averages_of_maps_of_any_size_are_mixed() -> None:
    mix = drawn(GGhostMix(5, 4))
    maps = [torch.randn(2, 2, 6, 4, dtype=torch.float64), torch.randn(2, 3, 3, 5, dtype=torch.float64)]
    z = torch.cat([x.mean((2, 3)) for x in maps], dim=1)
    expected = F.linear(z, mix.layers.weight.flatten(1), mix.layers.bias)[..., None, None]
    assert torch.allclose(mix(maps), expected, rtol=1e-12)
