"""Batches that depend on seed and epoch alone: not on what ran before, on workers or on the number of processes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from refold.errors import InputError
from refold.training.images import Images
from refold.training.pictures import read_image

Key = tuple[int, int]
"""An epoch, and the index of an image."""


class Batch(NamedTuple):
    """Images ``(n, 3, height, width)`` float32, their targets as their task has them, and what could not be read.

    ``indices`` ``(n,)`` int64 are the places of the images among all.
    """

    images: Tensor
    targets: Any
    unreadable: list[str]
    indices: Tensor


Example = tuple[Tensor | None, Any, str, int]
"""An image, or None for one that could not be read; its target; the message of what could not be read; its place."""

Transform = Callable[[Image.Image, Any], tuple[Tensor, Any]]
"""From an image and its target to a prepared one; raises `InputError` where a target does not belong to its image."""

Collate = Callable[[Sequence[Example]], Batch]


class SeededImages(Dataset[Example]):
    """Images by epoch and index; the transform's chance comes from seed, epoch and index alone.

    An unreadable image is None, with the message that names it.
    """

    def __init__(self, images: Images, transform: Transform, seed: int) -> None:
        self.images = images
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key) -> Example:
        with untouched_chance():
            return self._example(key)

    def __getitems__(self, keys: list[Key]) -> list[Example]:
        """A whole batch: keeping the generators' states once, not for each image, is a fifth of the time."""
        with untouched_chance():
            return [self._example(key) for key in keys]

    def _example(self, key: Key) -> Example:
        epoch, index = key
        target = self.images.targets[index]
        try:
            image = read_image(self.images.sources[index])
            reseed(self.seed, epoch, index)
            prepared, target = self.transform(image, target)
        except InputError as error:
            return None, target, str(error), index
        return prepared, target, "", index


class EpochBatches(Sampler[list[Key]]):
    """Batches of one process: its share of each global batch, shuffled by seed and epoch.

    ``batch_size`` is that of all processes together; images left over in an epoch are left out of it.
    """

    def __init__(self, images: int, batch_size: int, seed: int, rank: int = 0, processes: int = 1) -> None:
        self.images = images
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.processes = processes
        self.epoch = 0

    @property
    def sampler(self) -> EpochBatches:
        """Itself: Lightning tells the epoch to the ``sampler`` of a batch sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Take the order of another epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.images // self.batch_size

    def __iter__(self) -> Iterator[list[Key]]:
        generator = torch.Generator().manual_seed(_mixed(self.seed, self.epoch))
        order = torch.randperm(self.images, generator=generator).tolist()
        for number in range(len(self)):
            batch = order[number * self.batch_size : (number + 1) * self.batch_size]
            yield [(self.epoch, index) for index in batch[self.rank :: self.processes]]


def collate(examples: Sequence[Example]) -> Batch:
    """Stack the images that could be read, beside a list of their targets."""
    images = [example[0] for example in examples if example[0] is not None]
    readable = [example for example in examples if example[0] is not None]
    return Batch(
        torch.stack(images) if images else torch.empty(0, 3, 1, 1),
        [target for _, target, _, _ in readable],
        [message for image, _, message, _ in examples if image is None],
        torch.tensor([index for _, _, _, index in readable], dtype=torch.int64),
    )


def training_loader(
    images: Images,
    transform: Transform,
    batch_size: int,
    *,
    seed: int,
    workers: int,
    rank: int = 0,
    processes: int = 1,
    collate: Collate = collate,
) -> DataLoader[Any]:
    """Shuffled and augmented batches of `SeededImages`; ``batch_size`` counts all processes.

    ``collate`` makes a batch of examples.
    """
    return DataLoader(
        SeededImages(images, transform, seed),
        batch_sampler=EpochBatches(len(images), batch_size, seed, rank, processes),
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
    )


def held_out_loader(
    images: Images,
    transform: Transform,
    batch_size: int,
    *,
    workers: int,
    rank: int = 0,
    processes: int = 1,
    collate: Collate = collate,
) -> DataLoader[Any]:
    """All held-out images in order, each once over all processes; ``collate`` is that of `training_loader`."""
    keys = [(0, index) for index in range(rank, len(images), processes)]
    batches = [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]
    return DataLoader(
        SeededImages(images, transform, 0),
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
    )


@contextmanager
def untouched_chance() -> Iterator[None]:
    """Give the three generators that timm's transforms draw from back as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def reseed(*numbers: int) -> None:
    """Seed Python's, numpy's and torch's generators from several whole numbers."""
    seed = _mixed(*numbers)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # torch.manual_seed keeps a traceback for each accelerator that is not in use yet, each time.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def _mixed(*numbers: int) -> int:
    return (
        int(np.random.SeedSequence([number % 2**64 for number in numbers]).generate_state(1, np.uint64)[0])
        >> 1
    )
