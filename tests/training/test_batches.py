"""Batches depend on seed, epoch and index alone."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from refold.training.batches import (
    EpochBatches,
    SeededImages,
    collate,
    held_out_loader,
    reseed,
    training_loader,
)
from refold.training.images import Images
from refold.training.recipe import load_recipe
from refold.training.tasks.classification import OfImage, recipe_transforms

PREPROCESSING = {
    "input_size": [3, 16, 16], "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0,
}  # fmt: skip


def pictures(number: int = 10) -> Images:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 255, (number, 20, 20, 3), dtype=np.uint8)
    return Images([Image.fromarray(picture) for picture in pixels], list(range(number)))


def test_processes_share_the_batches_of_one() -> None:
    whole = EpochBatches(23, 6, seed=4)
    shares = [EpochBatches(23, 6, seed=4, rank=rank, processes=2) for rank in range(2)]
    orders = []
    for epoch in (0, 1):
        for sampler in (whole, *shares):
            sampler.set_epoch(epoch)
        batches = list(whole)
        assert len(batches) == len(whole) == 3
        for batch, *parts in zip(batches, *shares, strict=True):
            assert sorted(batch) == sorted(key for part in parts for key in part)
            assert {len(part) for part in parts} == {3}
        indices = [index for batch in batches for _, index in batch]
        assert len(set(indices)) == 18
        assert {key[0] for batch in batches for key in batch} == {epoch}
        orders.append(indices)
    assert orders[0] != orders[1]
    seen = [key for rank in range(2) for b in held_out_loader(
        pictures(7), lambda image, target: (torch.zeros(1), target), 2, workers=0, rank=rank, processes=2
    ) for key in b.targets]  # fmt: skip
    assert sorted(seen) == list(range(7))


@pytest.mark.parametrize("workers", [0, 2])
def test_chance_comes_from_the_key_and_leaves_the_generators_alone(workers: int) -> None:
    recipe = load_recipe("ghostnetv3", {"image_size": 16, "random_erasing": 0.5, "color_jitter": 0.3}).recipe
    augment, _ = recipe_transforms(recipe, PREPROCESSING, mirror=True)
    images = SeededImages(pictures(), OfImage(augment), seed=1)
    states = random.getstate(), torch.get_rng_state()
    first = images[0, 3][0]
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    np.random.rand(5), torch.rand(5), random.random()
    states_after = random.getstate()
    assert first is not None
    assert torch.equal(first, images[0, 3][0])  # type: ignore[arg-type]
    assert not torch.equal(first, images[1, 3][0])  # type: ignore[arg-type]
    whole = images.__getitems__([(0, 2), (0, 3)])
    assert torch.equal(first, whole[1][0])  # type: ignore[arg-type]
    assert random.getstate() == states_after
    loader = training_loader(pictures(), OfImage(augment), 5, seed=1, workers=workers)
    for batch in loader:
        for image, target in zip(batch.images, batch.targets, strict=True):
            assert torch.equal(image, images[0, target][0])  # type: ignore[arg-type]
    reseed(1, 2)
    numbers = torch.rand(2), np.random.rand(), random.random()
    reseed(1, 2)
    assert torch.equal(torch.rand(2), numbers[0])
    assert (np.random.rand(), random.random()) == numbers[1:]


def test_unreadable_images_travel_as_messages(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    images = Images([*pictures(2).sources, tmp_path / "broken.png"], [0, 1, 2])
    dataset = SeededImages(images, OfImage(lambda image: torch.zeros(3, 4, 4)), seed=0)
    batch = collate([dataset[0, index] for index in range(3)])
    assert (batch.images.shape, batch.targets) == ((2, 3, 4, 4), [0, 1])
    assert len(batch.unreadable) == 1
    assert "broken.png" in batch.unreadable[0]
    assert len(collate([dataset[0, 2]]).images) == 0


def test_the_padded_crop_is_that_of_he_et_al() -> None:
    """A white image, padded by 4 black pixels: what is cut out starts at one of 9 places in each direction."""
    recipe = load_recipe("cifar", {"image_size": 16}).recipe
    augment, measure = recipe_transforms(recipe, PREPROCESSING, mirror=False)
    white = Image.new("RGB", (16, 16), (255, 255, 255))
    assert torch.equal(measure(white), torch.ones(3, 16, 16))
    shapes = set()
    for seed in range(60):
        reseed(seed)
        rows, columns = (augment(white)[0] == 1).nonzero().T
        shapes.add((int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1))
    assert {side for shape in shapes for side in shape} <= {12, 13, 14, 15, 16}
    assert len(shapes) > 10


@pytest.mark.parametrize("mirror", [True, False])
def test_only_images_that_may_be_are_mirrored(mirror: bool) -> None:
    augment, _ = recipe_transforms(
        load_recipe("small_images", {"color_jitter": 0}).recipe, PREPROCESSING, mirror
    )
    step = np.zeros((16, 16, 3), np.uint8)
    step[:, 8:] = 255
    reseed(0)
    images = [augment(Image.fromarray(step)) for _ in range(30)]
    assert {bool(x[:, :, -1].mean() > x[:, :, 0].mean()) for x in images} == (
        {True, False} if mirror else {True}
    )
