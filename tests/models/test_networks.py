"""The networks against the official ones: sizes, golden logits, and timm's networks with the same weights."""

import re

import pytest
import timm
import torch

from golden import (
    assert_golden_logits,
    drawn_weights,
    golden_input,
    golden_record,
    golden_state_dict,
)
from refold.models import create_model, list_models, load_checkpoint
from refold.recording.cost import count

# Parameters, MACs (M) and activations (M) of the official networks in training form at 224 pixels, or at 32.
OFFICIAL_COST = {
    "cghost_net_a": (2_583_660, 42.431, 1.681),
    "cghost_net_b": (2_568_372, 45.849, 1.495),
    "cghost_net_c": (2_144_540, 43.629, 1.947),
    "cghost_net_d": (2_040_208, 42.166, 2.227),
    "cghost_resnet50_s2": (13_953_512, 2151.023, 11.114),
    "cghost_resnet50_s4": (8_151_752, 1181.943, 11.114),
    "cghost_resnet56": (429_882, 63.009, 0.532),
    "cghost_vgg16": (7_650_986, 158.110, 0.277),
    "gghost_regnetx_002": (1_825_440, 130.923, 1.956),
    "gghost_regnetx_004": (2_884_456, 221.246, 2.629),
    "gghost_regnetx_006": (4_029_776, 389.788, 3.485),
    "gghost_regnetx_008": (5_248_328, 528.572, 4.515),
    "gghost_regnetx_016": (7_109_660, 1021.380, 6.610),
    "gghost_regnetx_032": (10_511_000, 1801.746, 8.723),
    "gghost_regnetx_040": (15_726_268, 2228.369, 9.459),
    "gghost_regnetx_064": (17_993_748, 4055.261, 13.662),
    "gghost_regnetx_080": (24_586_928, 4149.668, 10.438),
    "gghost_regnetx_120": (30_627_208, 7377.522, 17.185),
    "gghost_regnetx_160": (32_381_704, 8997.384, 19.545),
    "gghost_regnetx_320": (62_815_448, 17157.779, 27.215),
    "gghost_resnet34": (14_621_256, 2289.655, 3.300),
    "gghost_resnet56": (373_266, 53.736, 0.361),
    "gghostnet_050": (4_009_160, 253.085, 1.558),
    "gghostnet_075": (6_984_836, 602.843, 2.437),
    "gghostnet_100": (10_928_708, 1001.842, 3.114),
    "gghostnet_125": (16_031_112, 1623.933, 3.994),
    "gghostnet_150": (22_051_088, 2246.208, 4.658),
    "ghostnet_050": (2_587_292, 42.328, 1.773),
    "ghostnet_100": (5_182_508, 141.151, 3.544),
    "ghostnet_130": (7_358_820, 227.003, 4.595),
    "ghostnet_170": (11_000_120, 378.009, 6.037),
    "ghostnetv2_050": (2_857_836, 49.641, 2.276),
    "ghostnetv2_100": (6_156_908, 167.048, 4.550),
    "ghostnetv2_130": (8_960_404, 269.323, 5.895),
    "ghostnetv2_160": (12_392_698, 398.607, 7.229),
    "ghostnetv3_050": (3_395_384, 117.528, 6.148),
    "ghostnetv3_100": (8_129_028, 404.128, 12.294),
    "ghostnetv3_130": (12_217_720, 654.843, 15.959),
    "ghostnetv3_160": (17_275_700, 971.575, 19.530),
    "mobileone_s0": (5_293_272, 1051.935, 15.479),
    "mobileone_s1": (4_825_192, 830.062, 9.671),
    "mobileone_s2": (7_884_648, 1304.027, 11.553),
    "mobileone_s3": (10_170_600, 1902.113, 13.849),
    "mobileone_s4": (14_951_248, 2986.802, 17.737),
    "mobilenetv4_large": (32_590_864, 2171.341, 9.293),
    "mobilenetv4_medium": (9_715_512, 827.650, 5.803),
    "mobilenetv4_small": (3_774_024, 186.006, 1.964),
    "plainnet_large": (32_590_864, 2171.341, 9.293),
    "plainnet_medium": (9_715_512, 827.650, 5.803),
    "plainnet_small": (3_774_024, 186.006, 1.964),
    "repghostnet_dfc_100": (4_566_180, 155.590, 4.491),
    "repghostnet_dfc_130": (6_288_612, 252.853, 5.906),
    "repghostnet_dfc_160": (8_366_744, 369.595, 7.142),
    "repghostnetv2_large": (32_590_864, 2171.341, 9.293),
    "repghostnetv2_medium": (9_715_512, 827.650, 5.803),
    "repghostnetv2_small": (3_774_024, 186.006, 1.964),
    "repghost_resnet50_s14": (13_261_992, 2155.392, 15.284),
    "repghost_resnet50_s2": (7_099_752, 1173.775, 11.114),
    "repghostnet_050": (2_313_968, 43.315, 2.021),
    "repghostnet_058": (2_546_388, 59.804, 2.589),
    "repghostnet_080": (3_278_968, 95.519, 3.215),
    "repghostnet_100": (4_073_604, 142.394, 3.980),
    "repghostnet_111": (4_539_984, 170.124, 4.380),
    "repghostnet_130": (5_478_612, 231.124, 5.235),
    "repghostnet_150": (6_575_336, 301.316, 6.000),
    "repghostnet_200": (9_796_124, 515.870, 7.959),
    "repnext_u1_s": (49_906_216, 8609.050, 21.563),
    "repnext_u1_t": (28_432_936, 4409.771, 13.435),
    "repnext_u2_b": (89_239_016, 15513.386, 38.084),
    "repnext_u2_s": (50_709_352, 8802.705, 28.563),
    "repnext_u2_t": (28_825_960, 4528.462, 17.725),
    "repnext_u3_b": (88_769_768, 15392.060, 38.084),
    "repnext_u3_s": (50_357_416, 8711.710, 28.563),
    "repnext_u3_t": (28_653_736, 4472.691, 17.725),
    "repvgg_a0": (9_108_968, 1512.581, 3.588),
    "repvgg_a1": (14_092_264, 2626.488, 4.742),
    "repvgg_a2": (28_210_600, 5685.345, 6.259),
    "repvgg_b0": (15_817_960, 3397.192, 6.147),
    "repvgg_b1": (57_415_016, 13128.090, 10.637),
    "repvgg_b1g2": (45_782_376, 9788.375, 10.637),
    "repvgg_b1g4": (39_966_056, 8118.518, 10.637),
    "repvgg_b2": (89_022_376, 20418.171, 12.895),
    "repvgg_b2g2": (70_846_376, 15199.867, 12.895),
    "repvgg_b2g4": (61_758_376, 12590.715, 12.895),
    "repvgg_b3": (123_085_288, 29120.696, 15.103),
    "repvgg_b3g2": (96_911_848, 21606.339, 15.103),
    "repvgg_b3g4": (83_825_128, 17849.160, 15.103),
    "repvgg_d2se": (133_334_836, 36476.744, 22.956),
}


# Those that the papers' tables need and nobody published: printed parameters (M), MACs (B) and activations (M), where
# there are any (GhostNets, table 17).
OF_TABLES = {"ghostnet_110": None, "regnetx_032_075": (8.8, 1.8, 8.6)}


def test_every_network_has_its_official_cost() -> None:
    assert list_models() == sorted({*OFFICIAL_COST, *OF_TABLES})


def test_three_quarters_of_regnetx_are_those_of_the_paper() -> None:
    with torch.device("meta"):
        cost = count(create_model("regnetx_032_075"), torch.empty(1, 3, 224, 224))
    found = (cost.parameters / 1e6, cost.macs / 1e9, cost.activations / 1e6)
    assert tuple(round(value, 1) for value in found) == OF_TABLES["regnetx_032_075"]


@pytest.mark.parametrize("name", OFFICIAL_COST)
def test_cost_is_the_official_one(name: str) -> None:
    with torch.device("meta"):
        network = create_model(name)
        size = min(224, network.pretrained_cfg["input_size"][1])
        cost = count(network, torch.empty(1, 3, size, size))
    parameters, macs, activations = OFFICIAL_COST[name]
    assert cost.parameters == parameters
    assert round(cost.macs / 1e6, 3) == macs
    assert round(cost.activations / 1e6, 3) == activations


@pytest.mark.parametrize(
    ("name", "official", "layout"),
    [
        ("repvgg_a0", "RepVGG_A0", "official RepVGG"),
        ("repvgg_b1g2", "RepVGG_B1g2", "official RepVGG"),
        ("gghost_regnetx_032", "g_ghost_regnetx_032", "official G-Ghost-RegNetX"),
        ("ghostnet_100", "ghostnet_1.0x", "official GhostNet"),
        ("ghostnetv2_100", "ghostnetv2_1.0x", "official GhostNetV2"),
        ("ghostnetv3_100", "ghostnetv3_1.0x", "official GhostNetV3"),
        ("mobileone_s0", "MobileOne_S0", "timm MobileOne"),
        ("repghostnet_050", "repghostnet_0_5x", "official RepGhostNet"),
        pytest.param("repvgg_d2se", "RepVGG_D2se", "official RepVGG", marks=pytest.mark.slow),
    ],
)
def test_golden_logits(name: str, official: str, layout: str) -> None:
    record = golden_record(official)
    network = create_model(name).double().eval()
    loaded = load_checkpoint(network, golden_state_dict(record))
    assert (loaded.layout, loaded.missing, loaded.unexpected) == (layout, (), ())
    with torch.no_grad():
        assert_golden_logits(network(golden_input(record)), record, relative=1e-9)


@pytest.mark.parametrize(
    "name",
    [
        "repvgg_a0",
        "repvgg_a2",
        "repvgg_b1g4",
        "ghostnet_050",
        "ghostnet_130",
        "ghostnetv2_160",
        "ghostnetv3_050",
        "ghostnetv3_130",
        "mobileone_s0",
        "mobileone_s1",
        "mobileone_s4",
        "repghostnet_058",
        "repghostnet_200",
    ],
)
def test_timms_weights_give_timms_outputs(name: str) -> None:
    theirs = timm.create_model(name).double().eval()
    # With larger weights the sums of GhostNetV3's branches grow until round-off shows.
    theirs.load_state_dict(drawn_weights(theirs, gain=0.5 if name.startswith("ghostnetv3") else 0.7))
    ours = create_model(name).double().eval()
    load_checkpoint(ours, theirs.state_dict())
    x = torch.randn(1, 3, 96, 64, dtype=torch.float64)
    with torch.no_grad():
        features, expected = ours.forward_features(x), theirs.forward_features(x)
        assert (features - expected).abs().max() <= 1e-9 * expected.std()
        logits, expected = ours(x), theirs(x)
        assert (logits - expected).abs().max() <= 1e-9 * expected.std()
        hidden, expected = ours.forward_head(features, pre_logits=True), theirs.forward_head(features, True)
        assert (hidden - expected).abs().max() <= 1e-9 * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "gain", "std", "argmax"),
    [
        ("ghostnetv2_130", 1.0, "1.644", 718),
        ("ghostnetv2_160", 1.0, "2.904", 881),
        ("ghostnetv3_050", 0.7, "515.6", 189),
        ("ghostnetv3_130", 0.7, "463", 563),
        ("ghostnetv3_160", 0.7, "297.6", 881),
        ("mobileone_s1", 0.7, "703.5", 691),
        ("mobileone_s2", 0.7, "270.1", 444),
        ("mobileone_s3", 0.7, "228", 404),
        ("mobileone_s4", 0.7, "0.7782", 566),
    ],
)
def test_drawn_official_weights_give_the_recorded_spread(
    name: str, gain: float, std: str, argmax: int
) -> None:
    with torch.device("meta"):
        shapes = timm.create_model(name).state_dict()
    official = [[_official_key(key), list(value.shape)] for key, value in shapes.items()]
    network = create_model(name).double().eval()
    assert load_checkpoint(network, golden_state_dict({"gain": gain, "keys": official}, "keys")).missing == ()
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        logits = network(x).flatten()
    assert f"{logits.std().item():.4g}" == std
    assert int(logits.argmax()) == argmax


def _official_key(key: str) -> str:
    """The records of MobileOne have timm's names; GhostNetV3's norms of branches are named otherwise in timm."""
    return re.sub(r"(_rpr_(?:conv\.\d|scale))\.bn1\.", r"\1.bn.", key)
