"""What a text names: a model, a checkpoint, a run's folder, or code of the user's own; and what it is called."""

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import refold
from refold.checkpoints import read_card
from refold.errors import CheckpointError, InputError, RefoldError, UnknownModel
from refold.own_code import OwnNetwork, is_own_code, takes
from refold.targets import distinct_names, model_arguments, open_network, weights_file

NET = """
from torch import nn
from blocks import block

class Net(nn.Module):
    def __init__(self, num_classes=4, width=8, drop_rate=0.0):
        super().__init__()
        self.body = block(width)
        self.drop = nn.Dropout(drop_rate)
        self.last = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.last(self.drop(self.body(x).mean((2, 3))))

def small(num_classes=3):
    return Net(num_classes, width=4)

def text():
    return "no network"

def needy(width):
    return Net(width=width)

number = 3
made = Net()
"""
BLOCKS = """
from torch import nn

def block(width):
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
"""


@pytest.fixture
def net(tmp_path: Path) -> str:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "net.py").write_text(NET)
    (tmp_path / "own" / "blocks.py").write_text(BLOCKS)
    return str(tmp_path / "own" / "net.py")


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    ("target", "is_code"),
    [
        ("net.py:Net", True),
        ("a/b/net.py:Net", True),
        (r"C:\x\net.py:Net", True),
        ("package.module:make", True),
        ("net.py", True),
        ("resnet18", False),
        ("resnet18.a1_in1k", False),
        (r"C:\x\net.safetensors", False),
        ("hf-hub:timm/resnet18", False),
        ("hf_hub:resnet18", False),
        ("local-dir:here", False),
        ("a/net.safetensors", False),
    ],
)
def test_code_is_told_from_models_and_files(target: str, is_code: bool) -> None:
    assert is_own_code(target) is is_code


def test_a_class_and_a_function_build_networks(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built: Any = open_network(f"{net}:Net", arguments={"width": 6})
    assert (type(built).__name__, built.last.in_features, built.training) == ("Net", 6, False)
    assert open_network(f"{net}:small").last.out_features == 3  # type: ignore[union-attr]
    assert takes(OwnNetwork(f"{net}:Net"), "drop_rate")
    assert not takes(OwnNetwork(f"{net}:small"), "drop_rate")
    monkeypatch.chdir(Path(net).parent)
    assert open_network("net.py:small").last.out_features == 3  # type: ignore[union-attr]
    assert open_network("net:small").last.out_features == 3  # type: ignore[union-attr]
    assert type(copy.deepcopy(built)) is type(built)


def test_files_beside_the_file_are_its_own(net: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "net.py").write_text(NET)
    (other / "blocks.py").write_text(BLOCKS.replace("nn.ReLU()", "nn.SiLU()"))
    first, second, again = (open_network(f"{file}:Net") for file in (net, other / "net.py", net))
    assert [type(model.body[2]) for model in (first, second, again)] == [nn.ReLU, nn.SiLU, nn.ReLU]  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Nett", "has no 'Nett'; the nearest names are Net"),
        ("number", "is a int; name a class"),
        ("made", "is a Net; name a class"),
        ("text", "gives a str, not a torch.nn.Module"),
        ("needy", "cannot be built with no arguments (TypeError: needy() missing 1 required"),
        ("", "has no ''"),
    ],
)
def test_what_builds_no_network_is_said(net: str, name: str, message: str) -> None:
    with pytest.raises(InputError) as raised:
        open_network(f"{net}:{name}")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_cannot_be_imported_is_said(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    for code, message in (
        ("1 / 0", "cannot be imported (ZeroDivisionError: division by zero)"),
        (
            "import nothing_of_that_name",
            "cannot be imported (ModuleNotFoundError: No module named 'nothing_of",
        ),
        ("def f(:", "cannot be imported (SyntaxError: "),
        ("raise SystemExit(1)", "cannot be imported (SystemExit: 1)"),
    ):
        broken.write_text(code)
        with pytest.raises(InputError) as raised:
            open_network(f"{broken}:Net")
        assert message in str(raised.value)
    for target, message in (
        (f"{tmp_path}/absent.py:Net", "There is no Python file"),
        ("no_such_package.module:Net", "There is no module 'no_such_package.module' here"),
        (f"{broken}", "give the class in it, too: net.py:Net"),
    ):
        with pytest.raises(InputError, match=message):
            open_network(target)


def test_own_checkpoints_open_with_the_class_and_never_by_themselves(
    net: str, tmp_path: Path, randomised: Callable[[nn.Module], nn.Module]
) -> None:
    torch.manual_seed(0)
    model = randomised(open_network(f"{net}:Net", arguments={"num_classes": 5, "width": 6}))
    x = torch.randn(2, 3, 16, 16)
    wide = refold.unfold(model, "repvgg", example_input=x)
    plain = refold.fold(model, x)
    for form, saved in (("training", model), ("unfolded", wide), ("plain", plain)):
        path = tmp_path / f"{form}.safetensors"
        refold.save(saved, path)
        card: Any = read_card(path)
        assert (card.architecture, card.built_from) == (None, f"{net}:Net")
        assert card.arguments == {"num_classes": 5, "width": 6}
        opened = open_network(f"{net}:Net", path)
        assert same(opened, saved)
        assert torch.equal(opened(x), saved(x))
        with pytest.raises(CheckpointError) as raised:
            open_network(str(path))
        assert f"name its class and give the file as --checkpoint: {net}:Net --checkpoint {path}" in str(
            raised.value
        )
        with pytest.raises(CheckpointError, match=r"give the class.*refold.load\(path, architecture=...\)"):
            refold.load(path)
    torch.save({"state_dict": {f"model.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "x.ckpt")
    said: list[str] = []
    opened = open_network(f"{net}:Net", tmp_path / "x.ckpt", {"num_classes": 5, "width": 6}, say=said.append)
    assert same(opened, model)
    assert said == [
        f"{tmp_path / 'x.ckpt'}: took the weights in 'state_dict', stripped 'model.' from their names."
    ]


def test_a_named_network_that_own_code_changed_has_its_own_name_alone(tmp_path: Path) -> None:
    (tmp_path / "make.py").write_text(
        "import refold\n"
        "from torch import nn\n"
        "def same():\n"
        "    return refold.create_model('resnet10t', num_classes=3)\n"
        "def changed():\n"
        "    model = same()\n"
        "    model.layer1[0].act1 = nn.SiLU()\n"
        "    return model\n"
    )
    path, x = tmp_path / "net.safetensors", torch.randn(1, 3, 64, 64)
    for name, architecture in (("same", "resnet10t"), ("changed", None)):
        target = f"{tmp_path}/make.py:{name}"
        for model in (open_network(target), refold.fold(open_network(target), x, prove=False)):
            refold.save(model, path)
            card: Any = read_card(path)
            assert (card.architecture, card.built_from) == (architecture, None if architecture else target)
            assert torch.equal(open_network(target, path)(x), model(x))


def test_a_network_that_is_one_sequence_keeps_what_is_known_of_it(tmp_path: Path) -> None:
    (tmp_path / "simple.py").write_text(
        "from torch import nn\n"
        "class Simple(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())\n"
        "    def forward(self, x):\n"
        "        return self.layers(x)\n"
    )
    target, path = f"{tmp_path}/simple.py:Simple", tmp_path / "plain.safetensors"
    plain = refold.fold(open_network(target), torch.randn(1, 3, 8, 8))
    refold.save(plain, path, preprocessing={"input_size": [3, 8, 8]})
    opened = open_network(target, path)
    assert same(opened, plain)
    refold.save(opened, path)
    card: Any = read_card(path)
    assert (card.built_from, card.preprocessing) == (target, {"input_size": [3, 8, 8]})


def test_a_runs_folder_stands_for_its_files(tmp_path: Path) -> None:
    model = refold.create_model("repghostnet_050", num_classes=3).eval()
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(InputError, match=r"The folder '.*run' holds no training.safetensors"):
        open_network(str(run))
    refold.save(model, run / "training.safetensors")
    refold.save(refold.fold(model, torch.randn(1, 3, 64, 64), prove=False), run / "plain.safetensors")
    assert weights_file(str(run)) == run / "training.safetensors"
    assert not hasattr(open_network(str(run)), "fold_report")
    assert hasattr(open_network(str(run), form="plain"), "fold_report")


def test_a_folder_of_a_models_name_is_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "repvgg_a0").mkdir()
    monkeypatch.chdir(tmp_path)
    assert weights_file("repvgg_a0") is None


def test_the_state_of_a_run_opens_by_itself(tmp_path: Path) -> None:
    torch.manual_seed(0)
    trained, averaged = (refold.create_model("repghostnet_050", num_classes=3) for _ in range(2))
    state = {
        **{f"net.{key}": value for key, value in trained.state_dict().items()},
        **{f"average.module.{key}": value for key, value in averaged.state_dict().items()},
    }
    torch.save({"state_dict": state, "epoch": 1}, tmp_path / "last.ckpt")
    with pytest.raises(
        CheckpointError, match="does not name its network; name the network and give the file"
    ):
        open_network(str(tmp_path / "last.ckpt"))
    (tmp_path / "run.json").write_text('{"network": "repghostnet_050", "unfold": null}')
    said: list[str] = []
    assert same(open_network(str(tmp_path / "last.ckpt"), say=said.append), averaged)
    assert "took the network's name, repghostnet_050, from run.json beside it" in said[0]
    assert "stripped 'average.module.' from their names, which are averaged" in said[0]
    assert same(open_network("repghostnet_050", tmp_path / "last.ckpt"), averaged)
    names = ["a", "b", "c"]
    refold.save(trained, tmp_path / "training.safetensors", class_names=names, provenance={"epoch": 0})
    opened: Any = open_network(str(tmp_path / "last.ckpt"))
    assert same(opened, averaged)
    assert (opened.card.class_names, opened.card.provenance) == (names, {})
    (tmp_path / "training.safetensors").unlink()
    for network in ("net.py:Net", "hf-hub:a/b", "../x"):
        (tmp_path / "run.json").write_text(f'{{"network": "{network}"}}')
        with pytest.raises(CheckpointError, match="does not name its network"):
            open_network(str(tmp_path / "last.ckpt"))


def test_the_number_of_classes_comes_from_the_file(tmp_path: Path) -> None:
    theirs = timm.create_model("resnet10t", num_classes=6).eval()
    torch.save({f"module.{key}": value for key, value in theirs.state_dict().items()}, tmp_path / "x.pth")
    assert same(open_network("resnet10t", tmp_path / "x.pth"), theirs)
    with pytest.raises(CheckpointError) as raised:
        open_network("resnet10t", tmp_path / "x.pth", {"num_classes": 4})
    assert "has 6 classes, but resnet10t has 4; give the number of the checkpoint, 6, or none" in str(
        raised.value
    )


@pytest.mark.parametrize(
    ("target", "arguments", "message"),
    [
        ("runs/none", {}, "There is no file, run folder or model 'runs/none'"),
        ("resnet18", {"num_classes": -3}, "The number of classes is -3"),
        ("resnet18", {"num_classes": 10**12}, "The number of classes is 1000000000000"),
        ("resnet18", {"num_classes": 2.5}, "The number of classes is 2.5"),
        ("resnet18", {"colour": "red"}, "resnet18 cannot be built with colour='red'"),
        ("absent.safetensors", {}, "There is no checkpoint file 'absent.safetensors'"),
        ("resnet188", {}, "There is no model named 'resnet188'"),
        ("absent.onnx", {}, "There is no file 'absent.onnx'"),
    ],
)
def test_what_names_nothing_is_one_sentence(target: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RefoldError) as raised:
        open_network(target, arguments=arguments)
    assert isinstance(raised.value, InputError | CheckpointError | UnknownModel)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_arguments_are_yaml() -> None:
    assert model_arguments(None) == {}
    given = ["width=0.5", "name=a", "layers=[1, 2]", "deep=true", "none=null"]
    expected = {"width": 0.5, "name": "a", "layers": [1, 2], "deep": True, "none": None}
    assert model_arguments(given) == expected
    for text in ("width", "=3", "a b=3", "x=[1"):
        with pytest.raises(InputError, match="--model-args '"):
            model_arguments([text])


def test_models_are_named_by_what_tells_them_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b", "x/a", "runs/one", "runs/two"):
        os.makedirs(folder)
    files = "plain.safetensors a/plain.safetensors b/plain.safetensors x/a/plain.safetensors a/plain.pth a/other.pth"
    runs = "runs/one/training.safetensors runs/two/training.safetensors"
    for file in (files + " " + runs).split():
        Path(file).touch()
    for targets, names in (
        (["a/plain.safetensors"], ["plain"]),
        (["a/plain.safetensors", "b/plain.safetensors"], ["a/plain", "b/plain"]),
        (["a/plain.safetensors", "a/other.pth"], ["plain", "other"]),
        (["a/plain.safetensors", "a/plain.pth"], ["plain.safetensors", "plain.pth"]),
        (["a/plain.safetensors", "x/a/plain.safetensors"], [f"{tmp_path.name}/a/plain", "x/a/plain"]),
        (["plain.safetensors", "b/plain.safetensors"], [f"{tmp_path.name}/plain", "b/plain"]),
        (["runs/one", "runs/two"], ["one", "two"]),
        (
            ["runs/one/training.safetensors", "runs/two/training.safetensors"],
            ["one/training", "two/training"],
        ),
        (["resnet18", "repvgg_a0.rvgg_in1k"], ["resnet18", "repvgg_a0.rvgg_in1k"]),
        (["a/net.py:Net", "b/net.py:Net", "c:make"], ["a/net.py:Net", "b/net.py:Net", "c:make"]),
        (["a/plain.safetensors", "./a/plain.safetensors"], ["plain", "plain"]),
        (["resnet18", "resnet18"], ["resnet18", "resnet18"]),
    ):
        assert distinct_names(targets) == names
    pair = ["a/plain.safetensors", "b/plain.safetensors"]
    assert distinct_names(["resnet18", "resnet18"], pair) == ["resnet18 a/plain", "resnet18 b/plain"]
    assert distinct_names(["resnet18", "resnet34"], pair) == ["resnet18", "resnet34"]
