"""Networks of timm and torchvision get branches, train, and load back into their own class."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from there_and_back import close, images, train
from torch import nn

import refold
from refold.errors import InputError
from refold.unfolding import original_state_dict, unfold

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def shufflenet() -> nn.Module:
    return torchvision.models.shufflenet_v2_x0_5(weights=None)


def of_timm(name: str) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name)


@pytest.mark.parametrize(
    ("make", "plan", "options"),
    [
        pytest.param(of_timm("mobilenetv2_035"), "ghostnetv3", {"stages": [2]}, id="mobilenetv2"),
        pytest.param(of_timm("resnet18"), "repvgg", {"layers": "layer1.*"}, id="resnet18"),
        pytest.param(shufflenet, "ghostnetv3", {"kinds": ["depthwise"]}, id="shufflenetv2"),
        pytest.param(of_timm("convnext_atto"), "acb", {"stages": [2]}, id="convnext"),
    ],
)
def test_networks_there_and_back(make: Callable[[], nn.Module], plan: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, x = make().double().eval(), images(size=64, batch=2)
    wide = unfold(model, plan, example_input=x[:1], **options)
    with torch.no_grad():
        assert close(model(x), wide(x))
    train(wide, x)
    fresh = make().double().eval()
    fresh.load_state_dict(original_state_dict(wide), strict=True)
    with torch.no_grad():
        assert close(wide(x), fresh(x))


def test_fold_of_a_network_loads_back() -> None:
    torch.manual_seed(0)
    model, x = timm.create_model("mobilenetv2_035").double(), images(size=64, batch=2)
    wide = unfold(model, "ghostnetv3", example_input=x[:1], layers="blocks.[0-1].*")
    train(wide, x)
    plain = refold.fold(wide, x[:1], prove=False)
    assert type(plain) is type(model)
    fresh = timm.create_model("mobilenetv2_035").double().eval()
    fresh.load_state_dict(original_state_dict(plain), strict=True)
    with torch.no_grad():
        assert close(wide(x), fresh(x))


def test_what_folding_lost_is_named() -> None:
    torch.manual_seed(0)
    model, x = timm.create_model("convnext_atto", depths=(1, 1, 1, 1)).double(), images(size=32, batch=2)
    wide = unfold(model, "acb", example_input=x[:1], layers="stages.0.*")
    plain = refold.fold(wide, x[:1], prove=False)
    with pytest.raises(InputError, match=r"'stages.0.blocks.0.*Pass the model that refold.unfold returned"):
        original_state_dict(plain)


# Of each family one; benchmarks/unfold_models.py runs many more, and takes each as it is done here.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if quick else pytest.mark.slow)
        for name, quick in {
            "lcnet_050": True,
            "tf_mobilenetv3_small_100": False,
            "resnet18": False,
            "regnetx_002": False,
            "torchvision/shufflenet_v2_x1_0": False,
            "densenet121": False,
            "mobilevitv2_050": False,
            "ese_vovnet19b_dw": False,
            "repghostnet_050": False,
        }.items()
    ],
)
def test_as_the_table_of_networks_was_made(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    record = import_module("unfold_models").unfold_one(name)
    assert max(record["preserved"], record["returned"], record["folded"]) <= 1e-9
    assert record["moved"] > 1e-6
