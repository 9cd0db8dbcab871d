"""Any staged network with G-Ghost stages: the paper's ResNet-34 from torchvision's, what stays, what is refused."""

import copy

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from golden import drawn_weights
from refold.blocks import BasicBlock, GGhostStage, ResidualBottleneck
from refold.conversion import stages_to_gghost
from refold.errors import InputError
from refold.folding import fold
from refold.models import create_model
from refold.recording.cost import count


def gghost_stages(model: nn.Module) -> dict[str, GGhostStage]:
    return {name: part for name, part in model.named_modules() if isinstance(part, GGhostStage)}


def basic(depth: int = 4) -> nn.Module:
    """Two stages of basic blocks; the second takes the stride and doubles the channels."""
    first = [BasicBlock(8, 8) for _ in range(depth)]
    second = [BasicBlock(8, 16, stride=2, projection=True), *(BasicBlock(16, 16) for _ in range(depth - 1))]
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sequential(*first), nn.Sequential(*second))
    model.double().load_state_dict(drawn_weights(model))
    return model.eval()


def test_torchvisions_resnet34_gets_the_size_of_the_paper() -> None:
    """Table 15; the converter and `gghost_resnet34` come to the same network."""
    x = torch.empty(1, 3, 224, 224, device="meta")
    with torch.device("meta"):
        theirs, ours = torchvision.models.resnet34(), create_model("gghost_resnet34")
        costs = [count(network, x) for network in (stages_to_gghost(theirs), ours)]
        without = count(stages_to_gghost(theirs, mix=0), x)
    for cost in costs:
        assert (cost.parameters, cost.macs, cost.activations) == (14_621_256, 2_289_654_784, 3_299_552)
    assert costs[0].operators == costs[1].operators
    assert round(without.parameters / 1e6, 1) == 14.3


@pytest.mark.parametrize("mix", [0, 1, 2])
@pytest.mark.parametrize("cheap", ["1x1", "5x5", "identity"])
def test_first_and_last_blocks_stay_and_the_others_keep_their_first_channels(cheap: str, mix: int) -> None:
    model = basic()
    before = copy.deepcopy(model.state_dict())
    converted = stages_to_gghost(model, ghost_ratio=0.25, cheap=cheap, mix=mix)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    stages = gghost_stages(converted)
    assert list(stages) == ["1.0", "2.0"]
    x = torch.randn(2, 3, 9, 6, dtype=torch.float64)
    assert converted(x).shape == model(x).shape
    for stage, original in zip(stages.values(), (model[1], model[2]), strict=True):
        kept = (*original[0].parameters(), *original[3].parameters())
        for ours, theirs in zip((*stage.base.parameters(), *stage.end.parameters()), kept, strict=True):
            assert torch.equal(ours, theirs)
        channels = stage.thin_channels
        assert channels == original[0].conv2.conv.out_channels * 3 // 4
        assert len(stage.thin) == 2
        for thin, whole in zip(stage.thin, original[1:3], strict=True):
            assert torch.equal(thin.conv1.conv.weight, whole.conv1.conv.weight[:channels, :channels])
            assert torch.equal(thin.conv2.bn.running_var, whole.conv2.bn.running_var[:channels])
            assert thin.conv1.bn.num_features == channels
    plain = fold(converted, x, prove=False)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in plain.modules())


def test_a_converted_network_of_the_registry_no_longer_says_how_to_build_it() -> None:
    with torch.device("meta"):
        network = create_model("repvgg_a0")
        assert network.architecture["name"] == "repvgg_a0"
        assert not hasattr(stages_to_gghost(network), "architecture")


def test_groups_grow_no_wider_and_depthwise_convolutions_stay_depthwise() -> None:
    blocks = [ResidualBottleneck(24, 24, groups=3, mid_channels=36, squeeze_channels=8) for _ in range(3)]
    (stage,) = gghost_stages(
        stages_to_gghost(nn.Sequential(nn.Sequential(*blocks)), ghost_ratio=0.5)
    ).values()
    conv = stage.thin[0].conv2.conv
    # Half of 36 channels in groups of 12: two groups are the fewest that are no wider.
    assert (conv.in_channels, conv.out_channels, conv.groups) == (18, 18, 2)
    assert stage.thin[0].se.fc1.out_channels == 4
    network = timm.create_model("mobilenetv3_large_100").eval()
    stages = gghost_stages(stages_to_gghost(network))
    assert list(stages) == ["blocks.2.0", "blocks.3.0", "blocks.5.0"]
    for stage in stages.values():
        for block in stage.thin:
            assert block.conv_dw.groups == block.conv_dw.in_channels == block.conv_dw.out_channels


@pytest.mark.parametrize("name", ["regnetx_002", "convnext_atto", "mobilenetv3_large_100"])
def test_timms_networks_train_and_export(name: str) -> None:
    theirs = timm.create_model(name, num_classes=3)
    network = stages_to_gghost(theirs).train()
    assert gghost_stages(network)
    count_of = [sum(parameter.numel() for parameter in model.parameters()) for model in (theirs, network)]
    assert count_of[1] < count_of[0]
    x = torch.randn(2, 3, 64, 64)
    network(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    program = torch.export.export(network.eval(), (x,))
    with torch.no_grad():
        assert torch.allclose(program.module()(x), network(x), atol=1e-5)


def test_a_conversion_keeps_dtype_mode_and_frozen_weights_and_other_stages() -> None:
    model = basic().to(torch.bfloat16).eval()
    model[2].requires_grad_(False)
    converted = stages_to_gghost(model, ["2"])
    assert list(gghost_stages(converted)) == ["2.0"]
    assert {parameter.dtype for parameter in converted.parameters()} == {torch.bfloat16}
    assert not any(module.training for module in converted.modules())
    stage = converted[2][0]
    assert not any(
        parameter.requires_grad for parameter in (*stage.base.parameters(), *stage.thin.parameters())
    )
    assert all(parameter.requires_grad for parameter in (*stage.cheap.parameters(), *stage.mix.parameters()))


class Added(nn.Sequential):
    """Its children do not run one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Halved(nn.Module):
    """A block that states a width of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels // 2, channels, 1)
        self.half = channels // 2

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)[:, : self.half])


def test_layers_are_blocks_where_they_are_named() -> None:
    model = nn.Sequential(nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))))
    with pytest.raises(InputError, match="has no module that runs 3 or more blocks"):
        stages_to_gghost(model)
    assert list(gghost_stages(stages_to_gghost(model, ["0"]))) == ["0.0"]


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8)), "it has 2 blocks"),
        (
            nn.Sequential(*(BasicBlock(8, 8) for _ in range(3)), nn.ReLU()),
            "some of its children have no conv",
        ),
        (Added(*(BasicBlock(8, 8) for _ in range(3))), "it does something else than run its children"),
        (nn.ModuleList(BasicBlock(8, 8) for _ in range(3)), "its children do not run one after the other"),
        (
            nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 6), BasicBlock(6, 6)),
            "change the channels or the size",
        ),
        (nn.Sequential(*(BasicBlock(8, 8, stride=2) for _ in range(3))), "change the channels or the size"),
        (
            nn.Sequential(*(Halved(8) for _ in range(3))),
            "Block 1 of 0 of Sequential, a Halved, cannot be narrowed",
        ),
    ],
)
def test_what_is_no_stage_is_named_with_its_reason(stage: nn.Module, message: str) -> None:
    with pytest.raises(InputError) as raised:
        stages_to_gghost(nn.Sequential(stage), ["0"])
    assert message in str(raised.value)


def test_arguments_that_cannot_be_used() -> None:
    for ratio in (0, 1, -0.5):
        with pytest.raises(InputError, match="ghost_ratio is"):
            stages_to_gghost(basic(), ghost_ratio=ratio)
    with pytest.raises(InputError, match="has no module 'layer1'; it has 0, 1, 2"):
        stages_to_gghost(basic(), ["layer1"])
    with pytest.raises(InputError, match="cheap is '7x7'"):
        stages_to_gghost(basic(), cheap="7x7")
    with pytest.raises(InputError, match="cheap is 'none', but a narrowed block cannot give all channels"):
        stages_to_gghost(basic(), cheap="none")
