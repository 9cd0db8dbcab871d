"""CIFAR-10: a small GhostNetV2 as it is, with GhostNetV3's branches, and with branches and a teacher, over seeds.

    python benchmarks/cifar10.py --data FOLDER --output RUNS --results docs/results/cifar10.json

The folder holds ``train`` and ``test`` with one folder of images a class, or CIFAR-10 as it is distributed. All
networks are trained by ``refold.training`` with one recipe for the same epochs, on all training images; the last epoch
counts, so that the test images choose nothing. Runs are resumed where they were stopped, finished ones are read from
their cards, and the results are written after each. `document_results.py` puts them into ``docs/results.md``.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from timm.models import register_model
from torch import Tensor, nn

from refold.files import make_folder, write_text
from refold.models.classifier import CIFAR10
from refold.models.ghostnet import GhostRow
from refold.models.ghostnetv2 import GhostNetV2
from refold.models.ghostnetv3 import GhostNetV3
from refold.training.recipe import load_recipe
from refold.training.run import Settings, resume, train

SEEDS = (0, 1, 2)
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
TEACHER_EPOCHS = 5
# Maps of 16 x 16 (the stem), 8 x 8 and 4 x 4; channels that vector units like.
ROWS = (
    GhostRow("", 0, 3, 32, 48, False, 2),
    GhostRow("", 0, 3, 96, 48, False, 1, attention=True),
    GhostRow("", 1, 3, 96, 96, True, 2, attention=True),
    GhostRow("", 1, 3, 192, 96, True, 1, attention=True),
)


class SmallGhostNetV2(GhostNetV2):
    """Four bottlenecks for 32 x 32 images."""

    rows = ROWS
    feature_strides = (4, 8)
    stem_channels, final_channels, head_channels = 32, 288, 320


class SmallGhostNetV3(GhostNetV3):
    """The same plan with three repeated convolutions, 1x1 branches and identities."""

    rows = ROWS
    feature_strides = (4, 8)
    stem_channels, final_channels, head_channels = 32, 288, 320


class SmallResNet(nn.Module):
    """Dense 3x3 convolutions at 32, 16 and 8 pixels with two residuals: images ``(n, 3, 32, 32)`` to logits."""

    def __init__(self, num_classes: int, widths: tuple[int, int, int] = (32, 64, 128)) -> None:
        super().__init__()
        first, second, third = widths
        self.stem = _conv(3, first)
        self.down = nn.Sequential(_conv(first, second, 2), _conv(second, third, 2))
        self.middle = _conv(second, second)
        self.last = nn.Sequential(_conv(third, third), _conv(third, third))
        self.fc = nn.Linear(third, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.down[0](self.stem(images))
        x = self.down[1](x + self.middle(x))
        x = x + self.last(x)
        logits: Tensor = self.fc(x.amax((2, 3)))
        return logits


def _conv(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


def _prepared(net: nn.Module) -> nn.Module:
    net.pretrained_cfg = dict(CIFAR10)  # type: ignore[assignment]  # a plain attribute, as timm sets it
    return net


@register_model
def small_ghostnetv2(
    pretrained: bool = False, num_classes: int = 10, drop_rate: float = 0.0, **_: Any
) -> nn.Module:
    return _prepared(SmallGhostNetV2(1.0, num_classes, drop_rate=drop_rate))


@register_model
def small_ghostnetv3(
    pretrained: bool = False, num_classes: int = 10, drop_rate: float = 0.0, **_: Any
) -> nn.Module:
    return _prepared(SmallGhostNetV3(1.0, num_classes, drop_rate=drop_rate))


@register_model
def small_resnet(pretrained: bool = False, num_classes: int = 10, **_: Any) -> nn.Module:
    return _prepared(SmallResNet(num_classes))


def plan(data: Path, output: Path, seeds: Sequence[int] = SEEDS) -> dict[str, Settings]:
    """The runs by name, in the order in which they are made: whole seeds, and the teacher before it is needed."""

    def settings(name: str, network: str, seed: int, **others: Any) -> Settings:
        overrides: Mapping[str, Any] = {**RECIPE, **others.pop("recipe", {})}
        return Settings(
            output / name,
            str(data),
            network,
            load_recipe("cifar", overrides),
            seed=seed,
            accelerator="cpu",
            keep="last",
            **others,
        )

    teacher = settings(
        "teacher", "small_resnet", 0, recipe={"epochs": TEACHER_EPOCHS}, precision="bf16-mixed"
    )
    runs = {}
    for seed in seeds:
        runs[f"plain-{seed}"] = settings(f"plain-{seed}", "small_ghostnetv2", seed)
        runs[f"branches-{seed}"] = settings(f"branches-{seed}", "small_ghostnetv3", seed)
        runs["teacher"] = teacher
        runs[f"teacher-{seed}"] = settings(
            f"teacher-{seed}",
            "small_ghostnetv3",
            seed,
            teacher=str(teacher.output / "training.safetensors"),
        )
    return runs


def finished(folder: Path) -> dict[str, Any] | None:
    """The card of a finished run with its history."""
    if not (folder / "card.json").is_file():
        return None
    card: dict[str, Any] = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    return card


def summary(card: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What the documentation needs of a run."""
    result = card["result"]
    header, *lines = (folder / "history.csv").read_text(encoding="utf-8").splitlines()
    history = [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines]
    return {
        "network": card["settings"]["network"],
        "seed": card["settings"]["seed"],
        "teacher": card["settings"]["teacher"] is not None,
        "precision": card["settings"]["precision"],
        "epochs": result["epochs"],
        "training_accuracy": result["training_score"],
        "plain_accuracy": result["plain_score"],
        "same_answers": result["same_answers"],
        "test_images": result["held_out_images"],
        "distance_float64": result["proof"]["distance_float64"],
        "loss": [float(row["loss"]) for row in history],
        "test_loss": [float(row["held_out_loss_trained"]) for row in history],
        "test_accuracy": [float(row["held_out_accuracy_trained"]) for row in history],
        "seconds": [float(row["seconds"]) for row in history],
        "versions": card["versions"],
        "training_images": card["data"]["training_images"],
    }


def processor() -> str:
    """The processor's name as the system tells it."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def write_results(path: Path, runs: Mapping[str, Settings]) -> None:
    """What all finished runs gave, whichever process made them."""
    cards = {name: finished(settings.output) for name, settings in runs.items()}
    done = {name: summary(card, runs[name].output) for name, card in cards.items() if card is not None}
    results = {"recipe": RECIPE, "processor": processor(), "threads": 1, "runs": done}
    make_folder(path.parent)
    write_text(path, json.dumps(results, indent=1))


def main() -> None:
    """Train what is not trained yet, and write the results after each run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/cifar10"))
    parser.add_argument("--results", type=Path, default=Path("docs/results/cifar10.json"))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="those to train here")
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=120)
    data = parsed.data.resolve()
    for name, settings in plan(data, parsed.output, parsed.seeds).items():
        if finished(settings.output) is None:
            console.print(f"{time.strftime('%H:%M:%S')} {name}")
            begun = (settings.output / "run.json").is_file()
            result = resume(settings.output, console) if begun else train(settings, console)
            assert result is not None
            console.print(
                f"{time.strftime('%H:%M:%S')} {name}: {result.training_score:.4f} {result.plain_score:.4f}"
            )
        write_results(parsed.results, plan(data, parsed.output))


if __name__ == "__main__":
    main()
