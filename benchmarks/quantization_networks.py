"""Small networks of four families for CIFAR-10, trained a few epochs, as int8 files with and without their identities.

    python benchmarks/quantization_networks.py --data FOLDER --output RUNS [--networks small_repvgg ...] [--epochs 3]
        [--rounding-epochs 1]

The folder holds ``train`` and ``test`` with one folder of images a class. Finished runs are kept as they are. 500
training images calibrate, 2,000 test images measure. With ``--rounding-epochs`` the networks also learn rounding, by
the recipe `quantized`, and all test images measure.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from timm.models import register_model
from torch import Tensor, nn

import refold
from refold.blocks import RepVGGBlock
from refold.blocks.branches import BranchSum, repeated_kernels
from refold.files import write_text
from refold.models.classifier import CIFAR10
from refold.models.ghostnet import GhostRow
from refold.models.ghostnetv3 import GhostNetV3
from refold.models.repghostnet import RepGhostNet
from refold.training.recipe import load_recipe
from refold.training.run import Settings, train

RECIPE = {
    "epochs": 3,
    "optimizer": "adamw",
    "learning_rate": 5e-3,
    "weight_decay": 0.05,
    "decay_norms_and_biases": False,
    "schedule": "cosine",
    "milestones": [],
    "warm_up_epochs": 1,
}
# (channels, stride) of each block.
PLAN = ((24, 1), (48, 2), (48, 1), (48, 1), (96, 2), (96, 1), (96, 1))
# Maps of 16 x 16 (the stem), 8 x 8 and 4 x 4.
ROWS = (
    GhostRow("", 0, 3, 24, 32, False, 2),
    GhostRow("", 0, 3, 48, 32, False, 1),
    GhostRow("", 1, 3, 64, 64, True, 2),
    GhostRow("", 1, 3, 96, 64, True, 1),
)


class SmallRepVGG(nn.Module):
    """Seven blocks of RepVGG: images ``(n, 3, 32, 32)`` to logits."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        blocks, channels = [], 3
        for width, stride in PLAN:
            blocks.append(RepVGGBlock(channels, width, stride=stride))
            channels = width
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.blocks(images).mean((2, 3)))
        return logits


class SmallMobileOne(SmallRepVGG):
    """Depthwise 3x3 and 1x1 blocks of MobileOne in turn, each kernel twice."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        blocks: list[nn.Module] = [RepVGGBlock(3, 32)]
        channels = 32
        for width, stride in PLAN[1:]:
            for kernel_size, out, step, groups in ((3, channels, stride, channels), (1, width, 1, 1)):
                branches = partial(BranchSum, kernel_sizes=repeated_kernels(kernel_size, 2))
                blocks.append(RepVGGBlock(channels, out, branches, stride=step, groups=groups))
            channels = width
        self.blocks = nn.Sequential(*blocks)


class SmallRepGhostNet(RepGhostNet):
    """Four bottlenecks for 32 x 32 images."""

    rows = ROWS
    feature_strides = (4, 8)
    stem_channels, final_channels, head_channels = 24, 192, 256


class SmallGhostNetV3(GhostNetV3):
    """Four bottlenecks for 32 x 32 images."""

    rows = ROWS
    feature_strides = (4, 8)
    stem_channels, final_channels, head_channels = 24, 192, 256


def _prepared(net: nn.Module) -> nn.Module:
    net.pretrained_cfg = dict(CIFAR10)  # type: ignore[assignment]  # a plain attribute, as timm sets it
    return net


@register_model
def small_repvgg(pretrained: bool = False, num_classes: int = 10, **_: Any) -> nn.Module:
    return _prepared(SmallRepVGG(num_classes))


@register_model
def small_mobileone(pretrained: bool = False, num_classes: int = 10, **_: Any) -> nn.Module:
    return _prepared(SmallMobileOne(num_classes))


@register_model
def small_repghostnet(pretrained: bool = False, num_classes: int = 10, **_: Any) -> nn.Module:
    return _prepared(SmallRepGhostNet(1.0, num_classes))


@register_model
def small_ghostnet_v3(pretrained: bool = False, num_classes: int = 10, **_: Any) -> nn.Module:
    return _prepared(SmallGhostNetV3(1.0, num_classes))


WAYS: dict[str, dict[str, Any]] = {
    "8 bits": {"keep_identity": "never"},
    "8 bits, identities kept out": {"keep_identity": "always"},
    "7 bits": {"keep_identity": "never", "bits": 7},
    "7 bits, identities kept out": {"keep_identity": "always", "bits": 7},
    "4 bits": {"keep_identity": "never", "bits": 4},
    "4 bits, identities kept out": {"keep_identity": "always", "bits": 4},
    "one scale a tensor": {"keep_identity": "never", "weights": "tensor"},
    "one scale a tensor, identities kept out": {"keep_identity": "always", "weights": "tensor"},
}
ROUNDED: dict[str, dict[str, Any]] = {
    "8 bits": {},
    "one scale a tensor": {"weight_scales": "tensor"},
    "4 bits": {"weight_bits": 4},
}
NETWORKS = ("small_repvgg", "small_mobileone", "small_repghostnet", "small_ghostnet_v3")


def quantised(folder: Path, data: Path, console: Console) -> dict[str, dict[str, Any]]:
    """What each way to quantise a trained network gives, on test images with their classes."""
    net = refold.load(folder / "training.safetensors").eval()
    names = sorted(path.name for path in (data / "test").iterdir())
    images = refold.read_images(data / "train", net, limit=500)
    held_out = torch.cat([refold.read_images(data / "test" / name, net, limit=200) for name in names])
    labels = torch.arange(len(names)).repeat_interleave(200)
    found = {}
    for title, settings in WAYS.items():
        splits = settings["keep_identity"] == "always"
        if splits and len(found) > 1 and not any(each["kept_out"] for each in found.values()):
            continue  # there is none to keep out: the same file again
        report = refold.quantize(
            net,
            folder / "net.int8.onnx",
            images,
            held_out=held_out,
            labels=labels,
            config=refold.QuantizationConfig(**settings),
        )
        facts = {**report.to_dict()["agreement"], "ratio": report.speed.ratio, "ms": report.speed.int8_ms}
        found[title] = {**facts, "kept_out": len(report.kept_out), "gap": report.engine_gap}
        console.print(
            f"{title}: {facts['decibels']:.1f} dB, same {facts['same']}, right {facts['right']} "
            f"(float {facts['float_right']}), {facts['ms']:.3f} ms, {facts['ratio']:.2f} of float32's, "
            f"{len(report.kept_out)} kept out"
        )
    return found


def rounded(folder: Path, data: Path, epochs: int, console: Console) -> dict[str, dict[str, Any]]:
    """What learning with rounding gives a trained network, in each of a few ways."""
    found = {}
    for title, values in ROUNDED.items():
        recipe = load_recipe("quantized", {"epochs": epochs, **values})
        settings = Settings(
            folder / f"rounded_{'_'.join(title.split())}",
            str(data.resolve()),
            str(folder / "training.safetensors"),
            recipe,
            accelerator="cpu",
            keep="last",
        )
        result = train(settings, console, overwrite=True)
        found[title] = {"scores": [result.plain_score, result.onnx_score], "same": result.onnx_same_answers}
        found[title] |= result.int8 or {}
        console.print(title, found[title])
    return found


def main() -> None:
    """Train what is not trained yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/quantization"))
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--epochs", type=int, default=RECIPE["epochs"])
    parser.add_argument("--rounding-epochs", type=int, default=0)
    parser.add_argument("--results", type=Path, default=Path("runs/quantization/cifar.json"))
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=120)
    found = {}
    for name in parsed.networks:
        folder = parsed.output / name
        if not (folder / "training.safetensors").is_file():
            recipe = load_recipe("cifar", {**RECIPE, "epochs": parsed.epochs})
            settings = Settings(
                folder, str(parsed.data.resolve()), name, recipe, accelerator="cpu", keep="last"
            )
            result = train(settings, console)
            console.print(f"{name}: {result.training_score:.4f} {result.plain_score:.4f}")
        console.print(name)
        found[name] = quantised(folder, parsed.data, console)
        if parsed.rounding_epochs:
            found[name] |= {"rounding": rounded(folder, parsed.data, parsed.rounding_epochs, console)}
        write_text(parsed.results, json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
