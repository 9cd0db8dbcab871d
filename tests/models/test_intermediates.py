"""timm's interface to the maps on the way: which, where it ends, and a network cut down to them."""

import pytest
import torch
from timm.models._features import FeatureGetterNet

from refold.errors import InputError
from refold.folding import fold
from refold.models import ImageClassifier, create_model, list_models

# A stem that is a feature and one that is none; two heads; a family without stride 2.
SMALL = ["repvgg_a0", "ghostnet_050", "repnext_u3_t"]
X = torch.randn(1, 3, 64, 64)


def built(name: str, **arguments: object) -> ImageClassifier:
    torch.manual_seed(0)
    return create_model(name, num_classes=3, **arguments).eval()


@torch.no_grad()
@pytest.mark.parametrize("name", SMALL)
def test_intermediates_are_those_of_a_backbone_and_end_in_the_features(name: str) -> None:
    network, backbone = built(name), built(name, features_only=True)
    network.set_grad_checkpointing()
    final, maps = network.forward_intermediates(X)
    assert torch.equal(final, network.forward_features(X))
    backbone.load_state_dict(
        {
            key.replace("stages.", "stages_", 1): value
            for key, value in network.state_dict().items()
            if key.startswith(("stem", "stages"))
        }
    )
    assert all(torch.equal(found, expected) for found, expected in zip(maps, backbone(X), strict=True))
    count = len(maps)
    for indices, kept in ((1, [count - 1]), (2, [count - 2, count - 1]), ([0, -2], [0, count - 2])):
        only = network.forward_intermediates(X, indices=indices, intermediates_only=True)
        assert all(torch.equal(found, maps[index]) for found, index in zip(only, kept, strict=True))
        for stop_early in (False, True):
            end, found = network.forward_intermediates(X, indices=indices, stop_early=stop_early)
            stopped = stop_early and kept[-1] < count - 1
            assert torch.equal(end, found[-1] if stopped else final)


@torch.no_grad()
@pytest.mark.parametrize("indices", [[0], [1, 2], 1])
@pytest.mark.parametrize("name", SMALL)
def test_a_network_is_cut_down_to_the_maps_that_are_asked_for(name: str, indices: list[int] | int) -> None:
    network = built(name)
    expected = network.forward_intermediates(X, indices=indices, intermediates_only=True)
    kept = network.prune_intermediate_layers(indices)
    assert kept == (indices if isinstance(indices, list) else [len(network.feature_info) - 1])
    final, found = network.forward_intermediates(X, indices=kept)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(final, expected[-1])
    assert torch.equal(network(X), expected[-1])
    assert network.num_features == network.head_hidden_size == expected[-1].shape[1]
    assert not hasattr(network, "architecture")
    network.reset_classifier(7, "avg")
    assert network(X).shape == (1, 7)


def test_a_network_whose_head_is_kept_is_whole() -> None:
    network = built("ghostnet_050")
    expected = network(X)
    assert network.prune_intermediate_layers(1, prune_head=False) == [4]
    assert torch.equal(network(X), expected)


@torch.no_grad()
def test_a_folded_network_has_intermediates_too() -> None:
    network = built("ghostnet_050").double()
    x = X.double()
    plain = fold(network, x, prove=False)
    for found, expected in zip(
        plain.forward_intermediates(x, intermediates_only=True),
        network.forward_intermediates(x, intermediates_only=True),
        strict=True,
    ):
        assert (found - expected).abs().max() <= 1e-9 * expected.abs().max()


def test_timms_backbone_of_intermediates_takes_every_family() -> None:
    families = {name.rpartition("_")[0]: name for name in reversed(list_models())}
    assert {"repvgg", "ghostnet", "repnext_u3", "mobilenetv4"} <= set(families)
    with torch.device("meta"):
        for name in families.values():
            network = create_model(name).eval()
            backbone = FeatureGetterNet(network, out_indices=(0, 2))
            maps = backbone(torch.empty(2, 3, 64, 96))
            channels = [network.feature_info[index]["num_chs"] for index in (0, 2)]
            assert [found.shape[1] for found in maps] == channels, name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"indices": [5]}, "indices is [5], but feature index 5 is out of range (0 to 4)"),
        ({"indices": 6}, "indices is 6, but last-n (6) is out of range (1 to 5)"),
        ({"output_fmt": "NHWC"}, "output_fmt is 'NHWC'; these maps are 'NCHW' alone."),
    ],
)
def test_what_does_not_exist(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as raised:
        built("repvgg_a0").forward_intermediates(X, **arguments)
    assert message in str(raised.value)
