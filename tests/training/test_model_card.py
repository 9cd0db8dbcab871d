"""The model card states the facts of the run, shows names as they are, and its snippets run."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import refold
from refold.training.exported import exported_classifier
from refold.training.model_card import model_card

PREPROCESSING = {
    "input_size": [3, 32, 32], "interpolation": "bicubic", "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.3],
    "crop_pct": 0.875,
}  # fmt: skip


def a_card(**others: Any) -> dict[str, Any]:
    """A card as a run writes it."""
    names = [
        "README.md", "training.safetensors", "plain.safetensors", "plain.onnx", "fold.json", "fold.svg", "card.json",
        "history.csv", "curves.png",
    ]  # fmt: skip
    return {
        "data": {"title": "my_birds", "training_images": 1200, "held_out_images": 300, "unreadable": 2},
        "settings": {
            "network": "resnet10t", "unfold": "ghostnetv3", "checkpoint": "old.pth", "teacher": None, "seed": 7,
            "recipe": {"name": "finetune", "title": "chosen on the digits", "recipe": {}, "sources": {}},
        },
        "epoch": {"epoch": 9},
        "versions": {"refold": "0.1.0", "torch": "2.15.0"},
        "task": "classify",
        "class_names": ["ant", "b|e*e", "<b>cat</b>"],
        "preprocessing": PREPROCESSING,
        "result": {
            "best": {"epoch": 9, "weights": "averaged"}, "epochs": 12, "score": "accuracy", "training_score": 0.9712,
            "plain_score": 0.9713, "onnx_score": 0.9714, "same_answers": 300, "onnx_same_answers": 299,
            "held_out_images": 300, "unreadable": [], "proof": {"distance_float64": 1.27e-14},
            "export_difference": 3.5e-06, "files": {name: f"run/{name}" for name in names},
        },
        **others,
    }  # fmt: skip


def table_of(page: str) -> dict[str, str]:
    """The rows of all tables by their first cell."""
    return dict(re.findall(r"^\| (.*?) \| (.*?) \|$", page, re.MULTILINE))


def test_the_facts_are_on_the_page() -> None:
    page = model_card(a_card())
    front = yaml.safe_load(page.split("---\n")[1])
    assert front["library_name"] == "refold"
    assert front["pipeline_tag"] == "image-classification"
    (model,) = front["model-index"]
    assert model["results"][0]["metrics"][0]["value"] == 0.9713
    rows = table_of(page)
    assert rows["input"] == "`image`: float32, shape (batch, 3, 32, 32), RGB"
    assert rows["resized"].startswith("the short side to 36 pixels, bicubic")
    assert "mean 0.4, 0.5, 0.6, divided by the standard deviation 0.2, 0.2, 0.3" in rows["range"]
    assert rows["output"].startswith("`output`: float32, shape (batch, 3), logits")
    assert [rows[str(index)] for index in range(3)] == ["ant", r"b\|e\*e", r"\<b\>cat\</b\>"]
    assert rows["data"] == r"my\_birds: 1,200 images to train on, 300 held out, 2 left out as unreadable"
    assert rows["recipe"] == "finetune (chosen on the digits), 12 epochs, seed 7"
    assert rows["kept"] == "epoch 9, its averaged weights"
    assert rows["started from"] == "old.pth"
    assert "teacher" not in rows
    assert rows["versions"] == "refold 0.1.0, torch 2.15.0"
    assert (rows["training"], rows["plain"], rows["ONNX Runtime"]) == (
        "97.12% |",
        "97.13% | 300",
        "97.14% | 299",
    )
    assert "1.3e-14" in page
    assert "3.5e-06" in page
    assert all(f"`{name}`" in rows for name in a_card()["result"]["files"])


def test_names_cannot_break_the_page() -> None:
    card = a_card(class_names=["a\nb", "\x1b[31mred", '"""', "```"])
    card["data"]["title"] = "x: [y\n---\n# no heading"
    page = model_card(card)
    assert "\x1b" not in page
    assert "\n# no heading" not in page
    rows = table_of(page)
    assert [rows[str(index)] for index in range(4)] == [
        r"a\\nb", r"\\x1b\[31mred", '"""', r"\`\`\`",
    ]  # fmt: skip
    front = yaml.safe_load(re.split(r"^---$", page, flags=re.MULTILINE)[1])
    assert front["model-index"][0]["results"][0]["dataset"]["name"] == card["data"]["title"]
    many = model_card(a_card(class_names=[f"class {index}" for index in range(100)]))
    assert "<summary>100 classes</summary>" in many
    assert table_of(many)["99"] == "class 99"


def test_the_snippets_predict_what_refold_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = refold.create_model("resnet10t", num_classes=3)
    torch.nn.init.normal_(net.fc.weight)  # type: ignore[union-attr, arg-type]
    names = ["ant", "bée", 'c"at']
    path = tmp_path / "plain.safetensors"
    refold.save(
        refold.fold(net, torch.rand(1, 3, 32, 32)), path, class_names=names, preprocessing=PREPROCESSING
    )
    refold.export(refold.load(path), tmp_path / "plain.onnx", torch.rand(1, 3, 32, 32))
    pixels = np.random.default_rng(0).integers(0, 255, (51, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg")
    page = model_card(json.loads(json.dumps(a_card(class_names=names))))
    loading, predicting = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (prediction,) = exported_classifier(tmp_path / "plain.onnx").predict([tmp_path / "photo.jpg"])
    expected = [f"{name}: {share:.1%}" for name, share in prediction.classes]
    done = subprocess.run(
        [sys.executable, "-c", predicting], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == expected, done.stderr
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(loading, scope)
    assert scope["network"].card.class_names == names
