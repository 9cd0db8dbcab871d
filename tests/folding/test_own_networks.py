"""Every network of the registry folds to the plain form of its paper."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import refold
from golden import (
    assert_golden_logits,
    drawn_weights,
    golden_input,
    golden_record,
    golden_state_dict,
)
from refold.errors import CheckpointError
from refold.folding import count
from refold.models import create_model, list_models, load_checkpoint

# Parameters and MACs (M) of the official plain networks at 224 pixels.
OFFICIAL_PLAIN = {
    "ghostnet_050": (2_587_292, 42.328),
    "ghostnet_100": (5_182_508, 141.151),
    "ghostnet_130": (7_358_820, 227.003),
    "ghostnetv2_100": (6_156_908, 167.048),
    "ghostnetv2_130": (8_960_404, 269.323),
    "ghostnetv2_160": (12_392_698, 398.607),
    "ghostnetv3_050": (2_853_176, 49.641),
    "ghostnetv3_100": (6_147_588, 167.048),
    "ghostnetv3_130": (8_948_296, 269.323),
    "ghostnetv3_160": (12_377_778, 398.607),
    "mobileone_s0": (2_078_504, 275.110),
    "mobileone_s1": (4_764_840, 825.057),
    "mobileone_s2": (7_808_168, 1298.426),
    "mobileone_s3": (10_078_312, 1895.791),
    "mobileone_s4": (14_838_352, 2979.270),
    "repghostnet_050": (2_306_528, 43.315),
    "repghostnet_058": (2_537_736, 59.804),
    "repghostnet_080": (3_267_112, 95.519),
    "repghostnet_100": (4_058_772, 142.394),
    "repghostnet_111": (4_523_568, 170.124),
    "repghostnet_130": (5_459_316, 231.124),
    "repghostnet_150": (6_553_064, 301.316),
    "repghostnet_200": (9_766_460, 515.870),
    "repvgg_a0": (8_309_384, 1361.451),
    "repvgg_a1": (12_789_864, 2363.967),
    "repvgg_a2": (25_499_944, 5116.952),
    "repvgg_b0": (14_339_048, 3057.601),
    "repvgg_b1": (51_829_480, 11815.485),
    "repvgg_b1g2": (41_360_104, 8809.742),
    "repvgg_b1g4": (36_125_416, 7306.871),
    "repvgg_b2": (80_315_112, 18376.610),
    "repvgg_b2g2": (63_956_712, 13680.136),
    "repvgg_b2g4": (55_777_512, 11331.899),
    "repvgg_b3": (110_960_872, 26208.883),
    "repvgg_b3g2": (87_404_776, 19445.961),
    "repvgg_b3g4": (75_626_728, 16064.500),
    "repvgg_d2se": (120_387_572, 32829.551),
}

# Convolutions of the plain network; those of squeeze-excite and of the head count too. The names are beginnings. The
# kernels of RepUnit1 stay apart: as one kernel they would take more multiply-accumulates. In plainnet_small a 1x1
# convolution that narrows the channels by two meets one that widens them by two: together they cost the same.
PLAIN_CONVOLUTIONS = {
    "cghost_net_a": 82,
    "cghost_net_b": 64,
    "cghost_net_c": 82,
    "cghost_net_d": 100,
    "cghost_resnet50": 105,
    "cghost_resnet56": 110,
    "cghost_vgg16": 27,
    "gghost_regnetx_002": 50,
    "gghost_regnetx_004": 77,
    "gghost_regnetx_006": 62,
    "gghost_regnetx_008": 62,
    "gghost_regnetx_016": 65,
    "gghost_regnetx_032": 86,
    "gghost_regnetx_040": 80,
    "gghost_regnetx_064": 62,
    "gghost_regnetx_080": 80,
    "gghost_regnetx_120": 68,
    "gghost_regnetx_160": 77,
    "gghost_regnetx_320": 80,
    "regnetx_032_075": 80,
    "gghost_resnet34": 44,
    "gghost_resnet56": 64,
    "gghostnet": 99,
    "ghostnet_": 95,
    "ghostnetv2": 137,
    "ghostnetv3": 137,
    "mobilenetv4_small": 46,
    "mobilenetv4_medium": 77,
    "mobilenetv4_large": 102,
    "mobileone": 43,
    "mobileone_s4": 67,
    "plainnet_small": 42,
    "plainnet_medium": 77,
    "plainnet_large": 102,
    "repghost_resnet50": 105,
    "repghostnet_": 95,
    "repghostnet_dfc": 137,
    "repghostnetv2_small": 46,
    "repghostnetv2_medium": 77,
    "repghostnetv2_large": 102,
    "repnext_u1_t": 94,
    "repnext_u1_s": 184,
    "repnext_u2_t": 58,
    "repnext_u3_t": 58,
    "repnext_": 112,
    "repvgg_a": 22,
    "repvgg_b": 28,
    "repvgg_d2se": 144,
}

SMALLEST = (
    "cghost_net_b",
    "cghost_resnet50_s4",
    "cghost_resnet56",
    "cghost_vgg16",
    "gghost_regnetx_002",
    "gghostnet_050",
    "ghostnet_050",
    "ghostnetv2_050",
    "ghostnetv3_050",
    "mobilenetv4_small",
    "mobileone_s0",
    "plainnet_small",
    "regnetx_032_075",
    "repghost_resnet50_s2",
    "repghostnet_050",
    "repghostnetv2_small",
    "repnext_u2_t",
    "repvgg_a0",
)
# Without branches the training form is what the official code calls plain: each norm has its convolution.
LOADED_IN_EITHER_FORM = (
    "regnetx_032_075",
    "gghost_regnetx_002",
    "ghostnet_050",
    "ghostnetv2_050",
    "mobilenetv4_small",
)
WITH_BRANCHES = ("ghostnetv3_050", "mobileone_s0", "repghostnet_050", "repnext_u1_t", "repvgg_a0")


def slow_but(names: tuple[str, ...]) -> list[object]:
    """All networks of the registry, those not in ``names`` marked as slow."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in list_models()]


def drawn(name: str, **arguments: object) -> nn.Module:
    network = create_model(name, **arguments).eval()
    network.load_state_dict(drawn_weights(network, gain=0.7))
    return network


def kept_norm_channels(name: str) -> int:
    """The channels of the batch norms that the official conversion leaves in place, as timm does it too.

    Each holds two values where the bias that it folds into holds one.
    """
    if name.startswith(("repvgg", "mobileone")):
        return 0
    converted = timm.utils.reparameterize_model(timm.create_model(name))
    return sum(module.num_features for module in converted.modules() if isinstance(module, _BatchNorm))


def plain_convolutions(name: str) -> int:
    fitting = [prefix for prefix in PLAIN_CONVOLUTIONS if name.startswith(prefix)]
    assert fitting, f"{name} is in no row of PLAIN_CONVOLUTIONS"
    return PLAIN_CONVOLUTIONS[max(fitting, key=len)]


@pytest.mark.parametrize("name", slow_but(SMALLEST))
def test_every_network_folds_to_the_plain_form_of_its_paper(name: str) -> None:
    network = drawn(name)
    plain = refold.fold(network, torch.randn(1, 3, 32, 32), prove=False)
    assert plain.fold_report.left == []
    assert not any(isinstance(module, _BatchNorm) for module in plain.modules())
    assert isinstance(plain, type(network))
    if name in SMALLEST:
        _tell_the_forms_apart(name, network, plain)
    cost = count(plain.to("meta"), torch.empty(1, 3, 224, 224, device="meta"))
    assert cost.batch_norms == 0
    assert cost.convolutions == plain_convolutions(name)
    if name in OFFICIAL_PLAIN:
        parameters, macs = OFFICIAL_PLAIN[name]
        assert cost.parameters == parameters - kept_norm_channels(name)
        assert round(cost.macs / 1e6, 3) == macs


def _tell_the_forms_apart(name: str, network: nn.Module, plain: nn.Module) -> None:
    """A checkpoint of the other form is named as such or, where all its norms have a place, folded as it loads."""
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(network, plain.state_dict())
    assert f"is in plain (folded) form, but {name} is in training form" in str(raised.value)
    other = copy.deepcopy(plain)
    for value in other.parameters():
        value.data.zero_()
    if name in LOADED_IN_EITHER_FORM:
        load_checkpoint(other, network.state_dict())
        for key, value in other.state_dict().items():
            assert torch.allclose(value, plain.state_dict()[key], rtol=1e-6)
    else:
        with pytest.raises(CheckpointError) as raised:
            load_checkpoint(other, network.state_dict())
        assert f"is in training form, but {name} is in plain (folded) form" in str(raised.value)
    load_checkpoint(other, plain.state_dict())
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in other.state_dict().items())


@pytest.mark.parametrize("name", ["inception_v3", "dpn68"])
def test_norms_of_unknown_networks_are_not_folded_while_they_load(name: str) -> None:
    """Their names tell neither the epsilon nor whether the norm stands before or behind the convolution."""
    network = timm.create_model(name, num_classes=4).eval()
    load_checkpoint(network, drawn_weights(network))
    plain = refold.fold(network, torch.randn(1, 3, 96, 96), prove=False)
    with pytest.raises(CheckpointError, match="is in training form, but "):
        load_checkpoint(plain, network.state_dict())


def test_every_family_is_folded_in_the_quick_tests() -> None:
    assert {name.split("_")[0] for name in SMALLEST} == {name.split("_")[0] for name in list_models()}
    assert set(OFFICIAL_PLAIN) <= set(list_models())


@pytest.mark.slow
def test_the_plain_repnext_has_the_official_size() -> None:
    regular = golden_record("repnext_u3_s")["regular"]
    plain = refold.fold(drawn("repnext_u3_s"), torch.randn(1, 3, 32, 32), prove=False)
    cost = count(plain.to("meta"), torch.empty(1, 3, 224, 224, device="meta"))
    assert (cost.parameters, cost.macs) == (regular["params"], regular["macs"])


@pytest.mark.parametrize("name", WITH_BRANCHES)
def test_outputs_stay_at_sizes_the_fold_has_not_seen(name: str) -> None:
    network = drawn(name, num_classes=10, in_chans=1).double()
    plain = refold.fold(network, torch.randn(1, 1, 32, 32, dtype=torch.float64))
    for batch, height, width in [(2, 64, 32), (1, 61, 47), (3, 33, 64)]:
        x = torch.randn(batch, 1, height, width, dtype=torch.float64)
        with torch.no_grad():
            for method in ("forward_features", "__call__"):
                expected = getattr(network, method)(x)
                assert (getattr(plain, method)(x) - expected).abs().max() <= 1e-9 * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "official"),
    [
        ("repvgg_a0", "RepVGG_A0"),
        ("ghostnet_100", "ghostnet_1.0x"),
        ("repghostnet_050", "repghostnet_0_5x"),
        pytest.param("repvgg_b1g2", "RepVGG_B1g2", marks=pytest.mark.slow),
    ],
)
def test_golden_logits_before_and_after(name: str, official: str) -> None:
    record = golden_record(official)
    x = golden_input(record)
    network = create_model(name).double().eval()
    load_checkpoint(network, golden_state_dict(record))
    plain = refold.fold(network, x)
    with torch.no_grad():
        assert_golden_logits(network(x), record, relative=1e-9)
        assert_golden_logits(plain(x), record, relative=1e-9)
