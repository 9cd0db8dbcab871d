"""MobileNetV4 against timm's, and RepGhostNetV2 and PlainNet, which differ from it in their shortcuts alone."""

from itertools import combinations

import pytest
import timm
import torch
from torch import nn

from golden import drawn_weights
from refold.blocks import ConvNorm, InvertedBottleneck
from refold.folding.fold import fold
from refold.models import create_model, load_checkpoint
from refold.recording.cost import count

SIZES = ("small", "medium", "large")
FAMILIES = ("mobilenetv4", "repghostnetv2", "plainnet")


@pytest.mark.parametrize("size", SIZES)
def test_the_three_have_timms_layers_and_cost_and_as_many_shortcuts(size: str) -> None:
    x = torch.empty(1, 3, 224, 224, device="meta")
    with torch.device("meta"):
        ours = [create_model(f"{family}_{size}") for family in FAMILIES]
        theirs = timm.create_model(f"mobilenetv4_conv_{size}")
    *costs, expected = [count(network, x) for network in (*ours, theirs)]
    for cost in costs:
        assert (cost.parameters, cost.macs, cost.activations) == (
            expected.parameters,
            expected.macs,
            expected.activations,
        )
    adds = [cost.operators.get("add", 0) for cost in costs]
    assert adds == [expected.operators["add"], expected.operators["add"], 0]
    chains = [[conv_of(module) for module in net.modules() if isinstance(module, nn.Conv2d)] for net in ours]
    assert chains[0] == chains[1] == chains[2]


def conv_of(conv: nn.Conv2d) -> tuple[object, ...]:
    return conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.groups


@pytest.mark.parametrize("size", SIZES)
def test_timms_weights_give_timms_outputs(size: str) -> None:
    theirs = timm.create_model(f"mobilenetv4_conv_{size}", num_classes=5).double().eval()
    theirs.load_state_dict(drawn_weights(theirs, gain=0.7))
    ours = create_model(f"mobilenetv4_{size}", num_classes=5).double().eval()
    assert load_checkpoint(ours, theirs.state_dict()).layout == "timm MobileNetV4"
    x = torch.randn(1, 3, 96, 64, dtype=torch.float64)
    with torch.no_grad():
        assert (ours(x) - theirs(x)).abs().max() <= 1e-9 * theirs(x).std()


@pytest.mark.parametrize("size", SIZES)
def test_the_shortcuts_of_repghostnetv2_go_from_1x1_convolution_to_depthwise_one(size: str) -> None:
    """Figure 7: the chain of layers is PlainNet's; a shortcut ends behind the depthwise convolution that follows."""
    with torch.device("meta"):
        plain, moved = (create_model(f"{family}_{size}") for family in ("plainnet", "repghostnetv2"))
    starts = [block.start for block in bottlenecks(plain)]
    blocks = bottlenecks(moved)
    assert all(isinstance(block.start, nn.Identity) for block in blocks)
    for block, following in zip(blocks, starts[1:], strict=False):
        assert isinstance(block.end, ConvNorm) == isinstance(following, ConvNorm)
    assert isinstance(blocks[-1].end, nn.Identity)


def bottlenecks(network: nn.Module) -> list[InvertedBottleneck]:
    return [module for module in network.modules() if isinstance(module, InvertedBottleneck)]


def test_without_shortcuts_the_three_are_one_function() -> None:
    x = torch.randn(1, 3, 64, 64)
    weights = list(drawn_weights(create_model("plainnet_small", num_classes=3)).values())
    with_shortcuts, without = [], []
    for family in FAMILIES:
        network = create_model(f"{family}_small", num_classes=3).eval()
        network.load_state_dict(dict(zip(network.state_dict(), weights, strict=True)))
        with torch.no_grad():
            with_shortcuts.append(network(x))
            for block in bottlenecks(network):
                block.has_shortcut = False
            without.append(network(x))
    assert torch.equal(without[0], without[1])
    assert torch.equal(without[0], without[2])
    for first, second in combinations(with_shortcuts, 2):
        assert not torch.allclose(first, second, rtol=1e-2)
    assert torch.equal(with_shortcuts[2], without[2])


def test_a_bottleneck_is_its_layers_in_order_and_a_shortcut() -> None:
    block = InvertedBottleneck(6, 12, 6, start=3, middle=5, end=3).double().eval()
    block.load_state_dict(drawn_weights(block))
    x = torch.randn(2, 6, 9, 7, dtype=torch.float64)
    y = block.expand(block.start(x))
    assert (y >= 0).all()
    assert (block.start(x) < 0).any()
    y = block.middle(y)
    assert (y >= 0).all()
    assert torch.equal(block(x), block.end(block.project(y)) + x)
    for other in (
        InvertedBottleneck(6, 12, 8, middle=3),
        InvertedBottleneck(6, 12, 6, middle=3, stride=2),
        InvertedBottleneck(6, 12, 6, middle=3, shortcut=False),
    ):
        assert not other.has_shortcut


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_leaves_no_batch_norm(family: str) -> None:
    network = create_model(f"{family}_small", num_classes=5).double()
    network.load_state_dict(drawn_weights(network, gain=0.9))
    plain = fold(network, torch.zeros(1, 3, 32, 32, dtype=torch.float64), prove=False)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        expected = network.eval()(x)
        assert (plain(x) - expected).abs().max() <= 1e-9 * expected.std()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step_reaches_every_weight_and_any_image_runs(family: str) -> None:
    network = create_model(f"{family}_small", num_classes=3, in_chans=1)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.01)
    network(torch.randn(4, 1, 64, 64)).square().sum().backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().sum() > 0, key
    optimiser.step()
    network.eval()
    with torch.no_grad():
        for height, width in [(32, 32), (97, 61), (8, 8), (1, 1)]:
            assert network(torch.randn(1, 1, height, width)).shape == (1, 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_exports_for_any_batch(family: str) -> None:
    network = create_model(f"{family}_small", num_classes=3).eval()
    x = torch.randn(2, 3, 64, 96)
    program = torch.export.export(
        network, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},)
    )
    with torch.no_grad():
        assert torch.allclose(program.module()(x[:1]), network(x[:1]), atol=1e-6)
