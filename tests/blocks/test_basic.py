"""The basic residual block: torchvision's and timm's function, and the shortcut without parameters."""

from functools import partial

import pytest
import torch
from timm.models.resnet import BasicBlock as TimmBasicBlock
from torch import nn

from golden import drawn_weights
from refold.blocks import BasicBlock, GhostModule, PaddedIdentity, basic_stage


def drawn(module: nn.Module) -> nn.Module:
    module.double().load_state_dict(drawn_weights(module, gain=0.7))
    return module.eval()


@pytest.mark.parametrize(("in_channels", "stride"), [(4, 1), (4, 2), (6, 1)])
def test_a_block_with_a_projection_is_timms(in_channels: int, stride: int) -> None:
    block = drawn(BasicBlock(in_channels, 4, stride=stride, projection=True))
    downsample = None
    if (in_channels, stride) != (4, 1):
        downsample = nn.Sequential(nn.Conv2d(in_channels, 4, 1, stride, bias=False), nn.BatchNorm2d(4))
    theirs = TimmBasicBlock(in_channels, 4, stride=stride, downsample=downsample).double().eval()
    values = list(block.state_dict().values())
    theirs.load_state_dict(dict(zip(theirs.state_dict(), values, strict=True)))
    x = torch.randn(2, in_channels, 7, 6, dtype=torch.float64)
    assert torch.allclose(block(x), theirs(x), rtol=1e-12)


@pytest.mark.parametrize("out_channels", [3, 5, 8])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_shortcut_without_parameters_subsamples_and_pads_or_cuts(out_channels: int, stride: int) -> None:
    x = torch.randn(2, 5, 7, 6)
    expected = torch.zeros(2, out_channels, -(-7 // stride), -(-6 // stride))
    kept = min(5, out_channels)
    for row in range(expected.shape[2]):
        for column in range(expected.shape[3]):
            expected[:, :kept, row, column] = x[:, :kept, row * stride, column * stride]
    assert torch.equal(PaddedIdentity(5, out_channels, stride=stride)(x), expected)


@pytest.mark.parametrize("projection", [True, False])
def test_a_stage_changes_shape_in_its_first_block_alone(projection: bool) -> None:
    stage = drawn(basic_stage(4, 6, 3, stride=2, module=partial(GhostModule, ratio=3), projection=projection))
    first, *others = stage
    assert isinstance(first.shortcut, GhostModule if projection else PaddedIdentity)
    assert all(isinstance(block.shortcut, nn.Identity) for block in others)
    assert sum(isinstance(module, GhostModule) for module in stage.modules()) == 6 + projection
    x = torch.randn(2, 4, 9, 6, dtype=torch.float64)
    out = first(x)
    assert out.shape == (2, 6, 5, 3)
    assert torch.equal(out, (first.conv2(first.conv1(x)) + first.shortcut(x)).relu())
    assert (first.conv1(x) >= 0).all()
    assert stage(x).shape == out.shape
