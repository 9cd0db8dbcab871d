"""torchvision's classifiers have names like all others."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models import get_model

import refold
from refold.errors import InputError, UnknownModel
from refold.models.torchvision_networks import list_torchvision
from refold.targets import open_network

ONE_OF_EACH = (
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet"),
    *("inception_v3", "maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf"),
    *("resnet18", "shufflenet_v2_x1_0", "squeezenet1_0", "swin_t", "swin_v2_t", "vgg11", "vit_b_32"),
)


def test_they_are_listed_where_they_are_asked_for() -> None:
    names = refold.list_models("torchvision/*")
    assert names == sorted(list_torchvision())
    assert {f"torchvision/{name}" for name in ONE_OF_EACH} <= {*names}
    assert not any(name.startswith("torchvision/") for name in refold.list_models(include_timm=True))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_it_has_its_preprocessing_and_the_classes_asked_for(name: str) -> None:
    with torch.device("cpu" if "regnet" in name else "meta"):  # which computes its widths
        network: Any = refold.create_model(f"torchvision/{name}", num_classes=7).eval()
        side = network.pretrained_cfg["input_size"][-1]
        assert network(torch.empty(2, 3, side, side)).shape == (2, 7)
    assert network.architecture == {"name": f"torchvision/{name}", "arguments": {"num_classes": 7}}


def test_it_is_torchvisions_own_network() -> None:
    torch.manual_seed(0)
    ours = refold.create_model("torchvision/shufflenet_v2_x0_5").eval()
    torch.manual_seed(0)
    theirs = get_model("shufflenet_v2_x0_5", weights=None).eval()
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(ours(image), theirs(image))
    assert ours.pretrained_cfg["crop_pct"] == 224 / 256  # type: ignore[index, operator]
    plain = refold.fold(ours, image)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in plain.modules())
    assert plain.fold_report.left == []


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "googlenet", "inception_v3"])
def test_published_weights_are_torchvisions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    full = {"aux_logits": True, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    theirs = get_model(name, weights=None, **full)
    asked = []

    def published(url: str, *_: Any, **__: Any) -> dict[str, torch.Tensor]:
        asked.append(url)
        return theirs.state_dict()

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", published)
    ours = refold.create_model(f"torchvision/{name}", pretrained=True)
    assert asked[0].startswith("https://")
    assert name in asked[0]
    state, known = ours.state_dict(), theirs.state_dict()
    assert state.keys() == {key for key in known if not key.lower().startswith("aux")}
    assert all(torch.equal(state[key], known[key]) for key in state)
    ours = refold.create_model(f"torchvision/{name}", pretrained=True, num_classes=5).eval()
    assert ours(torch.randn(1, 3, 96, 96)).shape == (1, 5)
    other = {
        key
        for key, value in ours.state_dict().items()
        if not torch.equal(value.flatten()[:5], known[key].flatten()[:5])
    }
    assert len({key.rpartition(".")[0] for key in other}) == 1  # the classifier


def test_a_checkpoint_remembers_it(tmp_path: Path) -> None:
    network = refold.create_model("torchvision/shufflenet_v2_x0_5", num_classes=3).eval()
    refold.save(network, tmp_path / "net.safetensors")
    opened = open_network(str(tmp_path / "net.safetensors"))
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(opened(image), network(image))


def test_wrong_names_and_uses_are_said() -> None:
    with pytest.raises(
        UnknownModel, match=r"no classifier named 'resnet188'; the nearest names are torchvision/resnet18"
    ):
        open_network("torchvision/resnet188")
    with pytest.raises(InputError, match="gives no maps of its stages"):
        open_network("dense/torchvision/resnet18")
    with pytest.raises(UnknownModel, match="repghostnet_050"):
        open_network("dense/repghostnet_05")
