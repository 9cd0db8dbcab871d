"""Every command takes a model by name, as a checkpoint, as a run's folder and as code of the user's own."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import refold
from refold import cli
from refold.checkpoints import read_card

Run = Callable[..., tuple[int, str, str]]

NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes=4, width=8):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.pool, self.last = nn.AvgPool2d(8), nn.Linear(16 * width, num_classes)

    def forward(self, x):
        return self.last(self.pool(self.body(x)).flatten(1))
"""


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run the command in a folder with ``net.py``, an image and a run of its network: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["refold", *map(str, arguments)])
        monkeypatch.setattr(cli.console, "width", 200)
        with pytest.raises(SystemExit) as left:
            cli.main()
        captured = capsys.readouterr()
        return int(left.value.code or 0), captured.out, captured.err

    return run


PREPROCESSING = {
    "input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 1.0,
}  # fmt: skip
SIZE = ("--input-size", "32")


def test_a_class_of_ones_own_in_every_command(call: Run, tmp_path: Path) -> None:
    own = ("net.py:Net", "--model-args", "width=6")
    code, out, err = call("profile", *own, *SIZE, "--num-classes", 3, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["plain"]["parameters"] == 6 * 27 + 6 + 3 * (16 * 6 + 1)
    assert call("unfold", *own, *SIZE, "--plan", "repvgg", "-o", "training.safetensors")[0] == 0
    weights = ("net.py:Net", "--checkpoint", "training.safetensors")
    assert call("fold", *weights, *SIZE, "-o", "plain.safetensors")[0] == 0
    assert call("fold", *weights, *SIZE, "--original", "-o", "back.safetensors")[0] == 0
    for file in ("plain", "back"):
        pair = ("--checkpoint", "training.safetensors", "--checkpoint", f"{file}.safetensors")
        code, out, err = call("verify", "net.py:Net", "net.py:Net", *pair, *SIZE)
        assert (code, err) == (0, "")
        assert f"net.py:Net training and net.py:Net {file} compute the same" in out
        assert (
            json.loads(call("verify", "net.py:Net", "net.py:Net", *pair, *SIZE, "--json")[1])[
                "distance_float64"
            ]
            < 1e-5
        )
    plain = ("net.py:Net", "--checkpoint", "plain.safetensors")
    code, out, _ = call("export", *plain, *SIZE, "-o", "net.onnx", "--json")
    assert (code, json.loads(out)["form"]) == (0, "plain")
    code, out, _ = call(
        "bench", *weights, *SIZE, "--engine", "pytorch", "--rounds", 1, "--warm-up", 0, "--json"
    )
    rows = json.loads(out)["rows"]
    assert (code, len(rows)) == (0, 2)
    assert not any(row.get("error") for row in rows)
    refold.save(refold.load("plain.safetensors", _class()), "plain.safetensors", class_names=list("abcd"),
                preprocessing=PREPROCESSING)  # fmt: skip
    code, out, err = call("predict", plain[0], "image.png", *plain[1:])
    assert (code, err) == (0, "")
    assert re.match(r"image.png: [a-d] \d", out)


def _class() -> Callable[..., torch.nn.Module]:
    from refold.own_code import OwnNetwork

    return OwnNetwork("net.py:Net")


def test_a_runs_folder_in_every_command(call: Run, tmp_path: Path) -> None:
    net = refold.create_model("repghostnet_050", num_classes=3).eval()
    (tmp_path / "run").mkdir()
    looks = {"input_size": [3, 32, 32]}
    refold.save(net, "run/training.safetensors", preprocessing=looks)
    assert call("export", "run", "-o", "net.onnx")[2] == (
        "refold: The folder 'run' holds no plain.safetensors, so it is none of a finished run; give a file.\n"
    )
    refold.save(
        refold.fold(net, torch.randn(1, 3, 32, 32), prove=False), "run/plain.safetensors", preprocessing=looks
    )
    assert "training form" in call("profile", "run", "--json")[1]
    assert call("verify", "run", "run/plain.safetensors")[0] == 0
    assert call("fold", "run", "-o", "plain.safetensors")[0] == 0
    assert call("unfold", "run", "--plan", "repvgg")[0] == 0
    assert json.loads(call("export", "run", "-o", "net.onnx", "--json")[1])["form"] == "plain"
    assert call("predict", "run", "image.png")[0] == 0


def test_models_of_one_name_are_two_rows(call: Run, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        net = refold.create_model("repghostnet_050", num_classes=3).eval()
        refold.save(net, f"{folder}/net.safetensors", preprocessing={"input_size": [3, 32, 32]})
    quick = ("--engine", "pytorch", "--form", "training", "--rounds", 1, "--warm-up", 0, "--json")
    code, out, err = call("bench", "a/net.safetensors", "b/net.safetensors", "./a/net.safetensors", *quick)
    assert code == 0
    assert [row["configuration"]["model"] for row in json.loads(out)["rows"]] == ["a/net", "b/net"]
    assert "'./a/net.safetensors' is given twice and measured once." in err


def test_what_was_stripped_is_said(call: Run, tmp_path: Path) -> None:
    net = refold.create_model("repghostnet_050", num_classes=7)
    torch.save({f"module.model.{key}": value for key, value in net.state_dict().items()}, "x.ckpt")
    code, _, err = call("fold", "repghostnet_050", "--checkpoint", "x.ckpt", *SIZE, "-o", "plain.safetensors")
    assert (code, err) == (0, "refold: x.ckpt: stripped 'module.model.' from their names.\n")
    card = read_card("plain.safetensors")
    assert card is not None
    assert card.arguments == {"num_classes": 7}


def test_mistakes_are_one_sentence_that_names_options_the_command_has(call: Run, tmp_path: Path) -> None:
    net = refold.create_model("repghostnet_050", num_classes=3)
    torch.save(net.state_dict(), "x.pth")
    refold.save(net, "net.safetensors", preprocessing={"input_size": [3, 32, 32]})
    for arguments, message in (
        (("fold", "x.pth", "-o", "p.safetensors"), "name the network and give the file as --checkpoint: repvgg_a0"),
        (("verify", "x.pth", "net.safetensors"), "give the file as --checkpoint"),
        (("fold", "repvgg_a0", "--checkpoint", "x.pth", "-o", "p"), "name the network that it was saved from"),
        (("profile", "repghostnet_050", "--checkpoint", "x.pth", "--num-classes", 5),
         "has 3 classes, but repghostnet_050 has 5; give the number of the checkpoint, 3, or none"),
        (("profile", "resnet10t", "--num-classes", -3), "The number of classes is -3"),
        (("fold", "resnet10t", "--num-classes", 10**13, "-o", "p"), "The number of classes is 1000"),
        (("profile", "net.safetensors", "--num-classes", 5), "(5, 1280); give the arguments that it was saved"),
        (("profile", "net.safetensors", "--input-size", "0"), "The input size '0' is not understood"),
        (("profile", "net.safetensors", "--input-size", "-3"), "The input size '-3' is not understood"),
        (("profile", "net.safetensors", "--input-size", "100000x100000"), "3 x 100000 x 100000 is too large"),
        (("fold", "net.py:Net", "--input-size", "1x1", "-o", "p"), "The network cannot run on an image of 3 x 1 x 1 ("),
        (("bench", "net.py:Net", "--input-size", "1x1"), "The network cannot run on an image of 3 x 1 x 1 ("),
        (("unfold", "net.py:Net", "--input-size", "1x1"), "The network cannot run on an image of 3 x 1 x 1 ("),
        (("export", "net.py:Net", "--input-size", "1x1", "-o", "p.onnx"), "The network cannot run on an image of"),
        (("profile", "net.py:Nett"), "the nearest names are Net"),
        (("profile", "net.py:Net", "--model-args", "wdth=3"), "cannot be built with wdth=3 (TypeError: "),
        (("profile", "net.py:Net", "--model-args", "width"), "--model-args 'width' is not understood"),
        (("profile", "resnet10t", "--model-args", "colour=red"), "resnet10t cannot be built with colour='red'"),
        (("verify", "net.safetensors", "net.py:Net", "--checkpoint", "a", "--checkpoint", "b"), "2 of --checkpoint"),
        (("bench", "net.py:Net", "resnet10t", "--checkpoint", "net.safetensors"), "1 of --checkpoint for 2 named"),
        (("unfold", "net.py:Net", "--pretrained"), "Nobody publishes weights of 'net.py:Net'"),
        (("predict", "net.py:Net", "image.png"), "give its own as --checkpoint"),
        (("fold", "image.png", "-o", "p"), "'image.png' is no checkpoint"),
        (("train", "--data", "digits", "--network", "net.py:Nett"), "the nearest names are Net"),
    ):  # fmt: skip
        code, _, err = call(*arguments)
        assert code == 2, (arguments, err)
        lines = [line for line in err.splitlines() if line.startswith("refold: ")]
        assert len(lines) == 1, err
        assert "Traceback" not in err
        assert message in lines[0], (arguments, err)
        assert "--architecture" not in err
        assert "strict=" not in err
