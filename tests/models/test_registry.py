"""Names: refold's networks first, timm's behind them, help for the rest, and what a network remembers."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from golden import drawn_weights
from refold.errors import CheckpointError, UnknownModel
from refold.models import ImageClassifier, create_model, default_cfgs, list_models, load_checkpoint


def test_names_are_filtered_as_timm_filters() -> None:
    assert list_models("repghost*t_1?0") == ["repghostnet_100", "repghostnet_130", "repghostnet_150"]
    assert list_models(["repvgg_a*", "ghostnet_?5*"]) == [
        "ghostnet_050",
        "repvgg_a0",
        "repvgg_a1",
        "repvgg_a2",
    ]
    assert list_models("resnet*") == []
    assert list_models("resnet5?", include_timm=True) == sorted(timm.list_models("resnet5?"))
    everything = list_models(include_timm=True)
    assert everything == sorted({*list_models(), *timm.list_models(exclude_filters="refold_*")})
    assert set(default_cfgs) == set(list_models())


def test_refolds_network_comes_first_and_timms_registry_is_untouched() -> None:
    with torch.device("meta"):
        assert isinstance(create_model("repvgg_a0"), ImageClassifier)
        assert not isinstance(timm.create_model("repvgg_a0"), ImageClassifier)
        assert isinstance(create_model("repvgg_a0.rvgg_in1k"), timm.models.ByobNet)
        assert isinstance(create_model("resnet18", num_classes=3), timm.models.ResNet)


@pytest.mark.parametrize("name", list_models())
def test_timm_has_each_network_under_refolds_prefix(name: str) -> None:
    assert timm.is_model(f"refold_{name}")
    with torch.device("meta"):
        network = timm.create_model(f"refold_{name}", num_classes=3, in_chans=1)
    assert isinstance(network, ImageClassifier)
    assert network.architecture == {"name": name, "arguments": {"num_classes": 3, "in_chans": 1}}


def test_timm_builds_refolds_backbones_and_keeps_its_own_names() -> None:
    backbone = timm.create_model("refold_ghostnet_050", features_only=True, out_indices=(1, 3))
    assert backbone.feature_info.reduction() == [4, 16]
    assert [feature.shape[1] for feature in backbone(torch.randn(1, 3, 64, 64))] == [12, 56]
    for name in list_models():
        if timm.is_model(name):
            assert timm.model_entrypoint(name).__module__.startswith("timm.models.")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("repvg_a0", "'repvg_a0'; the nearest names are repvgg_a0"),
        ("repghostnet_1_0x", "repghostnet_100"),
        ("resnet5", "resnet5"),
        ("RepVGG_A0", "repvgg_a0"),
        ("", "list_models"),
        ("resnet50.mine", "resnet50 has no weights tagged 'mine'; there are resnet50.a1_in1k"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, expected: str) -> None:
    with pytest.raises(UnknownModel) as raised:
        create_model(name)
    assert expected in str(raised.value)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("repghostnet_050", {"num_classes": 3, "in_chans": 1, "drop_rate": 0.1, "global_pool": "max"}),
        ("ghostnet_050", {"features_only": True, "out_indices": (0, 2)}),
        ("resnet18", {"num_classes": 3, "act_layer": "silu"}),
        ("mobilenetv3_small_050", {"features_only": True, "out_indices": (1, 3)}),
    ],
)
def test_a_network_remembers_how_to_build_it(name: str, arguments: dict[str, object]) -> None:
    with torch.device("meta"):
        network = create_model(name, **arguments, global_stride=None)
        written = json.loads(json.dumps(network.architecture))
        again = create_model(written["name"], **written["arguments"])
    assert written["name"] == name
    assert written["arguments"] == {k: list(v) if isinstance(v, tuple) else v for k, v in arguments.items()}
    shapes = [[(key, value.shape) for key, value in net.state_dict().items()] for net in (network, again)]
    assert shapes[0] == shapes[1]


def test_where_a_network_runs_is_not_remembered_and_a_class_cannot_be() -> None:
    network = create_model("resnet18", device="meta", num_classes=2)
    assert network.architecture == {"name": "resnet18", "arguments": {"num_classes": 2}}
    assert not hasattr(create_model("resnet18", device="meta", act_layer=nn.SiLU), "architecture")


@pytest.mark.parametrize("name", ["repvgg_b1g2", "ghostnet_130", "efficientnet_lite4"])
def test_weights_that_nobody_published(name: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        create_model(name, pretrained=True)
    assert str(raised.value).startswith(f"No pretrained weights are published for {name}; ")


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("repghostnet_050", "refold.models.pretrained.hub_file"),
        ("resnet18", "timm.models._builder.load_state_dict_from_hf"),
    ],
)
def test_weights_that_cannot_be_fetched(name: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise OSError("The disk is full.\nmore lines")

    monkeypatch.setattr(place, unreachable)
    monkeypatch.setattr("refold.models.pretrained._released_file", unreachable)
    with pytest.raises(CheckpointError) as raised:
        create_model(name, pretrained=True)
    message = str(raised.value)
    assert message.startswith(f"The pretrained weights of {name} could not be loaded")
    assert "(The disk is full); try again, or create the model without pretrained=True" in message
    assert "\n" not in message


def test_an_unknown_keyword_is_not_taken_for_missing_weights() -> None:
    with pytest.raises(TypeError, match="colour"):
        create_model("repghostnet_050", pretrained=True, colour="red")


def test_a_file_serves_as_pretrained_weights_of_a_backbone(tmp_path: Path) -> None:
    network = create_model("ghostnet_050", num_classes=5).eval()
    torch.save({"state_dict": timm.create_model("ghostnet_050").state_dict()}, tmp_path / "weights.pth")
    load_checkpoint(network, tmp_path / "weights.pth", strict=False)
    overlay = {"file": str(tmp_path / "weights.pth")}
    backbone = create_model(
        "ghostnet_050", pretrained=True, features_only=True, pretrained_cfg_overlay=overlay
    )
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(backbone.eval()(x)[-1], network.stages(network.stem(x)))


@pytest.mark.parametrize(
    "name",
    ["repvgg_a0", "ghostnet_100", "ghostnetv2_100", "ghostnetv3_100", "mobileone_s1", "repghostnet_050"],
)
def test_published_weights_are_timms_and_fit(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = timm.create_model(name).eval()
    theirs.load_state_dict(drawn_weights(theirs, gain=0.5))
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    asked = []

    def fetched(location: str, cache_dir: object) -> Path:
        asked.append(location)
        return tmp_path / "model.safetensors"

    monkeypatch.setattr("refold.models.pretrained.hub_file", fetched)
    ours = create_model(name, pretrained=True).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(ours(x), theirs(x), rtol=1e-4, atol=1e-4 * theirs(x).std().item())
        features = create_model(name, pretrained=True, features_only=True).eval()(x)
        assert torch.allclose(ours.final_conv(features[-1]), ours.forward_features(x), rtol=1e-5)
        gray = create_model(name, pretrained=True, in_chans=1, num_classes=5).eval()
        expected = ours.forward_features(x[:, :1].repeat(1, 3, 1, 1))
        distance = (gray.forward_features(x[:, :1]) - expected).abs().max()
        assert distance <= 1e-4 * expected.abs().max()
    assert set(asked) == {timm.models.get_pretrained_cfg(name).hf_hub_id}
    assert gray.get_classifier().out_features == 5
    assert "pretrained" not in ours.architecture["arguments"]
