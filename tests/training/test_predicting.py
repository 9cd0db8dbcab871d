"""Predictions by name, the same from every form, and images that cannot be read."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from typer.testing import CliRunner

import refold
from refold.cli import app
from refold.errors import InputError
from refold.training.predicting import find_images, network_classifier, onnx_classifier

PREPROCESSING = {
    "input_size": [3, 32, 32], "interpolation": "bicubic", "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.3],
    "crop_pct": 1.0,
}  # fmt: skip
NAMES = ["ant", "bee", "cat", "dog", "elk", "fox"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a run: training form, plain form, ONNX, card; and images, one of them broken."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    net = refold.create_model("resnet10t", num_classes=6)
    torch.nn.init.normal_(net.fc.weight)  # type: ignore[union-attr, arg-type]
    refold.save(net, folder / "training.safetensors", class_names=NAMES, preprocessing=PREPROCESSING)
    example = torch.randn(1, 3, 32, 32)
    plain = refold.fold(refold.load(folder / "training.safetensors"), example)
    refold.save(plain, folder / "plain.safetensors")
    refold.export(plain, folder / "plain.onnx", example)
    card = {"class_names": NAMES, "preprocessing": PREPROCESSING}
    (folder / "card.json").write_text(json.dumps(card))
    generator = np.random.default_rng(0)
    (folder / "album" / "inner").mkdir(parents=True)
    for name in ("a.png", "b.jpg", "inner/c.png"):
        Image.fromarray(generator.integers(0, 255, (50, 40, 3), dtype=np.uint8)).save(folder / "album" / name)
    (folder / "album" / "broken.png").write_bytes(b"no image")
    (folder / "album" / "notes.txt").write_text("no image either")
    return folder


def test_every_form_gives_the_classes_of_the_network(run: Path) -> None:
    net = refold.load(run / "training.safetensors")
    classifiers = [
        network_classifier(net),
        network_classifier(refold.load(run / "plain.safetensors")),
        onnx_classifier(run / "plain.onnx"),
    ]
    transform = create_transform(
        (3, 32, 32), interpolation="bicubic", mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.3), crop_pct=1.0
    )
    path = run / "album" / "a.png"
    with torch.no_grad():
        expected = net(transform(Image.open(path))[None]).softmax(1)[0]
    order = expected.argsort(descending=True).tolist()
    for classifier in classifiers:
        (prediction,) = classifier.predict([path], top=5)
        assert [name for name, _ in prediction.classes] == [NAMES[index] for index in order[:5]]
        shares = [share for _, share in prediction.classes]
        assert shares == pytest.approx(expected[order[:5]].tolist(), rel=1e-3)
        (everything,) = classifier.predict([path], top=99)
        assert sum(share for _, share in everything.classes) == pytest.approx(1, rel=1e-5)


def test_folders_json_and_what_cannot_be_read(run: Path) -> None:
    results = {}
    for file in ("training.safetensors", "plain.onnx"):
        arguments = ["predict", str(run / file), str(run / "album"), str(run / "album" / "b.jpg"), "--json"]
        result = CliRunner().invoke(app, [*arguments, "--top", "2"], catch_exceptions=False)
        described = json.loads(result.stdout)
        assert [Path(entry["image"]).name for entry in described] == [
            "a.png", "b.jpg", "broken.png", "c.png", "b.jpg",
        ]  # fmt: skip
        assert [len(entry["classes"]) for entry in described] == [2, 2, 0, 2, 2]
        assert [entry["error"] is None for entry in described] == [True, True, False, True, True]
        assert "broken.png" in described[2]["error"]
        assert described[1] == described[4]
        results[file] = [[entry["name"] for entry in one["classes"]] for one in described]
    assert results["training.safetensors"] == results["plain.onnx"]
    shown = CliRunner().invoke(app, ["predict", str(run / "plain.safetensors"), str(run / "album")])
    assert shown.exit_code == 0
    assert [line.split(": ")[0] for line in shown.stdout.splitlines()] == [
        str(run / "album" / name) for name in ("a.png", "b.jpg", "inner/c.png")
    ]
    assert "broken.png' cannot be read" in shown.stderr


def test_a_thousand_classes_are_those_of_imagenet(run: Path) -> None:
    net = refold.create_model("resnet10t").eval()
    torch.nn.init.zeros_(net.fc.weight)  # type: ignore[union-attr, arg-type]
    with torch.no_grad():
        net.fc.bias.copy_(torch.eye(1000)[1] * 20)  # type: ignore[union-attr, operator]
    (prediction,) = network_classifier(net).predict([run / "album" / "a.png"], top=1)
    assert prediction.classes[0][0].startswith("goldfish")


def test_what_is_missing_is_said(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"There is no image '.*nothing.png'"):
        find_images([tmp_path / "nothing.png"])
    with pytest.raises(InputError, match="holds no images"):
        find_images([tmp_path])
    with pytest.raises(InputError, match=r"There is no file '.*net.onnx'"):
        onnx_classifier(tmp_path / "net.onnx")
    (tmp_path / "net.onnx").write_bytes((run / "plain.onnx").read_bytes())
    with pytest.raises(InputError, match=r"no readable card.json"):
        onnx_classifier(tmp_path / "net.onnx")
