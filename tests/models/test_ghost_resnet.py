"""ResNet-50 with ghost and RepGhost modules: the sizes of RepGhost's table 12, the block, folding, training."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from golden import drawn_weights
from refold.blocks import GhostModule, GhostResidual, RepGhostModule
from refold.folding.fold import fold
from refold.models import create_model
from refold.models.ghost_resnet import GhostResNet, GhostResNetTable
from refold.recording.cost import count

# Parameters (M) and multiply-accumulates (G) of table 12; the parameters are those of the training form.
PUBLISHED = {
    "cghost_resnet50_s2": (14.0, 2.2),
    "cghost_resnet50_s4": (8.2, 1.2),
    "repghost_resnet50_s14": (13.3, 2.2),
    "repghost_resnet50_s2": (7.1, 1.2),
}


def drawn(module: nn.Module) -> nn.Module:
    module.double().load_state_dict(drawn_weights(module, gain=0.7))
    return module.eval()


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_papers(name: str) -> None:
    with torch.device("meta"):
        cost = count(create_model(name), torch.empty(1, 3, 224, 224))
    assert (round(cost.parameters / 1e6, 1), round(cost.macs / 1e9, 1)) == PUBLISHED[name]


def test_the_plain_form_has_the_papers_size_where_the_training_form_has_not() -> None:
    network = create_model("repghost_resnet50_s14")
    plain = fold(network, torch.zeros(1, 3, 64, 64), prove=False)
    assert round(sum(parameter.numel() for parameter in plain.parameters()) / 1e6, 1) == 13.2
    assert not any(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
    cheap = [module.cheap for module in plain.modules() if hasattr(module, "cheap")]
    assert len(cheap) == 52
    assert all(isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels for layer in cheap)


def normed(x: Tensor, norm: nn.Module) -> Tensor:
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


@pytest.mark.parametrize("activation", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_ghost_module_with_a_kernel_and_a_stride(stride: int, activation: bool) -> None:
    module = drawn(GhostModule(5, 10, activation=activation, kernel_size=3, stride=stride, ratio=4))
    x = torch.randn(2, 5, 9, 6, dtype=torch.float64)
    act = F.relu if activation else nn.Identity()
    primary = act(normed(F.conv2d(x, module.primary.conv.weight, None, stride, 1), module.primary.bn))
    cheap = act(normed(F.conv2d(primary, module.cheap.conv.weight, None, 1, 1, 1, 3), module.cheap.bn))
    expected = torch.cat([primary, cheap], dim=1)[:, :10]
    assert primary.shape[1:] == (3, -(-9 // stride), -(-6 // stride))
    assert torch.allclose(module(x), expected, rtol=1e-12)


def test_a_repghost_module_with_a_kernel_and_a_stride() -> None:
    module = drawn(RepGhostModule(5, 8, activation=True, kernel_size=3, stride=2))
    x = torch.randn(2, 5, 9, 6, dtype=torch.float64)
    primary = F.relu(normed(F.conv2d(x, module.primary.conv.weight, None, 2, 1), module.primary.bn))
    cheap = F.conv2d(primary, module.cheap.branches[0].conv.weight, None, 1, 1, 1, 8)
    expected = F.relu(normed(cheap, module.cheap.branches[0].bn) + normed(primary, module.cheap.skip))
    assert torch.allclose(module(x), expected, rtol=1e-12)


@pytest.mark.parametrize("module", [partial(GhostModule, ratio=2), RepGhostModule])
@pytest.mark.parametrize(("in_channels", "stride"), [(8, 1), (6, 1), (8, 2)])
def test_a_block_activates_the_sum_with_its_shortcut(
    module: type[nn.Module], in_channels: int, stride: int
) -> None:
    block = drawn(GhostResidual(in_channels, 4, 8, stride=stride, module=module))
    x = torch.randn(2, in_channels, 8, 6, dtype=torch.float64)
    main = block.expand(block.spatial(block.reduce(x)))
    assert isinstance(block.shortcut, nn.Identity) == ((in_channels, stride) == (8, 1))
    assert (block.reduce(x) >= 0).all()
    assert (block.spatial(block.reduce(x)) >= 0).all()
    assert (main < 0).any()
    assert torch.equal(block(x), F.relu(main + block.shortcut(x)))
    assert block(x).shape == (2, 8, 8 // stride, 6 // stride)


@pytest.mark.parametrize("module", [partial(GhostModule, ratio=4), RepGhostModule])
def test_it_folds_trains_and_exports(module: type[nn.Module]) -> None:
    network = drawn(GhostResNet(GhostResNetTable(module, 0.1), num_classes=5, in_chans=1))
    x = torch.randn(2, 1, 64, 96, dtype=torch.float64)
    plain = fold(network, x, prove=False)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in plain.modules())
    with torch.no_grad():
        expected = network(x)
        assert (plain(x) - expected).abs().max() <= 1e-9 * expected.std()
        assert network(torch.randn(1, 1, 32, 33, dtype=torch.float64)).shape == (1, 5)
    program = torch.export.export(
        network, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},)
    )
    with torch.no_grad():
        assert torch.allclose(program.module()(x[:1]), network(x[:1]))
    network.train()(x).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in network.parameters())
