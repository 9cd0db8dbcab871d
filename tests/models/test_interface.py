"""timm's interface on refold's networks: what timm's users and scripts call must work here too."""

import copy
import pickle

import pytest
import timm
import torch
from torch import fx, nn

from refold.errors import InputError
from refold.models import create_model, list_models

# The sizes of images other than 224.
SIZES = {
    "cghost_net_b": 192,
    "cghost_resnet56": 32,
    "cghost_vgg16": 32,
    "gghost_resnet56": 32,
    "mobilenetv4_large": 384,
    "mobilenetv4_medium": 256,
    "repvgg_d2se": 320,
}
SMALL = ["repvgg_a0", "ghostnet_050", "ghostnetv3_050", "mobileone_s1", "repghostnet_050"]


@pytest.mark.parametrize("name", SMALL)
def test_sizes_that_the_network_states_are_those_of_its_outputs(name: str) -> None:
    network = create_model(name, num_classes=7, drop_rate=0.3).eval()
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        features = network.forward_features(x)
        assert features.shape == (2, network.num_features, 2, 3)
        hidden = network.forward_head(features, pre_logits=True)
        assert hidden.shape == (2, network.head_hidden_size)
        logits = network.forward_head(features)
        assert torch.equal(logits, network(x))
        assert torch.equal(logits, network.get_classifier()(hidden))
    assert logits.shape == (2, network.num_classes)
    assert (network.num_classes, network.in_chans, network.drop_rate) == (7, 3, 0.3)


@pytest.mark.parametrize("name", list_models())
def test_features_are_those_of_strides_2_to_32(name: str) -> None:
    with torch.device("meta"):
        network = create_model(name, features_only=True)
        features = network(torch.empty(2, 3, 64, 96))
    strides = [2, 4, 8, 16, 32]
    if name.startswith("repnext"):
        strides = strides[1:]
    elif network.pretrained_cfg["input_size"] == (3, 32, 32):
        strides = [1, 2, 4, 8, 16] if "vgg" in name else [1, 2, 4]
    assert network.feature_info.reduction() == strides
    assert [feature.shape[1] for feature in features] == network.feature_info.channels()
    assert [tuple(feature.shape[2:]) for feature in features] == [
        (64 // stride, 96 // stride) for stride in network.feature_info.reduction()
    ]


def test_features_are_the_networks_own_maps() -> None:
    network = create_model("repghostnet_050").eval()
    features = create_model("repghostnet_050", features_only=True, out_indices=(1, 4)).eval()
    features.load_state_dict(
        {
            key.replace("stages.", "stages_", 1): value
            for key, value in network.state_dict().items()
            if key.startswith(("stem", "stages"))
        }
    )
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        at_4, at_32 = features(x)
        y = network.stages[:2](network.stem(x))
        assert torch.equal(at_4, y)
        assert torch.equal(at_32, network.stages[2:](y))
        assert torch.equal(network.final_conv(at_32), network.forward_features(x))


def test_feature_channels_at_width_1_are_the_papers() -> None:
    with torch.device("meta"):
        network = create_model("ghostnet_100", features_only=True)
    assert network.feature_info.channels() == [16, 24, 40, 112, 160]


@pytest.mark.parametrize("name", SMALL)
def test_reset_classifier(name: str) -> None:
    network = create_model(name, num_classes=7).eval()
    x = torch.randn(1, 3, 32, 32)
    hidden = network.forward_head(network.forward_features(x), pre_logits=True)
    network.double().reset_classifier(5)
    assert network.get_classifier().weight.dtype == torch.float64
    assert network(x.double()).shape == (1, 5)
    network.float().reset_classifier(0)
    assert isinstance(network.get_classifier(), nn.Identity)
    assert torch.allclose(network(x), hidden, atol=1e-6)
    network.reset_classifier(0, "")
    assert network(x).shape[2:] == network.forward_features(x).shape[2:]
    network.reset_classifier(4, "max")
    pooled = network.forward_features(x).amax((2, 3), keepdim=True)
    assert torch.allclose(network(x), network.forward_head(pooled))
    assert network.num_classes == 4
    assert network.architecture["arguments"] == {"num_classes": 4, "global_pool": "max"}
    assert not any(module.training for module in network.modules())


@pytest.mark.parametrize("name", SMALL)
def test_other_inputs(name: str) -> None:
    gray = create_model(name, in_chans=1, num_classes=0).eval()
    for height, width in [(32, 32), (97, 61), (224, 33), (8, 8), (1, 1)]:
        with torch.no_grad():
            assert gray(torch.randn(1, 1, height, width)).shape == (1, gray.head_hidden_size)


@pytest.mark.parametrize("name", SMALL)
def test_dropout_acts_in_training_alone(name: str) -> None:
    network = create_model(name, drop_rate=0.9, num_classes=0).eval()
    features = network.forward_features(torch.randn(1, 3, 32, 32)).relu() + 1
    assert torch.equal(network.forward_head(features), network.forward_head(features))
    kept = network.train().forward_head(features)
    assert 0.02 < (kept != 0).float().mean() < 0.3


def test_default_dropout_is_the_official_one() -> None:
    with torch.device("meta"):
        assert create_model("repvgg_a0").drop_rate == 0
        assert create_model("ghostnet_050").drop_rate == 0.2
        assert create_model("repghostnet_050").drop_rate == 0.2


@pytest.mark.parametrize("name", SMALL)
def test_every_weight_is_trained_and_checkpointing_changes_nothing(name: str) -> None:
    network = create_model(name, num_classes=3, drop_rate=0).double()
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    gradients = []
    for enable in (False, True):
        twin = copy.deepcopy(network)
        twin.set_grad_checkpointing(enable)
        twin(x).square().sum().backward()
        gradients.append({key: parameter.grad for key, parameter in twin.named_parameters()})
    for key, gradient in gradients[0].items():
        assert gradient is not None, key
        assert gradient.abs().sum() > 0, key
        assert torch.allclose(gradient, gradients[1][key]), key


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [(32, 32), (72, 40)])
def test_one_step_of_training_without_warnings(name: str, size: tuple[int, int]) -> None:
    network = create_model(name, num_classes=3)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1)
    before = {key: parameter.detach().clone() for key, parameter in network.named_parameters()}
    loss = nn.functional.cross_entropy(network(torch.randn(2, 3, *size)), torch.tensor([0, 2]))
    loss.backward()
    optimiser.step()
    moved = [not torch.equal(parameter, before[key]) for key, parameter in network.named_parameters()]
    assert sum(moved) > 0.9 * len(moved)


@pytest.mark.parametrize("name", SMALL)
def test_a_network_exports_with_any_batch(name: str) -> None:
    network = create_model(name, num_classes=3).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(network, (torch.randn(2, 3, 64, 96),), dynamic_shapes=({0: batch},))
    x = torch.randn(3, 3, 64, 96)
    with torch.no_grad():
        assert torch.allclose(exported.module()(x), network(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_tracing_pickling_and_copying_keep_the_function(name: str) -> None:
    network = create_model(name, num_classes=3).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        y = network(x)
        assert torch.equal(fx.symbolic_trace(network)(x), y)
        assert torch.equal(copy.deepcopy(network)(x), y)
        assert torch.equal(pickle.loads(pickle.dumps(network))(x), y)


@pytest.mark.parametrize("name", SMALL)
def test_layer_wise_rates_see_every_block_in_order(name: str) -> None:
    with torch.device("meta"):
        network = create_model(name)
    groups = timm.models.group_parameters(network, network.group_matcher())
    stem, *blocks = [names for _, names in sorted(groups.items())]
    assert all(key.startswith("stem.") for key in stem)
    assert sum(map(len, groups.values())) == len(list(network.parameters()))
    depth = sum(len(stage) for stage in network.stages)
    assert len(blocks) >= depth
    # What follows the last block, its head apart, counts to it.
    *blocks, last = blocks[:depth]
    for names in blocks:
        assert len({tuple(key.split(".")[:3]) for key in names}) == 1
    assert {key.split(".")[0] for key in last} <= {"stages", "final_conv", "head"}


@pytest.mark.parametrize("name", list_models())
def test_preprocessing_is_stated(name: str) -> None:
    with torch.device("meta"):
        network = create_model(name)
    cfg = network.pretrained_cfg
    size = SIZES.get(name, 224)
    if size == 32:
        assert (cfg["num_classes"], network.num_classes) == (10, 10)
    else:
        assert cfg["mean"] == (0.485, 0.456, 0.406)
        assert cfg["std"] == (0.229, 0.224, 0.225)
    assert cfg["architecture"] == name
    assert cfg["input_size"] == (3, size, size)
    data = timm.data.resolve_model_data_config(network)
    assert data["input_size"] == cfg["input_size"]
    for first in cfg["first_conv"]:
        assert network.get_submodule(first).in_channels == 3
    assert network.get_submodule(cfg["classifier"]) is network.get_classifier()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": -1}, "num_classes is -1"),
        ({"in_chans": 0}, "in_chans is 0"),
        ({"drop_rate": 1.0}, "drop_rate is 1.0"),
        ({"global_pool": "average"}, "global_pool is 'average'; choose one of 'avg', 'max', 'avgmax', ''"),
        ({"global_pool": ""}, "give num_classes=0"),
    ],
)
@pytest.mark.parametrize("name", SMALL)
def test_arguments_that_cannot_be_used(name: str, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as raised:
        create_model(name, **arguments)
    assert message in str(raised.value)


def test_a_reset_that_cannot_be_done_changes_nothing() -> None:
    network = create_model("ghostnet_050", num_classes=3)
    with pytest.raises(InputError, match="num_classes=0"):
        network.reset_classifier(5, "")
    assert (network.num_classes, network.get_classifier().out_features) == (3, 3)
