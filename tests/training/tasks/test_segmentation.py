"""The task of naming the class of every pixel: masks on changed images, measures by loops, a whole run."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from refold.cli import app
from refold.errors import InputError
from refold.training.batches import Batch, reseed
from refold.training.labels import IGNORED, MaskFile
from refold.training.recipe import load_recipe
from refold.training.tasks import SegmentationTask

PREPROCESSING = {
    "input_size": [3, 48, 64], "interpolation": "bilinear", "mean": [0.0] * 3, "std": [1.0] * 3, "crop_pct": 1.0,
}  # fmt: skip


def striped(
    folder: Path, values: tuple[int, ...] = (0, 7), size: tuple[int, int] = (60, 40)
) -> tuple[Image.Image, MaskFile]:
    """A picture that is black where the mask has the first value, white at the second and grey at a third."""
    pixels = np.zeros(size[::-1], np.uint8)
    mask = np.full(size[::-1], values[0], np.uint8)
    width = size[0] // len(values)
    for place, value in enumerate(values):
        pixels[:, place * width :] = (0, 255, 128)[place]
        mask[:, place * width :] = value
    path = folder / "mask.png"
    Image.fromarray(mask).save(path)
    return Image.fromarray(pixels).convert("RGB"), MaskFile(path, {0: 0, 7: 1})


def test_masks_follow_the_image_through_every_change(tmp_path: Path) -> None:
    recipe = load_recipe("segmentation", {"color_jitter": 0}).recipe
    augment, _ = SegmentationTask(["a", "b"]).transforms(recipe, PREPROCESSING, mirror=True)
    sides, filled = set(), 0
    for seed in range(40):
        reseed(seed)
        image, mask = augment(*striped(tmp_path))
        assert image.shape == (3, 48, 64)
        assert mask.shape == (48, 64)
        assert mask.dtype == torch.int64
        brightness = image.mean(0)
        for number, expected in ((0, 0.0), (1, 1.0)):
            own = mask == number
            if own.sum() > 200:  # at the edge between the two the picture is a mixture
                assert abs(float(brightness[own].mean()) - expected) < 0.12
        filled += int((mask == IGNORED).any())
        sides.add(bool(mask[:, 0].float().mean() < mask[:, -1].float().mean()))
    assert filled > 0
    assert sides == {True, False}


def test_measured_masks_are_framed_and_what_is_beside_them_is_ignored(tmp_path: Path) -> None:
    _, measure = SegmentationTask(["a", "b"]).transforms(
        load_recipe("segmentation").recipe, PREPROCESSING, True
    )
    _, mask = measure(*striped(tmp_path, size=(60, 20)))
    assert set(mask[:21].unique().tolist()) == {0, 1}
    assert set(mask[22:].unique().tolist()) == {IGNORED}


def test_values_of_no_class_are_ignored(tmp_path: Path) -> None:
    image, target = striped(tmp_path, (0, 7, 9))
    assert target.on(image).unique().tolist() == [0, 1, IGNORED]
    assert target.numbers() == {0: 800, 1: 800}


def test_a_mask_of_another_size_or_with_colours_is_refused(tmp_path: Path) -> None:
    image, target = striped(tmp_path)
    with pytest.raises(InputError, match="60 x 40 pixels and its image 30 x 20"):
        target.on(image.resize((30, 20)))
    image.save(tmp_path / "mask.png")
    with pytest.raises(InputError, match="has colours"):
        target.on(image)
    (tmp_path / "mask.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="cannot be read"):
        target.on(image)


def test_measures_are_those_of_a_loop() -> None:
    answers = torch.randint(3, (4, 5, 6), dtype=torch.uint8)
    targets = torch.randint(3, (4, 5, 6))
    targets[:, 0] = IGNORED
    task = SegmentationTask(["a", "b", "c"])
    measures = task.measures()
    measures.update(list(answers[:1]), targets[:1])
    measures.update(list(answers[1:]), targets[1:])
    counted = targets != IGNORED
    overlaps = []
    for number in range(3):
        own, true = (answers == number) & counted, (targets == number) & counted
        overlaps.append(float((own & true).sum() / (own | true).sum()))
    found = measures.compute()
    assert found["mean_iou"] == pytest.approx(sum(overlaps) / 3)
    assert found["pixel_accuracy"] == pytest.approx(
        float(((answers == targets) & counted).sum() / counted.sum())
    )


def test_the_loss_counts_known_pixels_alone_and_is_finite_without_any() -> None:
    task, net = SegmentationTask(["a", "b"]), nn.Identity()
    outputs = torch.randn(2, 2, 3, 4, requires_grad=True)
    targets = torch.randint(2, (2, 3, 4))
    targets[0] = IGNORED
    expected = F.cross_entropy(outputs[1:], targets[1:])
    assert float(task.loss(net, outputs, targets)) == pytest.approx(float(expected))
    nothing = task.loss(net, outputs, torch.full((2, 3, 4), IGNORED))
    nothing.backward()
    assert float(nothing) == 0
    assert outputs.grad is not None
    assert outputs.grad.isfinite().all()


def test_divergence_is_that_of_each_pixel_and_answers_are_compared() -> None:
    task, net = SegmentationTask(["a", "b"]), nn.Identity()
    outputs, teacher = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 3, 4)
    rows, taught = (value.permute(0, 2, 3, 1).reshape(-1, 2) for value in (outputs, teacher))
    expected = F.kl_div(rows.log_softmax(1), taught.log_softmax(1), reduction="batchmean", log_target=True)
    assert float(task.divergence(net, outputs, teacher)) == pytest.approx(float(expected), rel=1e-5)
    batch = Batch(outputs, None, [], torch.arange(2))
    first, second = task.answers(net, outputs, batch)
    assert torch.equal(first, outputs[0].argmax(0).to(torch.uint8))
    assert task.same(first, first)
    assert task.same(first, second) == bool((first == second).all())
    with pytest.raises(InputError, match="such as lraspp/repvgg_a0"):
        task.check_network(net, "repvgg_a0")


def write_scenes(root: Path, count: int = 24) -> None:
    """Dark pictures with a bright disc, and masks that show it."""
    chance = np.random.default_rng(0)
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    y, x = np.mgrid[:48, :64]
    for number in range(count):
        radius, centre = chance.integers(8, 20), chance.integers(16, 32, 2)
        disc = (y - centre[0]) ** 2 + (x - 16 - centre[1]) ** 2 < radius**2
        pixels = chance.normal(60, 10, (48, 64, 3)) + disc[..., None] * 120
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / "images" / f"{number:02d}.png")
        Image.fromarray(disc.astype(np.uint8)).save(root / "masks" / f"{number:02d}.png")
    (root / "classes.txt").write_text("background\ndisc\n")


@pytest.mark.slow
def test_a_run_learns_masks_in_every_form(tmp_path: Path) -> None:
    write_scenes(tmp_path / "data")
    folder = tmp_path / "run"
    told = [
        "train",
        "--data",
        str(tmp_path / "data"),
        "-o",
        str(folder),
        "--network",
        "lraspp/mobilenetv3_small_050",
    ]
    for value in ("image_size=64", "epochs=12", "batch_size=5", "learning_rate=0.03"):
        told += ["--set", value]
    result = CliRunner().invoke(app, told)
    assert result.exit_code == 0, result.output
    card = json.loads((folder / "card.json").read_text())
    given = card["result"]
    assert card["task"] == "segment"
    assert given["training_score"] > 0.8
    assert given["training_score"] == pytest.approx(given["plain_score"], abs=1e-3)
    assert given["training_score"] == pytest.approx(given["onnx_score"], abs=1e-3)
    assert given["same_answers"] == given["onnx_same_answers"] == given["held_out_images"]
    picture = tmp_path / "data" / "images" / "03.png"
    shares = []
    for file in ("plain.safetensors", "plain.onnx"):
        seen = CliRunner().invoke(
            app, ["predict", str(folder / file), str(picture), "--json", "--draw", str(tmp_path / file)]
        )
        assert seen.exit_code == 0, seen.output
        shares.append({c["name"]: c["share"] for c in json.loads(seen.stdout)[0]["classes"]})
        mask = np.asarray(Image.open(tmp_path / file / "03.mask.png"))
        truth = np.asarray(Image.open(tmp_path / "data" / "masks" / "03.png"))
        assert (mask == truth).mean() > 0.9
    assert shares[0].keys() == {"background", "disc"}
    assert shares[0]["disc"] == pytest.approx(shares[1]["disc"], abs=1e-3)
