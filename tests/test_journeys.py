"""The journeys of docs/journeys.md, run block by block as they stand there."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch import nn

import refold
from refold.training.predicting import network_classifier

PAGE = (Path(__file__).parent.parent / "docs" / "journeys.md").read_text(encoding="utf-8")
NAMES = ["daisy", "rose", "tulip"]
OWN_CLASS = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width=8, num_classes=3):
        super().__init__()
        self.wide = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width))
        self.narrow = nn.Sequential(nn.Conv2d(3, width, 1, 2, bias=False), nn.BatchNorm2d(width))
        self.head = nn.Linear(width, num_classes)

    def forward(self, image):
        return self.head((self.wide(image) + self.narrow(image)).relu().mean(dim=(2, 3)))
"""


def blocks(title: str) -> list[tuple[str, str]]:
    """The language and the text of each block below a heading."""
    section = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    found = re.findall(r"```(sh|python)\n(.*?)```", section, re.DOTALL)
    assert found
    return found


def walk(title: str, folder: Path) -> str:
    """Run all blocks of a journey in a folder; what they print."""
    (folder / "bin").mkdir()
    command = folder / "bin" / "refold"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m refold "$@"\n')
    command.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    printed = ""
    for language, text in blocks(title):
        run = ["sh", "-euc", text] if language == "sh" else [sys.executable, "-c", text]
        done = subprocess.run(run, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, text + done.stdout + done.stderr
        printed += done.stdout
    return printed


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for number, name in enumerate(NAMES):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(12):
            pixels = generator.integers(0, 120, (80, 100, 3), dtype=np.uint8)
            pixels[..., number] += 130
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{index}.jpg")
    return tmp_path


def fine_tuned(randomised: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return randomised(refold.create_model("resnet10t", num_classes=3))


@pytest.mark.slow
def test_photos_to_phone(photos: Path) -> None:
    pytest.importorskip("ncnn")
    printed = walk("Photos to phone", photos)
    answers = [line for line in printed.splitlines() if line.startswith("photos/daisy/0.jpg: ")]
    assert len(answers) == 2

    def shares(line: str) -> dict[str, float]:
        return {name: float(share) for name, share in re.findall(r"(\w+) ([\d.]+)%", line)}

    # The same answer from the run and from the program on the phone.
    assert shares(answers[0]) == pytest.approx(shares(answers[1]), abs=0.2)
    assert (photos / "sheet.png").stat().st_size > 10_000


@pytest.mark.slow
def test_own_class(tmp_path: Path, randomised: Callable[[nn.Module], nn.Module]) -> None:
    (tmp_path / "net.py").write_text(OWN_CLASS)
    space: dict[str, type[nn.Module]] = {}
    exec(OWN_CLASS, space)
    torch.save(randomised(space["Net"](width=16)).state_dict(), tmp_path / "weights.pth")
    walk("Own class", tmp_path)
    assert (tmp_path / "net.onnx").is_file()


@pytest.mark.slow
def test_timm_network(tmp_path: Path, randomised: Callable[[nn.Module], nn.Module]) -> None:
    net = fine_tuned(randomised)
    state = {f"module.{key}": value for key, value in net.state_dict().items()}
    torch.save({"epoch": 9, "state_dict": state}, tmp_path / "finetuned.pth")
    walk("Timm network", tmp_path)
    plain = refold.load(tmp_path / "plain.safetensors")
    refold.verify(net, plain, torch.randn(1, 3, 64, 64))


@pytest.mark.slow
def test_lightning_checkpoint(photos: Path, randomised: Callable[[nn.Module], nn.Module]) -> None:
    class Classifier(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = fine_tuned(randomised)
            self.loss = nn.CrossEntropyLoss(weight=torch.ones(3))

    module = Classifier()
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.strategy.connect(module)
    trainer.save_checkpoint(photos / "epoch=3.ckpt")
    walk("Lightning checkpoint", photos)
    refold.verify(module.model, refold.load(photos / "plain.safetensors"), torch.randn(1, 3, 64, 64))
    assert (photos / "runs" / "more" / "plain.onnx").is_file()


def test_onnx_runtime_alone(photos: Path, randomised: Callable[[nn.Module], nn.Module]) -> None:
    net = fine_tuned(randomised)
    preprocessing = {
        "input_size": [3, 64, 64], "mean": [0.4, 0.5, 0.6], "std": [0.2] * 3, "interpolation": "bicubic",
        "crop_pct": 1.0,
    }  # fmt: skip
    refold.save(net, photos / "net.safetensors", class_names=NAMES, preprocessing=preprocessing)
    net = refold.load(photos / "net.safetensors")
    refold.export(net, photos / "net.onnx", torch.randn(1, 3, 64, 64))
    Image.open(photos / "photos" / "rose" / "1.jpg").crop((0, 0, 80, 80)).save(
        photos / "photo.jpg", quality=98
    )
    (prediction,) = network_classifier(net).predict([photos / "photo.jpg"])
    assert walk("ONNX Runtime alone", photos).strip() == prediction.classes[0][0]
    _, code = blocks("ONNX Runtime alone")[0]
    assert "refold" not in code
    assert "torch" not in code
