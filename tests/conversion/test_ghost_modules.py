"""Ghost modules for the convolutions of any model: sizes, what is left alone, what is kept, folding, training."""

import copy
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import refold
from golden import drawn_weights
from refold.blocks import GhostConv2d
from refold.conversion import convolutions_to_ghost
from refold.errors import InputError
from refold.models import create_model
from refold.recording.cost import count


def ghosts(model: nn.Module) -> dict[str, GhostConv2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, GhostConv2d)}


def drawn(module: nn.Module) -> nn.Module:
    module.double().load_state_dict(drawn_weights(module, gain=0.7))
    return module.eval()


@pytest.mark.parametrize("build", [torchvision.models.resnet50, lambda: timm.create_model("resnet50")])
@pytest.mark.parametrize("ratio", [2, 4])
def test_resnet50_of_any_library_becomes_the_papers(build: type[nn.Module], ratio: int) -> None:
    with torch.device("meta"):
        x = torch.empty(1, 3, 224, 224)
        converted = convolutions_to_ghost(build(), ratio=ratio)
        expected = create_model(f"cghost_resnet50_s{ratio}")
        assert len(ghosts(converted)) == 52
        assert "conv1" not in ghosts(converted)
        found, wanted = count(converted, x), count(expected, x)
    assert (found.parameters, found.macs, found.batch_norms) == (
        wanted.parameters,
        wanted.macs,
        wanted.batch_norms,
    )


@pytest.mark.parametrize(("ratio", "cheap_kernel_size"), [(2, 1), (2, 7), (4, 3)])
def test_vgg16_with_batch_norm_becomes_the_papers(ratio: int, cheap_kernel_size: int) -> None:
    arguments = {"ratio": ratio, "cheap_kernel_size": cheap_kernel_size}
    with torch.device("meta"):
        model = torchvision.models.vgg16_bn().features
        x = torch.empty(1, 3, 32, 32)
        converted = convolutions_to_ghost(model, **arguments, include="0", example_input=x)
        expected = create_model("cghost_vgg16", **arguments)
        body = nn.Sequential(expected.stem, expected.stages, expected.final_conv)
        assert len(ghosts(converted)) == 13
        found, wanted = count(converted, x), count(body, x)
        # torchvision's convolutions have biases in front of their norms.
        biases = sum(layer.out_channels for layer in model if isinstance(layer, nn.Conv2d))
    assert (found.parameters, found.macs) == (wanted.parameters + biases, wanted.macs)


def test_the_plain_row_of_a_refold_network_becomes_its_ghost_row() -> None:
    with torch.device("meta"):
        plain = create_model("cghost_resnet56", ratio=1)
        converted = convolutions_to_ghost(plain, cheap_kernel_size=1, include="stem.*")
        expected = create_model("cghost_resnet56")
    assert not hasattr(converted, "architecture")
    assert plain.architecture["arguments"] == {"ratio": 1}
    assert sum(p.numel() for p in converted.parameters()) == sum(p.numel() for p in expected.parameters())


class Small(nn.Module):
    """A norm and an activation behind each convolution, in several ways of writing them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.first = nn.Sequential(
            nn.Conv2d(8, 9, (3, 1), padding=(1, 0), bias=False), nn.BatchNorm2d(9, eps=1e-3)
        )
        self.act = nn.LeakyReLU(0.2, inplace=True)
        self.second = nn.Conv2d(9, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.narrow = nn.Conv2d(12, 3, 1)
        self.squeeze = nn.Conv2d(12, 12, 1)
        self.unused = nn.Conv2d(12, 12, 1)
        self.last = nn.Conv2d(12, 8, 1)
        self.last_norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(F.relu(self.stem(x))))
        x = F.hardswish(self.norm(self.second(x)))
        x = self.depthwise(x) * torch.sigmoid(self.squeeze(x.mean((2, 3), keepdim=True)))
        y = self.last(x)
        # The norm is not the only one that reads this.
        return self.last_norm(y) + y + self.narrow(x).sum(1, keepdim=True)


def test_only_what_gains_is_replaced_and_norms_move_where_they_are_alone() -> None:
    model = drawn(Small())
    before = copy.deepcopy(model.state_dict())
    converted = convolutions_to_ghost(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    found = ghosts(converted)
    assert set(found) == {"first.0", "second", "last"}
    first, second, last = found.values()
    assert isinstance(converted.first[1], nn.Identity)
    assert isinstance(converted.norm, nn.Identity)
    assert isinstance(converted.last_norm, nn.BatchNorm2d)
    assert (first.primary.bn.eps, first.cheap.bn.eps) == (1e-3, 1e-3)
    assert isinstance(first.cheap.act, nn.LeakyReLU)
    assert (first.cheap.act.negative_slope, first.cheap.act.inplace) == (0.2, False)
    assert isinstance(second.cheap.act, nn.Hardswish)
    assert not hasattr(last.cheap, "act")
    assert not hasattr(last.primary, "bn")
    assert last.cheap.conv.bias is not None
    x = torch.randn(2, 3, 17, 12, dtype=torch.float64)
    with torch.no_grad():
        assert converted(x).shape == model(x).shape


def test_the_primary_half_starts_from_the_replaced_filters() -> None:
    model = drawn(Small())
    model.second.weight.requires_grad_(False)
    converted = convolutions_to_ghost(model, ratio=3).eval()
    ghost = converted.second
    x = torch.randn(2, 9, 7, 5, dtype=torch.float64)
    with torch.no_grad():
        theirs = model.norm(model.second(x))
        assert torch.allclose(ghost(x)[:, :4], theirs[:, :4], rtol=1e-12)
    # The maps that the cheap convolution makes keep the scales and shifts of those that it stands for.
    assert torch.equal(ghost.cheap.bn.weight, model.norm.weight[4:])
    assert torch.equal(ghost.cheap.bn.bias, model.norm.bias[4:])
    assert not ghost.primary.conv.weight.requires_grad
    assert ghost.cheap.conv.weight.requires_grad
    assert {parameter.dtype for parameter in converted.parameters()} == {torch.float64}


def test_names_are_included_and_excluded_by_pattern() -> None:
    model = Small()
    assert set(ghosts(convolutions_to_ghost(model, include="stem", exclude=["first.*", "last"]))) == {
        "stem",
        "second",
    }
    everything = convolutions_to_ghost(model, include=["squeeze", "narrow", "depthwise"], exclude="depthwise")
    assert set(ghosts(everything)) == {"first.0", "second", "last", "squeeze", "narrow"}
    grouped = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2, bias=False)).double()
    ghost = convolutions_to_ghost(grouped, include="1")[1]
    x = torch.randn(1, 8, 5, 5, dtype=torch.float64)
    # Two filters of each group of four.
    assert torch.allclose(ghost(x)[:, :4], grouped[1](x)[:, [0, 1, 4, 5]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 1}, "ratio is 1; give 2 or more"),
        ({"cheap_kernel_size": 2}, "cheap_kernel_size is 2"),
        (
            {"include": "layer4.*"},
            r"include='layer4.\*' names no convolution; the model's are stem, first.0, ",
        ),
        ({"exclude": ["first.*", "head"]}, "exclude='head' names no convolution"),
        ({"include": "unused"}, "unused cannot be replaced, since it does not run"),
        (
            {"include": "depthwise", "ratio": 2},
            "6 primary channels at ratio 2, which its 12 groups do not divide",
        ),
        (
            {"exclude": ["first.*", "last", "second"]},
            r"Small has no convolution to replace: each of its 8 convolutions .*is excluded \(3\).*include=",
        ),
        (
            {"example_input": torch.zeros(1, 4, 8, 8)},
            r"Small cannot run on the example input \(shape \(1, 4, 8, 8\)\)",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        convolutions_to_ghost(Small(), **arguments)


def test_models_without_anything_to_replace_are_refused() -> None:
    with pytest.raises(InputError, match="Linear has no convolution to replace: it has no nn"):
        convolutions_to_ghost(nn.Linear(3, 4), example_input=torch.zeros(1, 3))
    with torch.device("meta"):
        network = create_model("cghost_vgg16")
    with pytest.raises(InputError, match=r"is part of a ghost module \(26\)"):
        convolutions_to_ghost(network)


class Asking(nn.Sequential):
    """Reads more of its layer than what the layer computes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(self[1].weight.dtype)


def test_a_model_that_asks_its_convolutions_for_more_is_refused() -> None:
    model = Asking(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    with pytest.raises(
        InputError, match=r"Asking does not run with ghost modules \(.*'weight'\): .*; exclude"
    ):
        convolutions_to_ghost(model)
    assert set(ghosts(convolutions_to_ghost(model, exclude="1"))) == {"2"}


def test_shared_layers_stay_shared_and_their_norms_stay_behind() -> None:
    shared = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), shared, nn.BatchNorm2d(4), nn.ReLU(), shared, nn.BatchNorm2d(4))
    converted = convolutions_to_ghost(model)
    assert converted[1] is converted[4]
    assert isinstance(converted[1], GhostConv2d)
    assert isinstance(converted[2], nn.BatchNorm2d)
    assert model[1] is shared


@pytest.mark.parametrize(
    "model",
    [
        timm.create_model("resnet10t", num_classes=5),
        timm.create_model("tf_mobilenetv3_small_minimal_100", num_classes=5),
        timm.models.DenseNet(8, (2, 2), num_classes=5),
    ],
    ids=lambda model: type(model).__name__,
)
def test_timms_models_fold_as_far_as_before_and_train(model: nn.Module) -> None:
    # With norm and activation in one layer, same padding, and norms in front of convolutions.
    converted = convolutions_to_ghost(model, example_input=torch.zeros(1, 3, 64, 64))
    assert sum(p.numel() for p in converted.parameters()) < sum(p.numel() for p in model.parameters())
    assert all(module.training for module in converted.modules())
    loss = converted(torch.randn(2, 3, 64, 64)).square().sum()
    loss.backward()
    assert all(parameter.grad is not None for parameter in converted.parameters())
    converted.eval()
    x = torch.randn(1, 3, 64, 64)
    norms = [count(refold.fold(net, x, prove=False), x).batch_norms for net in (model.eval(), converted)]
    assert norms[0] == norms[1]
    program = torch.export.export(converted, (x,))
    with torch.no_grad():
        assert torch.allclose(program.module()(x), converted(x), atol=1e-5)


def test_a_converted_network_is_saved_and_loaded_by_its_recipe(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return convolutions_to_ghost(create_model("cghost_resnet56", ratio=1, num_classes=3))

    network = build().eval()
    refold.save(network, tmp_path / "net.safetensors")
    again = refold.load(tmp_path / "net.safetensors", architecture=build).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(x), network(x))
