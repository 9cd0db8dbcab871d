"""The forms that RepVGG's report compares: each against its formula, and whether it becomes one convolution."""

import pytest
import torch
from timm.models.resnet import BasicBlock
from torch import Tensor, nn
from torch.nn import functional as F

from golden import drawn_weights
from refold.blocks import REPARAMETERIZATIONS, DiracConv2d, RepVGGBlock, TrivialConv2d
from refold.errors import InputError
from refold.folding import fold
from refold.models import create_model

NOT_LINEAR = {"relu_in_branches", "residual"}


def drawn(block: nn.Module) -> nn.Module:
    """Weights and statistics that are neither 0 nor 1; the fixed identity kernels stay."""
    weights = drawn_weights(block)
    kept = {key: value for key, value in block.state_dict().items() if key.endswith(".identity")}
    block.double().eval().load_state_dict({**weights, **kept})
    return block


def image(channels: int) -> Tensor:
    return torch.randn(2, channels, 9, 6, dtype=torch.float64)


def normed(x: Tensor, norm: nn.Module) -> Tensor:
    """A batch norm in eval mode, written out."""
    scale = norm.weight / torch.sqrt(norm.running_var + 1e-5)
    return (x - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]


def convolved(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """The convolution as a sum over taps, with the padding that centres its kernel."""
    out_channels, width, rows, columns = conv.weight.shape
    padded = F.pad(x, (columns // 2, columns // 2, rows // 2, rows // 2))
    groups, stride = x.shape[1] // width, conv.stride[0]
    out = 0
    for row in range(rows):
        for column in range(columns):
            tap = padded[:, :, row : row + x.shape[2] : stride, column : column + x.shape[3] : stride]
            tap = tap.unflatten(1, (groups, width))
            weight = conv.weight[:, :, row, column].unflatten(0, (groups, out_channels // groups))
            out = out + torch.einsum("bgihw,goi->bgohw", tap, weight).flatten(1, 2)
    return out


def expected(name: str, layers: nn.Module, x: Tensor, can_skip: bool) -> Tensor:
    """What stands before the last ReLU, by the text of the report."""
    if name == "norm_after_sum":
        return normed(
            sum(convolved(x, conv) for conv in layers.sum.branches) + (x if can_skip else 0), layers.bn
        )
    if name == "residual":
        y = normed(convolved(x, layers.first.conv), layers.first.bn).relu()
        y = normed(convolved(y, layers.second.conv), layers.second.bn)
        projection = layers.shortcut
        return y + (x if can_skip else normed(convolved(x, projection.conv), projection.bn))
    end = torch.relu if name == "relu_in_branches" else torch.nn.Identity()
    out = sum(end(normed(convolved(x, branch.conv), branch.bn)) for branch in layers.branches)
    if can_skip and name in ("full", "no_pointwise", "relu_in_branches"):
        out = out + end(normed(x, layers.skip))
    return out + x if can_skip and name == "identity_without_norm" else out


KERNELS = {
    "full": [(3, 3), (1, 1)],
    "no_identity": [(3, 3), (1, 1)],
    "no_pointwise": [(3, 3)],
    "none": [(3, 3)],
    "identity_without_norm": [(3, 3), (1, 1)],
    "norm_after_sum": [(3, 3), (1, 1)],
    "relu_in_branches": [(3, 3), (1, 1)],
    "asymmetric": [(3, 3), (1, 3), (3, 1)],
    "residual": [(3, 3), (3, 3)],
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("in_channels", "stride", "groups"), [(8, 1, 1), (8, 1, 4), (4, 2, 2), (8, 2, 1)])
def test_each_form_is_the_reports(name: str, in_channels: int, stride: int, groups: int) -> None:
    block = drawn(RepVGGBlock(in_channels, 8, name, stride=stride, groups=groups))
    can_skip = in_channels == 8 and stride == 1
    kernels = [module.kernel_size for module in block.modules() if isinstance(module, nn.Conv2d)]
    projection = name == "residual" and not can_skip
    assert kernels == KERNELS[name] + [(1, 1)] * projection
    x = image(in_channels)
    y = expected(name, block.conv, x, can_skip).relu()
    assert (block(x) - y).abs().max() <= 1e-12 * y.abs().max()


def computed_kernel(conv: nn.Module, groups: int) -> Tensor:
    """Equation 1 of the report: every filter has length 1 and, at its centre, its own channel of its group."""
    weight = conv.weight / conv.weight.square().sum((1, 2, 3), keepdim=True).sqrt()
    if isinstance(conv, DiracConv2d):
        weight = conv.weight_scale * weight
    out_channels, width = weight.shape[:2]
    for group in range(groups):
        for channel in range(min(width, out_channels // groups)):
            filter_ = group * (out_channels // groups) + channel
            scale = conv.identity_scale[filter_, 0, 0, 0] if isinstance(conv, DiracConv2d) else 1
            weight[filter_, channel, 1, 1] += scale
    return weight


@torch.no_grad()
@pytest.mark.parametrize("name", ["dirac", "trivial"])
@pytest.mark.parametrize(("in_channels", "stride", "groups"), [(8, 1, 1), (8, 1, 4), (4, 2, 2), (12, 1, 1)])
def test_a_computed_kernel_holds_the_identity(name: str, in_channels: int, stride: int, groups: int) -> None:
    block = drawn(RepVGGBlock(in_channels, 8, name, stride=stride, groups=groups))
    conv, norm = block.conv.conv, block.conv.bn
    kernel = computed_kernel(conv, groups)
    x = image(in_channels)
    y = normed(F.conv2d(x, kernel, None, stride, 1, 1, groups), norm).relu()
    assert (block(x) - y).abs().max() <= 1e-12 * y.abs().max()
    plain = fold(block, x)
    (folded,) = (module for module in plain.modules() if isinstance(module, nn.Conv2d))
    scale = norm.weight / torch.sqrt(norm.running_var + 1e-5)
    assert (folded.weight - kernel * scale[:, None, None, None]).abs().max() <= 1e-12
    assert plain.fold_report.after.operators == {"convolution": 1, "activation": 1}


def test_diracnets_scales_start_at_one_and_a_tenth_and_are_trained() -> None:
    conv = DiracConv2d(6, 6, 3, padding=1, bias=False)
    assert set(conv.identity_scale.flatten().tolist()) == {1.0}
    assert torch.allclose(conv.weight_scale, torch.tensor(0.1))
    names = {"weight", "identity_scale", "weight_scale"}
    assert {name for name, _ in conv.named_parameters()} == names
    assert {name for name, _ in TrivialConv2d(6, 6, 3).named_parameters()} == {"weight", "bias"}
    conv(torch.randn(1, 6, 5, 5)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in conv.parameters())


@pytest.mark.parametrize("name", REPARAMETERIZATIONS)
def test_every_linear_form_becomes_one_convolution_and_no_other(name: str) -> None:
    block = drawn(RepVGGBlock(8, 8, name, groups=2))
    plain = fold(block, image(8))
    convolutions = [module for module in plain.modules() if isinstance(module, nn.Conv2d)]
    if name in NOT_LINEAR:
        assert len(convolutions) == 2
        assert plain.fold_report.after.operators["activation"] > 1
    else:
        assert plain.fold_report.after.operators == {"convolution": 1, "activation": 1}
        assert (convolutions[0].kernel_size, convolutions[0].groups) == ((3, 3), 2)


@pytest.mark.parametrize("stride", [1, 2])
def test_residual_layers_are_those_of_resnet_34(stride: int) -> None:
    block = RepVGGBlock(8, 8, "residual", stride=stride)
    projection = nn.Sequential(nn.Conv2d(8, 8, 1, stride, bias=False), nn.BatchNorm2d(8))
    theirs = drawn(BasicBlock(8, 8, stride, downsample=projection if stride > 1 else None))
    block.double().eval()
    block.load_state_dict(dict(zip(block.state_dict(), theirs.state_dict().values(), strict=True)))
    x = image(8)
    assert torch.allclose(block(x), theirs(x), rtol=1e-12)


def test_a_name_that_is_not_in_the_table() -> None:
    with pytest.raises(
        InputError, match="reparameterization is 'diracnet'; choose one of 'full', 'no_identity'"
    ):
        create_model("repvgg_b0", reparameterization="diracnet")


LAYERS = 28


@pytest.mark.parametrize("name", REPARAMETERIZATIONS)
def test_networks_have_the_forms_layers(name: str) -> None:
    with torch.device("meta"):
        network = create_model("repvgg_b0", reparameterization=name)
    assert network.architecture["arguments"] == ({"reparameterization": name})
    kernels = [module.kernel_size for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert kernels.count((3, 3)) == LAYERS
    pointwise = {"full", "no_identity", "identity_without_norm", "norm_after_sum", "relu_in_branches"}
    assert kernels.count((1, 1)) == (LAYERS if name in pointwise else 3 if name == "residual" else 0)
    assert kernels.count((1, 3)) == kernels.count((3, 1)) == LAYERS * (name == "asymmetric")
    depths = [len(stage) for stage in network.stages]
    assert depths == ([2, 3, 8, 1] if name == "residual" else [4, 6, 16, 1])
    assert network.eval()(torch.empty(1, 3, 32, 32, device="meta")).shape == (1, 1000)


def test_groups_stay_at_every_second_layer_of_a_residual_network() -> None:
    with torch.device("meta"):
        network = create_model("repvgg_b1g4", reparameterization="residual")
        layers = create_model("repvgg_b1g4", reparameterization="none")
    groups = [module.groups for module in layers.modules() if isinstance(module, nn.Conv2d)]
    paired = [
        module.groups
        for module in network.modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)
    ]
    assert paired == groups
    assert groups == [1, *[1, 4] * 13, 1]
