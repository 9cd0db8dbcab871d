"""The plain networks: golden logits, the official plain sizes, and the official plain checkpoints."""

import pytest
import timm
import torch
from torch import nn

from golden import assert_golden_logits, drawn_weights, golden_input, golden_record, golden_state_dict
from refold.blocks import RepeatedConvNorm
from refold.folding import fold
from refold.models import create_model, load_checkpoint
from refold.recording.cost import count

# Parameters, MACs (M) and activations (M) of the official networks after their own conversion, at 224 pixels.
OFFICIAL_PLAIN_COST = {
    "ghostnetv3_050": (2_853_176, 49.641, 2.276),
    "ghostnetv3_100": (6_147_588, 167.048, 4.550),
    "ghostnetv3_130": (8_948_296, 269.323, 5.895),
    "ghostnetv3_160": (12_377_778, 398.607, 7.229),
    "mobileone_s0": (2_078_504, 275.110, 3.788),
    "mobileone_s1": (4_764_840, 825.057, 6.272),
    "mobileone_s2": (7_808_168, 1298.426, 7.558),
    "mobileone_s3": (10_078_312, 1895.791, 9.132),
    "mobileone_s4": (14_838_352, 2979.270, 11.810),
}


@pytest.mark.parametrize("name", OFFICIAL_PLAIN_COST)
def test_the_plain_form_has_the_official_size(name: str) -> None:
    network = create_model(name)
    plain = fold(network, torch.randn(1, 3, 32, 32), prove=False).to("meta")
    cost = count(plain, torch.empty(1, 3, 224, 224, device="meta"))
    parameters, macs, activations = OFFICIAL_PLAIN_COST[name]
    # The official conversion of GhostNetV3 keeps the norms outside the branches, at one value a channel more.
    assert cost.parameters + channels_outside_branches(network) == parameters
    assert round(cost.macs / 1e6, 3) == macs
    assert round(cost.activations / 1e6, 3) == activations
    assert cost.batch_norms == 0


def channels_outside_branches(network: nn.Module) -> int:
    norms = {name: part for name, part in network.named_modules() if isinstance(part, nn.BatchNorm2d)}
    inside = [f"{name}." for name, part in network.named_modules() if isinstance(part, RepeatedConvNorm)]
    return sum(
        norm.num_features for name, norm in norms.items() if inside and not name.startswith(tuple(inside))
    )


@pytest.mark.parametrize(
    ("name", "official"),
    [
        ("ghostnetv2_100", "ghostnetv2_1.0x"),
        ("ghostnetv3_100", "ghostnetv3_1.0x"),
        ("mobileone_s0", "MobileOne_S0"),
    ],
)
def test_golden_logits_of_the_plain_form(name: str, official: str) -> None:
    record = golden_record(official)
    network = create_model(name).double().eval()
    load_checkpoint(network, golden_state_dict(record))
    plain = fold(network, torch.randn(1, 3, 64, 64, dtype=torch.float64))
    assert plain.fold_report.after.batch_norms == 0
    with torch.no_grad():
        assert_golden_logits(plain(golden_input(record)), record, relative=1e-9)


@pytest.mark.parametrize("name", ["ghostnetv3_050", "mobileone_s1", "repghostnet_050", "repvgg_a0"])
def test_a_converted_checkpoint_loads_into_the_plain_network(name: str) -> None:
    theirs = timm.create_model(name, num_classes=4).double().eval()
    theirs.load_state_dict(drawn_weights(theirs, gain=0.5))
    converted = timm.utils.reparameterize_model(theirs)
    plain = fold(create_model(name, num_classes=4).double(), torch.randn(1, 3, 32, 32).double(), prove=False)
    loaded = load_checkpoint(plain, converted.state_dict())
    assert (loaded.missing, loaded.unexpected) == ((), ())
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = theirs(x)
        assert (plain(x) - expected).abs().max() <= 1e-9 * expected.std()
