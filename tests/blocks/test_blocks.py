"""The blocks against the sums, concatenations and gates that the papers write down."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.ghostnet import GhostModuleV2
from timm.models.repghost import RepGhostModule as TimmRepGhostModule
from torch import Tensor, fx, nn
from torch.nn import functional as F

from golden import drawn_weights
from refold.blocks import (
    BranchSum,
    ConvNorm,
    DFCAttention,
    GhostBottleneck,
    GhostModule,
    RepeatedConvNorm,
    RepGhostModule,
    RepVGGBlock,
)
from refold.blocks.attention import half_size


def drawn(module: nn.Module) -> nn.Module:
    """The module in float64 and eval mode, no weight or statistic of which is 0 or 1."""
    module.double().load_state_dict(drawn_weights(module))
    return module.eval()


def image(channels: int, height: int = 9, width: int = 6) -> Tensor:
    return torch.randn(2, channels, height, width, dtype=torch.float64)


def normed(x: Tensor, norm: nn.Module) -> Tensor:
    """A batch norm in eval mode, written out."""
    shape = (1, -1, 1, 1)
    scale = norm.weight / torch.sqrt(norm.running_var + 1e-5)
    return (x - norm.running_mean.view(shape)) * scale.view(shape) + norm.bias.view(shape)


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and (a - b).abs().max().item() <= 1e-12 * max(1.0, b.abs().max().item())


@settings(max_examples=30, deadline=None)
@given(
    width=st.sampled_from([4, 8]),
    same=st.booleans(),
    stride=st.sampled_from([1, 2]),
    groups=st.sampled_from([1, 2, 4]),
    kernels=st.lists(st.sampled_from([1, 3, 5, (3, 1), (1, 5)]), min_size=1, max_size=4),
    skip=st.booleans(),
)
def test_a_branch_sum_is_the_sum_of_its_branches(width, same, stride, groups, kernels, skip) -> None:
    out_channels = width if same else 2 * width
    block = drawn(BranchSum(width, out_channels, kernels, stride=stride, groups=groups, skip=skip))
    x = image(width)
    expected = torch.zeros(2, out_channels, -(-9 // stride), -(-6 // stride), dtype=torch.float64)
    for kernel, branch in zip(kernels, block.branches, strict=True):
        rows, columns = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (rows // 2, columns // 2)
        y = F.conv2d(x, branch.conv.weight, None, stride, padding, 1, groups)
        expected += normed(y, branch.bn)
    assert (block.skip is not None) == (skip and same and stride == 1)
    if block.skip is not None:
        expected += normed(x, block.skip)
    assert close(block(x), expected)


def test_a_ghost_module_concatenates_the_activated_primary_with_its_cheap_maps() -> None:
    module = drawn(GhostModule(6, 8, activation=True))
    x = image(6)
    primary = F.relu(normed(F.conv2d(x, module.primary.conv.weight), module.primary.bn))
    cheap = F.conv2d(primary, module.cheap.conv.weight, padding=1, groups=4)
    expected = torch.cat([primary, F.relu(normed(cheap, module.cheap.bn))], dim=1)
    assert close(module(x), expected)


def test_a_ghost_module_without_activation_is_linear() -> None:
    module = drawn(GhostModule(6, 8, activation=False))
    x, zero = image(6), torch.zeros(2, 6, 9, 6, dtype=torch.float64)
    assert close(module(-x) - module(zero), module(zero) - module(x))


@pytest.mark.parametrize(
    ("out_channels", "ratio", "primary", "cheap"), [(8, 2, 4, 4), (7, 2, 4, 4), (10, 3, 4, 8), (9, 4, 3, 9)]
)
def test_a_ghost_module_is_cut_to_its_width(out_channels: int, ratio: int, primary: int, cheap: int) -> None:
    module = drawn(GhostModule(5, out_channels, activation=True, ratio=ratio))
    assert module.primary.conv.out_channels == primary
    assert module.cheap.conv.out_channels == cheap
    x = image(5)
    whole = torch.cat([module.primary(x), module.cheap(module.primary(x))], dim=1)
    assert torch.equal(module(x), whole[:, :out_channels])


@pytest.mark.parametrize("activation", [True, False])
def test_a_repghost_module_equals_timms(activation: bool) -> None:
    ours, theirs = (
        RepGhostModule(5, 8, activation=activation),
        drawn(TimmRepGhostModule(5, 8, relu=activation)),
    )
    ours.double().eval().load_state_dict(
        dict(zip(ours.state_dict(), _in_our_order(theirs.state_dict()), strict=True))
    )
    x = image(5)
    assert close(ours(x), theirs(x))


def _in_our_order(state: dict[str, Tensor]) -> list[Tensor]:
    parts = ("primary_conv", "cheap_operation", "fusion_bn")
    return [value for part in parts for key, value in state.items() if key.startswith(part)]


@pytest.mark.parametrize("size", [(14, 14), (7, 7), (9, 6), (2, 3)])
def test_an_attended_ghost_module_equals_timms(size: tuple[int, int]) -> None:
    block = drawn(
        GhostBottleneck(5, 8, 6, 3, stride=2, squeeze_channels=None, module=GhostModule, attention=True)
    )
    theirs = GhostModuleV2(5, 8).double().eval()
    ours = {**block.ghost1.state_dict(), **block.attention.state_dict()}
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.values(), strict=True)))
    x = image(5, *size)
    attended = theirs(x)
    assert close(block.ghost1(x) * block.attention(x), attended)
    assert close(block(x), block.ghost2(block.depthwise(attended)) + block.shortcut(x))


def test_attention_enlarges_by_the_nearest_smaller_position() -> None:
    attention = drawn(DFCAttention(4, 6))
    gates = attention(image(4, 7, 4))
    assert gates.shape == (2, 6, 7, 4)
    assert torch.equal(gates, gates[:, :, [0, 0, 0, 3, 3, 5, 5]][:, :, :, [0, 0, 2, 2]])
    assert gates.min() > 0
    assert gates.max() < 1


@pytest.mark.parametrize("size", [(8, 6), (7, 5), (3, 2), (1, 4), (5, 1), (1, 1)])
def test_half_size_averages_whole_pairs_and_keeps_a_single_line(size: tuple[int, int]) -> None:
    x = pooled = image(3, *size)
    for axis, length in zip((2, 3), size, strict=True):
        if length > 1:
            pairs = pooled.narrow(axis, 0, length // 2 * 2).unflatten(axis, (-1, 2))
            pooled = pairs.mean(axis + 1)
    assert close(half_size(x), pooled)


@pytest.mark.parametrize("activation", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("repeats", "pointwise", "skip"), [(3, True, True), (1, False, True), (2, True, False)]
)
def test_repeated_branches(repeats: int, pointwise: bool, skip: bool, stride: int, activation: bool) -> None:
    block = drawn(
        RepeatedConvNorm(
            6,
            6,
            5,
            stride=stride,
            groups=6,
            activation=activation,
            repeats=repeats,
            pointwise=pointwise,
            skip=skip,
        )
    )
    kernels = [branch.conv.kernel_size for branch in block.conv.branches]
    assert kernels == [(5, 5)] * repeats + [(1, 1)] * pointwise
    assert (block.conv.skip is not None) == (skip and stride == 1)
    x = image(6)
    expected = sum(branch(x) for branch in block.conv.branches)
    if skip and stride == 1:
        expected = expected + normed(x, block.conv.skip)
    assert close(block(x), expected.relu() if activation else expected)


def test_a_pointwise_kernel_has_no_second_pointwise_branch() -> None:
    assert len(RepeatedConvNorm(4, 8, 1).conv.branches) == 3
    assert len(RepeatedConvNorm(4, 8, 3).conv.branches) == 4


def test_squeeze_excite_of_repvgg_sits_between_the_sum_and_the_activation() -> None:
    block = drawn(RepVGGBlock(8, 8, groups=2, squeeze_channels=2))
    x = image(8)
    branches = block.conv(x)
    assert block.conv.skip is not None
    assert block.conv.branches[0].conv.groups == 2
    squeezed = F.relu(F.conv2d(branches.mean((2, 3), keepdim=True), block.se.fc1.weight, block.se.fc1.bias))
    gate = torch.sigmoid(F.conv2d(squeezed, block.se.fc2.weight, block.se.fc2.bias))
    assert close(block(x), F.relu(branches * gate))


@pytest.mark.parametrize("module", [GhostModule, RepGhostModule])
@pytest.mark.parametrize(("in_channels", "stride"), [(8, 1), (6, 1), (8, 2)])
def test_a_bottleneck_adds_its_shortcut(module: type[nn.Module], in_channels: int, stride: int) -> None:
    block = drawn(GhostBottleneck(in_channels, 12, 8, 5, stride=stride, squeeze_channels=4, module=module))
    x = image(in_channels)
    y = block.ghost1(x)
    if stride == 2:
        weight = block.depthwise.conv.weight
        y = normed(F.conv2d(y, weight, stride=2, padding=2, groups=12), block.depthwise.bn)
    squeezed = F.relu(F.conv2d(y.mean((2, 3), keepdim=True), block.se.fc1.weight, block.se.fc1.bias))
    gate = F.relu6(F.conv2d(squeezed, block.se.fc2.weight, block.se.fc2.bias) + 3) / 6
    y = block.ghost2(y * gate)
    if (in_channels, stride) == (8, 1):
        shortcut = x
    else:
        spatial, pointwise = block.shortcut
        shortcut = F.conv2d(x, spatial.conv.weight, stride=stride, padding=2, groups=in_channels)
        shortcut = normed(F.conv2d(normed(shortcut, spatial.bn), pointwise.conv.weight), pointwise.bn)
    assert close(block(x), y + shortcut)


@pytest.mark.parametrize(
    "block",
    [
        ConvNorm(8, 8, 3, activation=True),
        BranchSum(8, 8, (3, 1)),
        GhostModule(8, 9, activation=True),
        RepGhostModule(8, 8, activation=True),
        RepVGGBlock(8, 8, squeeze_channels=2),
        RepeatedConvNorm(8, 8, 3, groups=8, activation=True),
        DFCAttention(8, 12),
        GhostBottleneck(8, 12, 8, 3, stride=2, squeeze_channels=4, module=RepGhostModule),
    ],
    ids=lambda block: type(block).__name__,
)
def test_blocks_trace_and_train_every_weight(block: nn.Module) -> None:
    drawn(block).train()
    traced = fx.symbolic_trace(block)
    x = image(8)
    y = traced(x)
    assert close(y, block(x))
    (y * torch.randn_like(y)).sum().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
