"""RepNeXt's units and block against the paper's equations."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from golden import drawn_weights
from refold.blocks import RepNeXtBlock, RepUnit1, RepUnit2, RepUnit3
from refold.errors import InputError


def drawn(module: nn.Module) -> nn.Module:
    module.double().load_state_dict(drawn_weights(module))
    return module.eval()


def normed(x: Tensor, norm: nn.Module) -> Tensor:
    scale = norm.weight / torch.sqrt(norm.running_var + 1e-6)
    return (x - norm.running_mean.view(1, -1, 1, 1)) * scale.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)


def test_unit_1_gives_each_third_of_the_channels_its_kernel() -> None:
    unit = drawn(RepUnit1(6))
    x = torch.randn(2, 6, 9, 7, dtype=torch.float64)
    maps = []
    for index, kernel_size in enumerate((3, 5, 7)):
        weight = unit.convs[index].weight
        assert weight.shape == (2, 1, kernel_size, kernel_size)
        maps.append(F.conv2d(x[:, 2 * index : 2 * index + 2], weight, padding=kernel_size // 2, groups=2))
    assert torch.allclose(unit(x), normed(torch.cat(maps, 1), unit.bn), rtol=1e-12)


@pytest.mark.parametrize(
    ("unit", "kernels"), [(RepUnit2, ((7, 7), (5, 5), (3, 3))), (RepUnit3, ((7, 7), (1, 5), (3, 1)))]
)
def test_units_2_and_3_sum_normed_kernels(
    unit: type[nn.Module], kernels: tuple[tuple[int, int], ...]
) -> None:
    module = drawn(unit(6))
    x = torch.randn(2, 6, 9, 7, dtype=torch.float64)
    expected = torch.zeros_like(x)
    for branch, (rows, columns) in zip(module.branches, kernels, strict=True):
        assert branch.conv.weight.shape == (6, 1, rows, columns)
        maps = F.conv2d(x, branch.conv.weight, padding=(rows // 2, columns // 2), groups=6)
        expected += normed(maps, branch.bn)
    assert torch.allclose(module(x), expected, rtol=1e-12)


@pytest.mark.parametrize("unit", [RepUnit1, RepUnit2, RepUnit3])
def test_the_block_activates_its_shortcut_and_not_its_sum(unit: type[nn.Module]) -> None:
    block = drawn(RepNeXtBlock(6, unit))
    x = torch.randn(2, 6, 9, 7, dtype=torch.float64)
    hidden = F.gelu(F.conv2d(block.unit(x), block.expand.weight, block.expand.bias))
    assert hidden.shape[1] == 24
    expected = F.conv2d(hidden, block.project.weight, block.project.bias) + F.gelu(x)
    assert torch.allclose(block(x), expected, rtol=1e-12)


def test_unit_1_needs_channels_that_three_divides() -> None:
    with pytest.raises(InputError, match="RepUnit1 has 128 channels, which three does not divide"):
        RepUnit1(128)
