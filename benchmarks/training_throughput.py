"""A run of refold against a bare PyTorch loop: the same network, batches, images and optimiser, taking turns.

    python benchmarks/training_throughput.py                      # the digits, as `refold train --data digits`
    python benchmarks/training_throughput.py --data photos --network repghostnet_100 --recipe ghostnetv3 \
        --set batch_size=32 --set ema_decay=null

Both measure the held-out images after each epoch; refold also writes its files. Seconds of the clock and of the
processor, which other programs disturb less; the latter count this process alone. Then the loader alone, with workers.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from refold.training import run as running
from refold.training.batches import training_loader
from refold.training.callbacks import Keeper, Unreadable
from refold.training.data import open_data
from refold.training.images import Images, LabelledImages
from refold.training.module import make_optimizer
from refold.training.pictures import read_image
from refold.training.recipe import Recipe, load_recipe, parse_overrides
from refold.training.starting import build_network, preprocessing_for, ready
from refold.training.tasks.classification import OfImage, recipe_transforms

Times = tuple[float, float]
"""Seconds of the clock and of the processor."""


def now() -> Times:
    return time.perf_counter(), time.process_time()


def since(start: Times, end: Times) -> Times:
    return end[0] - start[0], end[1] - start[1]


class Transformed(Dataset[tuple[torch.Tensor, int]]):
    """Images as tensors, with whatever chance there is."""

    def __init__(self, images: Images, transform: Any) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(read_image(self.images.sources[index])), self.images.targets[index]


class Bare:
    """The loop that one would write by hand."""

    def __init__(self, arguments: argparse.Namespace, recipe: Recipe, images: LabelledImages) -> None:
        self.net = build_network(arguments.network, len(images.class_names), recipe)
        preprocessing = preprocessing_for(self.net, recipe)
        self.net.to(memory_format=torch.channels_last)
        augment, measure = recipe_transforms(recipe, preprocessing, images.mirror)
        self.recipe = recipe
        self.optimizer = make_optimizer(self.net, recipe)
        settings: dict[str, Any] = {
            "num_workers": arguments.workers,
            "persistent_workers": arguments.workers > 0,
        }
        self.training = DataLoader(
            Transformed(images.training, augment), recipe.batch_size, shuffle=True, drop_last=True, **settings
        )
        self.held_out = DataLoader(Transformed(images.held_out, measure), 64, **settings)

    def epoch(self) -> Times:
        """An epoch with its validation."""
        start = now()
        self.net.train()
        total = 0.0
        for images, targets in self.training:
            images = images.contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(self.net(images), targets, label_smoothing=self.recipe.label_smoothing)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            total += loss.item()
        self.net.eval()
        right = 0
        with torch.no_grad():
            for images, targets in self.held_out:
                right += int((self.net(images).argmax(1) == targets).sum())
        return since(start, now())


def refold_epochs(arguments: argparse.Namespace, resolved: Any, folder: Path) -> list[Times]:
    """From the beginning of an epoch to that of the next one, files written, but for the first."""
    starts: list[Times] = []
    begin = Keeper.on_train_epoch_start

    def began(self: Keeper, *given: Any) -> None:
        starts.append(now())
        begin(self, *given)

    Keeper.on_train_epoch_start = began  # type: ignore[method-assign]
    running.finish = lambda *_: None  # type: ignore[assignment]
    try:
        settings = running.Settings(
            folder, arguments.data, arguments.network, resolved,
            workers=arguments.workers, threads=arguments.threads, accelerator="cpu",
        )  # fmt: skip
        running.train(settings, Console(file=io.StringIO()))
    finally:
        Keeper.on_train_epoch_start = begin  # type: ignore[method-assign]
    return [since(before, after) for before, after in pairwise(starts[1:])]


def loader_speed(net: nn.Module, recipe: Recipe, images: LabelledImages, workers: int) -> float:
    """Images a second that the loader alone prepares, after its workers have started."""
    augment, _ = recipe_transforms(recipe, preprocessing_for(net, recipe), images.mirror)
    loader = training_loader(images.training, OfImage(augment), recipe.batch_size, seed=0, workers=workers)
    batches = iter(loader)
    next(batches)
    start, count = time.perf_counter(), 0
    for batch in batches:
        count += len(batch.images)
    return count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--network", default="repghostnet_050")
    parser.add_argument("--recipe", default="small_images")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    resolved = load_recipe(arguments.recipe, {**parse_overrides(arguments.set), "epochs": 4})
    recipe = resolved.recipe
    console = Console(file=io.StringIO())
    images = ready(open_data(arguments.data), recipe, Unreadable(console, 10), console, 1)
    bare = Bare(arguments, recipe, images)
    bare.epoch()
    seconds: dict[str, list[Times]] = {"refold": [], "bare": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.rounds):
            seconds["refold"] += refold_epochs(arguments, resolved, Path(folder) / str(number))
            seconds["bare"] += [bare.epoch() for _ in range(2)]
    shown = len(images.training) // recipe.batch_size * recipe.batch_size
    result: dict[str, Any] = {
        "network": arguments.network,
        "batch_size": recipe.batch_size,
        "image_size": recipe.image_size,
    }
    for clock, kind in enumerate(("clock", "processor")):
        medians = {name: statistics.median(v[clock] for v in values) for name, values in seconds.items()}
        result[kind] = {
            "epoch_seconds": medians,
            "refold_over_bare": medians["refold"] / medians["bare"],
            "images_per_second": {name: shown / value for name, value in medians.items()},
        }
    result["loader_images_per_second"] = {
        workers: loader_speed(bare.net, recipe, images, workers) for workers in (0, 1, 2)
    }
    print(json.dumps(result, indent=2))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
