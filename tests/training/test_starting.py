"""What a run starts from: a name, a checkpoint of whatever class count and wrapper, or a network of one's own."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from rich.console import Console
from torch import nn

import refold
from refold.checkpoints import read_card
from refold.errors import CheckpointError, InputError, RecipeError
from refold.targets import open_network
from refold.training.callbacks import Unreadable
from refold.training.images import Images, LabelledImages
from refold.training.recipe import Recipe, load_recipe
from refold.training.run import Settings, resume, train
from refold.training.starting import build_network, preprocessing_for, ready
from refold.training.teacher import teacher_network

NET = """
from torch import nn
from blocks import block

class Net(nn.Module):
    def __init__(self, num_classes=4, width=8, drop_rate=0.0):
        super().__init__()
        self.body, self.drop, self.last = block(width), nn.Dropout(drop_rate), nn.Linear(width, num_classes)

    def forward(self, x):
        return self.last(self.drop(self.body(x).mean((2, 3))))

def fixed():
    return Net(5)

def anything(**arguments):
    return Net(arguments["num_classes"], width=4)
"""
BLOCKS = """
from torch import nn

def block(width):
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
"""


@pytest.fixture
def net(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "blocks.py").write_text(BLOCKS)
    return str(tmp_path / "net.py")


def recipe(**values: Any) -> Recipe:
    return load_recipe("finetune", {"image_size": 32, **values}).recipe


def quiet() -> Console:
    return Console(file=io.StringIO(), width=100)


def body(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value for key, value in model.state_dict().items() if "fc" not in key and "last" not in key}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("classes", [6, 3])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod.model."])
def test_weights_of_any_number_of_classes(classes: int, prefix: str, tmp_path: Path) -> None:
    theirs = timm.create_model("resnet10t", num_classes=classes)
    weights = {f"{prefix}{key}": value for key, value in theirs.state_dict().items()}
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "x.pth")
    said: list[str] = []
    started = build_network("resnet10t", 3, recipe(), tmp_path / "x.pth", say=said.append)
    assert started.get_classifier().out_features == 3  # type: ignore[operator]
    assert same(body(started), body(theirs))
    assert torch.equal(started.fc.weight, theirs.fc.weight) is (classes == 3)  # type: ignore[union-attr]
    assert ("stripped" in said[0]) is bool(prefix)
    with pytest.raises(CheckpointError, match="is not one of repghostnet_050"):
        build_network("repghostnet_050", 3, recipe(), tmp_path / "x.pth")


def test_a_checkpoint_in_the_place_of_the_name(tmp_path: Path) -> None:
    saved = refold.create_model("repghostnet_050", num_classes=6, drop_rate=0.3)
    looks = {"input_size": [3, 64, 64], "mean": [0.1, 0.2, 0.3]}
    refold.save(saved, tmp_path / "training.safetensors", preprocessing=looks)
    for target in (tmp_path, tmp_path / "training.safetensors"):
        started: Any = build_network(str(target), 3, recipe())
        assert same(body(started), body(saved))
        assert preprocessing_for(started, recipe())["mean"] == [0.1, 0.2, 0.3]
        assert started.architecture == {
            "name": "repghostnet_050",
            "arguments": {"num_classes": 3, "drop_rate": 0.3},
        }
    with pytest.raises(InputError, match="is a checkpoint already"):
        build_network(str(tmp_path), 3, recipe(), tmp_path / "training.safetensors")
    plain = refold.fold(saved.eval(), torch.randn(1, 3, 32, 32), prove=False)
    refold.save(plain, tmp_path / "plain.safetensors")
    for target, checkpoint in (
        ("repghostnet_050", tmp_path / "plain.safetensors"),
        (str(tmp_path / "plain.safetensors"), None),
    ):
        with pytest.raises(CheckpointError, match="holds the plain form of repghostnet_050"):
            build_network(target, 3, recipe(), checkpoint)


def test_rates_that_a_network_does_not_have(net: str) -> None:
    for target in ("vgg11", f"{net}:Net"):
        with pytest.raises(
            RecipeError, match=r"'drop_path' is 0.1 .* has no such rate; .*--set drop_path=null"
        ):
            build_network(target, 3, recipe(drop_path=0.1))
    assert build_network(f"{net}:Net", 3, recipe(drop_path=0.0, dropout=0.2)).drop.p == 0.2  # type: ignore[union-attr]
    with pytest.raises(InputError, match=r"repghostnet_050 cannot be built with .*colour='red'"):
        build_network("repghostnet_050", 3, recipe(), model_args=["colour=red"])


def test_a_network_of_ones_own_has_the_classes_of_the_data(net: str) -> None:
    assert build_network(f"{net}:Net", 3, recipe(), model_args=["width=6"]).last.weight.shape == (3, 6)  # type: ignore[union-attr]
    assert build_network(f"{net}:anything", 3, recipe()).last.weight.shape == (3, 4)  # type: ignore[union-attr]
    assert build_network(f"{net}:fixed", 5, recipe()).last.weight.shape == (5, 8)  # type: ignore[union-attr]
    with pytest.raises(InputError, match="answers with 5 numbers and the data has 3 classes"):
        build_network(f"{net}:fixed", 3, recipe())


@pytest.mark.parametrize("unfold", [None, "repvgg"])
def test_a_run_of_a_network_of_ones_own(
    net: str, unfold: str | None, make: Callable[..., Path], tmp_path: Path
) -> None:
    data, target = make({"a": 10, "b": 10, "c": 10}), f"{net}:Net"
    resolved = load_recipe("finetune", {"epochs": 1, "batch_size": 8, "image_size": 32, "ema_decay": 0.9})
    told = Settings(tmp_path / "run", str(data), target, resolved, model_args=["width=6"], unfold=unfold)
    result = train(told, quiet())
    assert result is not None
    assert result.same_answers == result.held_out_images == 6
    assert resume(told.output, quiet()) == result
    for file in ("training.safetensors", "plain.safetensors"):
        card: Any = read_card(told.output / file)
        assert (card.architecture, card.built_from) == (None, target)
        assert (card.arguments["num_classes"], card.arguments["width"]) == (3, 6)
    images = torch.randn(2, 3, 32, 32)
    opened = [open_network(target, told.output, form=form) for form in ("training", "plain")]  # type: ignore[arg-type]
    with torch.no_grad():
        assert torch.allclose(opened[0](images), opened[1](images), rtol=1e-3, atol=1e-5)
    said: list[str] = []
    open_network(target, told.output / "last.ckpt", say=said.append)
    assert "stripped 'average.module.' from their names, which are averaged" in said[0]
    assert json.loads((told.output / "run.json").read_text())["network"] == target
    more: Any = build_network(target, 5, recipe(), told.output / "training.safetensors", ["width=6"])
    assert more.last.out_features == 5
    assert same(body(more), body(opened[0]))


def test_a_teacher_is_named_as_any_model(net: str, tmp_path: Path) -> None:
    model = open_network(f"{net}:Net", arguments={"num_classes": 3})
    refold.save(model, tmp_path / "t.safetensors")
    assert same(teacher_network(f"{net}:Net", tmp_path / "t.safetensors").state_dict(), model.state_dict())
    with pytest.raises(
        InputError, match=r"Nobody publishes weights of .*give its own as --teacher-checkpoint"
    ):
        teacher_network(f"{net}:Net")
    with pytest.raises(CheckpointError, match=rf"--teacher-checkpoint {tmp_path}"):
        teacher_network(str(tmp_path / "t.safetensors"))
    theirs = timm.create_model("resnet10t", num_classes=6)
    torch.save({f"model.{key}": value for key, value in theirs.state_dict().items()}, tmp_path / "t.pth")
    assert same(teacher_network("resnet10t", tmp_path / "t.pth").state_dict(), theirs.state_dict())


def test_a_class_of_which_no_image_can_be_read_is_refused_or_named(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    Image.new("RGB", (8, 8)).save(good)
    bad.write_bytes(b"")
    said = io.StringIO()
    console = Console(file=said, width=200)
    recipe = load_recipe("photos").recipe
    whole = Images([good, good], [0, 1])
    part = Images([good, bad], [0, 1])
    with pytest.raises(
        InputError, match=r"No training image of the class 'b' of 'data' can be read; .*remove the class"
    ):
        ready(
            LabelledImages("data", ["a", "b"], part, whole, True), recipe, Unreadable(console, 9), console, 1
        )
    read = ready(
        LabelledImages("data", ["a", "b"], whole, part, True), recipe, Unreadable(console, 9), console, 1
    )
    assert (len(read.training), len(read.held_out)) == (2, 1)
    assert (
        "No held-out image of the class 'b' can be read: the accuracy says nothing of it." in said.getvalue()
    )
