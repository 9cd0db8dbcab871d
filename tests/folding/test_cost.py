"""Cost counting against the published tables, closed forms and awkward modules."""

import json
from typing import Any

import pytest
import timm
import torch
from timm.models.resnet import Bottleneck
from torch import nn

from refold.errors import InputError
from refold.models import create_model
from refold.recording.cost import Cost, count

# Parameters, MACs (M) and activations (M) of the official networks at 224 pixels.
PUBLISHED = {
    "repvgg_a0": (9_108_968, 1512.581, 3.588),
    "repvgg_b1g4": (39_966_056, 8118.518, 10.637),
    "repvgg_d2se": (133_334_836, 74437.325, 46.822),  # 320 pixels
    "mobileone_s0": (5_293_272, 1051.935, 15.479),
    "ghostnet_100": (5_182_508, 141.151, 3.544),
    "ghostnetv2_100": (6_156_908, 167.048, 4.550),
    "ghostnetv3_100": (8_129_028, 404.128, 12.294),
    "repghostnet_100": (4_073_604, 142.394, 3.980),
}


def on_meta(name: str) -> tuple[nn.Module, torch.Tensor]:
    with torch.device("meta"):
        model = timm.create_model(name)
        return model, torch.empty(1, *model.pretrained_cfg["input_size"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_figures(name: str) -> None:
    cost = count(*on_meta(name))
    parameters, macs, activations = PUBLISHED[name]
    assert cost.parameters == parameters
    assert round(cost.macs / 1e6, 3) == macs
    assert round(cost.activations / 1e6, 3) == activations


def test_meta_equals_cpu_and_inference_mode() -> None:
    model = timm.create_model("ghostnet_050")
    image = torch.randn(1, 3, 64, 64)
    expected = count(model, image)
    with torch.inference_mode():
        assert count(model, image) == expected
    with torch.device("meta"):
        assert count(timm.create_model("ghostnet_050"), torch.empty(1, 3, 64, 64)) == expected


def test_operators_of_repvgg() -> None:
    cost = count(*on_meta("repvgg_a0"))
    # 22 blocks of a 3x3 and a 1x1 convolution; the identity branch, a batch norm, in the 17 of equal shape.
    counts = {"convolution": 44, "linear": 1, "batch norm": 61, "activation": 22, "add": 39, "pooling": 1}
    assert cost.operators == counts
    assert (cost.convolutions, cost.batch_norms, cost.operator_count) == (44, 61, 168)


def test_closed_form_of_a_grouped_strided_convolution() -> None:
    cost = count(nn.Conv2d(8, 12, (3, 5), stride=2, groups=4, padding=(1, 2)), torch.randn(2, 8, 16, 20))
    written = 2 * 12 * 8 * 10
    macs = written * 2 * 15
    assert cost == Cost(12 * 2 * 15 + 12, macs, macs, written, {"convolution": 1})


# Figure 4 of the RepVGG report, and figure 5 for B3g4 and B3: multiplications in 10⁹ where the 3x3 convolutions of
# stride 1 run as Winograd's F(2x2, 3x3), in plain form.
WINOGRAD_REPVGG = {
    "repvgg_a0": 0.7,
    "repvgg_a1": 1.3,
    "repvgg_a2": 2.7,
    "repvgg_b0": 1.6,
    "repvgg_b1": 5.9,
    "repvgg_b1g2": 4.6,
    "repvgg_b1g4": 3.9,
    "repvgg_b2": 9.1,
    "repvgg_b2g4": 6.0,
    "repvgg_b3g4": 8.4,
    "repvgg_b3": 12.9,
}
WINOGRAD_OTHERS = {
    "resnet18": 1.0,
    "resnet34": 1.8,
    "resnet50": 2.8,
    "resnet101": 5.5,
    "resnet152": 8.1,
    "resnext50_32x4d": 4.1,
    "vgg16": 6.9,
}


@pytest.mark.parametrize("name", WINOGRAD_REPVGG)
def test_winograd_multiplications_of_the_report(name: str) -> None:
    with torch.device("meta"):
        # Without its branches the network has the layers of the plain form.
        cost = count(create_model(name, reparameterization="none"), torch.empty(1, 3, 224, 224))
    assert round(cost.winograd_multiplications / 1e9, 1) == WINOGRAD_REPVGG[name]


@pytest.mark.parametrize("name", WINOGRAD_OTHERS)
def test_winograd_multiplications_of_the_reports_baselines(name: str) -> None:
    model, image = on_meta(name)
    if name.startswith("resnet"):
        # The report's 3.9, 7.6 and 11.3 x 10⁹ multiply-accumulates are those of strides in the first 1x1 convolution.
        for block in model.modules():
            if isinstance(block, Bottleneck):
                block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
    image = image[..., :224, :224]
    assert round(count(model, image).winograd_multiplications / 1e9, 1) == WINOGRAD_OTHERS[name]


@pytest.mark.parametrize(
    ("layer", "counts"),
    [
        (nn.Conv2d(4, 6, 3, padding=1), True),
        (nn.Conv2d(4, 6, 3), True),
        (nn.Conv2d(4, 4, 3, groups=4), True),
        (nn.Conv2d(4, 6, 3, stride=2), False),
        (nn.Conv2d(4, 6, 3, stride=(1, 2)), False),
        (nn.Conv2d(4, 6, 3, dilation=2), False),
        (nn.Conv2d(4, 6, (1, 3)), False),
        (nn.Conv2d(4, 6, 5), False),
        (nn.ConvTranspose2d(4, 6, 3), False),
        (nn.Linear(9, 3), False),
    ],
)
def test_what_runs_as_winograd(layer: nn.Module, counts: bool) -> None:
    for device in ("cpu", "meta"):
        cost = count(layer.to(device), torch.zeros(2, 4, 7, 9, device=device))
        assert cost.winograd_multiplications * 9 == cost.macs * (4 if counts else 9)


class Gate(nn.Module):
    """Data-dependent control flow and an in-place start: no tracer sees through it."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)
        self.linear = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, times: int) -> torch.Tensor:
        x = self.act(x)
        for _ in range(times if x.sum() > 0 else 0):
            x = self.linear(x) + x
        return x.view(-1, 2, 2)


def test_untraceable_model_with_several_arguments() -> None:
    x = torch.ones(3, 4) - 2 * torch.eye(3, 4)
    before = x.clone()
    cost = count(Gate(), (x, 2))
    assert torch.equal(x, before)
    assert cost.parameters == 40
    assert cost.macs == 2 * 3 * 16
    assert cost.operators["linear"] == cost.operators["add"] == 2


def test_tied_parameters_count_once_and_calls_count_each() -> None:
    layer = nn.Conv2d(3, 3, 1, bias=False)
    cost = count(nn.Sequential(layer, layer), torch.randn(1, 3, 2, 2))
    assert (cost.parameters, cost.convolutions, cost.macs) == (9, 2, 72)


def test_attention_is_counted_although_a_fused_path_exists() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, dim_feedforward=64, batch_first=True).eval()
    cost = count(layer, torch.randn(2, 5, 32))
    projections = 10 * 32 * (3 * 32 + 32 + 64 + 64)
    assert cost.macs == projections + 2 * (2 * 4 * 5 * 5 * 8)
    assert torch.backends.mha.get_fastpath_enabled()


def test_instance_norm_is_no_batch_norm() -> None:
    model = nn.Sequential(nn.InstanceNorm2d(3), nn.BatchNorm2d(3), nn.GroupNorm(1, 3))
    assert count(model, torch.randn(1, 3, 4, 4)).operators == {"batch norm": 1, "other norm": 2}


def test_state_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout())
    model[1].eval()
    mean = model[1].running_mean.clone()
    count(model, torch.randn(2, 3, 4, 4))
    assert [m.training for m in model.modules()] == [True, True, False, True]
    assert torch.equal(model[1].running_mean, mean)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("example", [torch.randn(1, 4, 8, 8), (torch.randn(1, 3, 8, 8), 1)])
def test_an_input_that_does_not_fit_is_one_sentence(example: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(InputError, match=r"Sequential cannot run on an input of shape \(1, ") as caught:
        count(model, example)
    assert "\n" not in str(caught.value)
    assert model.training


def test_to_dict_is_json() -> None:
    cost = count(nn.Linear(3, 2), torch.randn(1, 3))
    assert Cost(**json.loads(json.dumps(cost.to_dict()))) == cost
