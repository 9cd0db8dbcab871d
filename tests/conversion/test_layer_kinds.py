"""Conversions: pointwise convolutions and linear layers are one function; C3 adds where it concatenated."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from golden import drawn_weights
from refold.blocks import AddedC3, PointwiseLinear, RepUnit3
from refold.checkpoints import load, read_card, save
from refold.conversion import concatenation_to_addition, linear_to_pointwise, pointwise_to_linear
from refold.errors import InputError
from refold.folding.fold import fold
from refold.models import create_model
from refold.models.repnext import RepNeXt, RepNeXtTable
from refold.recording.cost import count


def small_repnext() -> nn.Module:
    network = RepNeXt(RepNeXtTable(RepUnit3, (1, 2, 1, 1), (6, 12, 24, 48)), num_classes=5).double().eval()
    network.load_state_dict(drawn_weights(network))
    return network


@pytest.mark.parametrize("folded", [False, True])
def test_pointwise_convolutions_become_linear_layers_and_back(folded: bool) -> None:
    network = small_repnext()
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    if folded:
        network = fold(network, x)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    linear = pointwise_to_linear(network)
    assert sum(isinstance(module, PointwiseLinear) for module in linear.modules()) == 10
    assert not any(isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) for m in linear.modules())
    with torch.no_grad():
        expected = network(x)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            y = linear.to(memory_format=memory_format)(x.to(memory_format=memory_format))
            assert torch.allclose(y, expected, rtol=1e-12, atol=1e-12)
    again = linear_to_pointwise(linear)
    assert list(again.state_dict()) == list(before)
    for model in (again, network):
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert count(linear, x).macs == count(network, x).macs
    assert count(linear, x).parameters == count(network, x).parameters


def test_a_converted_network_is_saved_as_one_of_its_own(tmp_path: Path) -> None:
    """By the name that built the original, another network would be read back."""
    network = create_model("repghostnet_050", num_classes=5)
    converted = pointwise_to_linear(network)
    assert network.architecture["name"] == "repghostnet_050"
    save(converted, tmp_path / "converted.safetensors")
    assert read_card(tmp_path / "converted.safetensors").architecture is None
    rebuilt = load(tmp_path / "converted.safetensors", lambda: pointwise_to_linear(network))
    state = converted.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in rebuilt.state_dict().items())


def test_what_is_no_pointwise_convolution_stays() -> None:
    layers = nn.ModuleList(
        [
            nn.Conv2d(4, 4, 3),
            nn.Conv2d(4, 4, 1, stride=2),
            nn.Conv2d(4, 4, 1, groups=2),
            nn.Conv2d(4, 4, 1, padding=1),
            nn.Linear(4, 4),
        ]
    )
    converted = pointwise_to_linear(layers)
    assert [type(layer) for layer in converted] == [type(layer) for layer in layers]
    assert [type(layer) for layer in linear_to_pointwise(layers)] == [type(layer) for layer in layers]


def test_a_conversion_keeps_sharing_mode_dtype_and_frozen_weights() -> None:
    shared = nn.Conv2d(4, 4, 1, bias=False).half().eval()
    shared.weight.requires_grad_(False)
    model = nn.Sequential(shared, nn.GELU(), shared)
    converted = pointwise_to_linear(model)
    assert converted[0] is converted[2]
    assert isinstance(converted[0], PointwiseLinear)
    assert converted[0].bias is None
    assert not converted[0].training
    assert converted[1].training
    assert converted[0].weight.dtype == torch.float16
    assert not converted[0].weight.requires_grad
    assert model[0] is shared
    assert isinstance(pointwise_to_linear(nn.Conv2d(3, 4, 1)), PointwiseLinear)


def test_a_converted_network_trains_and_exports() -> None:
    network = pointwise_to_linear(create_model("repghostnet_050", num_classes=3)).train()
    network(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    x = torch.randn(2, 3, 64, 64)
    program = torch.export.export(network.eval(), (x,))
    assert torch.allclose(program.module()(x), network(x), atol=1e-6)


class Conv(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = Conv(channels, channels), Conv(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x))


class C3(nn.Module):
    """The module of YOLOv5."""

    def __init__(self, in_channels: int, out_channels: int, depth: int = 1) -> None:
        super().__init__()
        inner = out_channels // 2
        self.cv1, self.cv2 = Conv(in_channels, inner), Conv(in_channels, inner)
        self.cv3 = Conv(2 * inner, out_channels)
        self.m = nn.Sequential(*(Bottleneck(inner) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


class Swapped(C3):
    """The same parts in another order, which is another function of them."""

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.cv2(x), self.m(self.cv1(x))), 1))


def test_every_c3_adds_and_keeps_its_output_channels() -> None:
    model = nn.Sequential(Conv(3, 8, 3), C3(8, 12), C3(12, 16, depth=2)).double().eval()
    model.load_state_dict(drawn_weights(model))
    before = copy.deepcopy(model.state_dict())
    converted = concatenation_to_addition(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    x = torch.randn(2, 3, 9, 7, dtype=torch.float64)
    with torch.no_grad():
        assert converted(x).shape == model(x).shape
        y = model[0](x)
        block, added = model[1], converted[1]
        assert isinstance(added, AddedC3)
        summed = block.m(block.cv1(y)) + block.cv2(y)
        # Over a doubled sum the original weights give twice what their mean gives over the sum.
        doubled = block.cv3.conv(torch.cat([summed, summed], 1))
        assert torch.allclose(2 * added.cv3.conv(summed), doubled)
        assert torch.equal(added(y), added.cv3(summed))
    operators = count(converted, x).operators, count(model, x).operators
    assert "concatenation" not in operators[0]
    assert operators[0]["add"] == operators[1]["add"] + operators[1]["concatenation"]
    saved = sum(parameter.numel() for parameter in model.parameters()) - sum(
        parameter.numel() for parameter in converted.parameters()
    )
    assert saved == 12 * 6 + 16 * 8
    converted.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in converted.parameters())
    assert converted[1].cv3.conv.in_channels == 6


@pytest.mark.parametrize("model", [Conv(3, 4), nn.Sequential(Swapped(8, 8)), nn.Sequential(Bottleneck(4))])
def test_what_is_no_c3_is_refused(model: nn.Module) -> None:
    with pytest.raises(InputError, match="has no module that computes cv3"):
        concatenation_to_addition(model)
