"""The variants of RepGhostNet: the branches of table 7, the missing shortcuts of table 8, attention."""

from functools import partial

import pytest
import torch
from torch import nn

from golden import assert_golden_logits, drawn_weights, golden_input, golden_record, golden_state_dict
from refold.blocks import DFCAttention, GhostBottleneck, RepGhostModule
from refold.errors import InputError
from refold.folding.fold import fold
from refold.models import create_model, load_checkpoint
from refold.recording.cost import count

# Table 7, with the convolutions and batch norms in a module's sum.
VARIANTS = {
    "none": (1, 1),
    "identity": (1, 1),
    "depthwise": (2, 2),
    "batch_norm": (1, 2),
    "depthwise+batch_norm": (2, 3),
    "identity+depthwise+batch_norm": (2, 3),
    "batch_norm+relu": (1, 2),
}


def drawn(**arguments: object) -> nn.Module:
    network = create_model("repghostnet_050", num_classes=5, **arguments).double().eval()
    network.load_state_dict(drawn_weights(network, gain=0.7))
    return network


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_module_sums_the_branches_of_its_variant(variant: str) -> None:
    module = RepGhostModule(6, 8, activation=True, reparameterization=variant).double().eval()
    module.load_state_dict(drawn_weights(module))
    sizes = [
        sum(isinstance(part, kind) for part in module.cheap.modules()) for kind in (nn.Conv2d, nn.BatchNorm2d)
    ]
    assert tuple(sizes) == VARIANTS[variant]
    x = torch.randn(2, 6, 7, 9, dtype=torch.float64)
    primary = module.primary(x)
    spatial = module.cheap.branches[0]
    expected = spatial.bn(spatial.conv(primary))
    if "relu" in variant:
        expected = expected.relu()
    if "depthwise" in variant:
        expected = expected + module.cheap.branches[1](primary)
    if "identity" in variant:
        expected = expected + primary
    if "batch_norm" in variant:
        expected = expected + module.cheap.skip(primary)
    assert torch.allclose(module(x), expected.relu(), rtol=1e-12)
    linear = RepGhostModule(6, 8, activation=False, reparameterization=variant)
    assert not any(isinstance(part, nn.ReLU) for part in linear.modules())


def test_all_variants_but_the_one_with_relu_fold_to_the_same_layers() -> None:
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    shapes = {}
    for variant in VARIANTS:
        module = partial(RepGhostModule, reparameterization=variant)
        block = GhostBottleneck(8, 12, 8, 3, stride=2, squeeze_channels=4, module=module).double().eval()
        block.load_state_dict(drawn_weights(block))
        plain = fold(block, x)
        with torch.no_grad():
            expected = block(x)
            assert (plain(x) - expected).abs().max() <= 1e-9 * expected.std()
        shapes[variant] = [value.shape for value in plain.state_dict().values()]
        norms = [module for module in plain.modules() if isinstance(module, nn.BatchNorm2d)]
        assert len(norms) == ("relu" in variant)
    assert all((shapes[variant] == shapes["batch_norm"]) != ("relu" in variant) for variant in VARIANTS)


@pytest.mark.parametrize("variant", ["", "bn", "none+identity", "identity+identity", "identity+"])
def test_a_variant_that_nobody_knows(variant: str) -> None:
    with pytest.raises(InputError) as raised:
        create_model("repghostnet_050", reparameterization=variant)
    assert str(raised.value).startswith(
        f"reparameterization is {variant!r}; choose 'none', or one or several of"
    )


def test_the_official_names_without_a_batch_norm_branch_load() -> None:
    record = golden_record("repghostnet_0_5x")
    weights = {key: value for key, value in golden_state_dict(record).items() if ".fusion_bn." not in key}
    for variant in ("identity", "none"):
        network = create_model("repghostnet_050", reparameterization=variant)
        loaded = load_checkpoint(network, weights)
        assert (loaded.layout, loaded.missing, loaded.unexpected) == ("official RepGhostNet", (), ())
    # With the batch norm of the default written as an identity, the variant gives the official logits.
    network = create_model("repghostnet_050", reparameterization="identity").double().eval()
    load_checkpoint(network, golden_state_dict(record), strict=False)
    official = create_model("repghostnet_050").double().eval()
    load_checkpoint(official, golden_state_dict(record))
    with torch.no_grad():
        for ours, theirs in zip(modules(network), modules(official), strict=True):
            norm = theirs.cheap.skip
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            spatial = ours.cheap.branches[0]
            # BN(dw(x)) + scale x + shift, where the variant adds x: its kernel's centre takes the difference.
            gain = spatial.bn.weight / (spatial.bn.running_var + spatial.bn.eps).sqrt()
            spatial.conv.weight[:, 0, 1, 1] += (scale - 1) / gain
            spatial.bn.bias += norm.bias - norm.running_mean * scale
        assert_golden_logits(network(golden_input(record)), record, relative=1e-9)


def modules(network: nn.Module) -> list[RepGhostModule]:
    return [module for module in network.modules() if isinstance(module, RepGhostModule)]


@pytest.mark.parametrize("name", ["repghostnet_050", "repghostnet_100", "repghostnet_150", "repghostnet_200"])
def test_without_identity_shortcuts_eleven_additions_are_gone_and_nothing_else(name: str) -> None:
    x = torch.empty(1, 3, 224, 224, device="meta")
    with torch.device("meta"):
        whole, without = create_model(name), create_model(name, identity_shortcuts=False)
    before, after = count(whole, x), count(without, x)
    assert (before.parameters, before.macs) == (after.parameters, after.macs)
    assert before.operators["add"] - after.operators["add"] == 11
    assert {key: count for key, count in before.operators.items() if key != "add"} == {
        key: count for key, count in after.operators.items() if key != "add"
    }
    assert list(whole.state_dict()) == list(without.state_dict())
    kept = [block.shortcut for block in blocks(without) if block.shortcut is not None]
    assert len(kept) == 5
    assert all(isinstance(shortcut, nn.Sequential) for shortcut in kept)


def blocks(network: nn.Module) -> list[GhostBottleneck]:
    return [module for module in network.modules() if isinstance(module, GhostBottleneck)]


def test_a_block_without_its_identity_is_its_main_branch() -> None:
    whole, without = drawn(), drawn(identity_shortcuts=False)
    x = torch.randn(1, 12, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(whole.stages[1][1](x), without.stages[1][1](x) + x)


# The paper's parameters (M) and multiply-accumulates (M).
@pytest.mark.parametrize(
    ("width", "published"), [("100", (4.6, 156)), ("130", (6.3, 254)), ("160", (8.4, 370))]
)
def test_attention_has_the_papers_size_and_sits_where_ghostnetv2_has_it(
    width: str, published: tuple[float, float]
) -> None:
    with torch.device("meta"):
        network = create_model(f"repghostnet_dfc_{width}")
        cost = count(network, torch.empty(1, 3, 224, 224))
        theirs = create_model(f"ghostnetv2_{width}")
    assert round(cost.parameters / 1e6, 1) == published[0]
    assert cost.macs / 1e6 == pytest.approx(published[1], rel=0.005)
    places = [
        [name for name, part in net.named_modules() if isinstance(part, DFCAttention)]
        for net in (network, theirs)
    ]
    assert places[0] == places[1]
    assert len(places[0]) == 14


def test_attention_folds_to_a_network_without_batch_norms() -> None:
    network = create_model("repghostnet_dfc_100", num_classes=5).double().eval()
    network.load_state_dict(drawn_weights(network, gain=0.7))
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    plain = fold(network, x, prove=False)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
    with torch.no_grad():
        expected = network(x)
        assert (plain(x) - expected).abs().max() <= 1e-9 * expected.std()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "arguments",
    [
        {"reparameterization": "identity+depthwise+batch_norm"},
        {"reparameterization": "batch_norm+relu"},
        {"identity_shortcuts": False},
    ],
)
def test_every_variant_trains_and_exports(arguments: dict[str, object]) -> None:
    network = create_model("repghostnet_050", num_classes=3, **arguments)
    network(torch.randn(4, 3, 64, 64)).square().sum().backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
    x = torch.randn(2, 3, 64, 96)
    program = torch.export.export(network.eval(), (x,))
    with torch.no_grad():
        assert torch.allclose(program.module()(x), network(x), atol=1e-6)
    assert network.architecture == {"name": "repghostnet_050", "arguments": {"num_classes": 3, **arguments}}
