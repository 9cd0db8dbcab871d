"""Maps are what layers give, pairs and kernels those of a plain loop, and what is written can be looked at."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import conv2d
from typer.testing import CliRunner

import refold
from refold.cli import app
from refold.errors import InputError
from refold.feature_maps import Maps, feature_maps, map_layers, similar_pairs, similarity
from refold.feature_maps.drawing import MOST_MAPS, draw_maps, shown_parts
from refold.feature_maps.report import report_layers, save_maps


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A photo of a bright disc on a gradient."""
    y, x = np.mgrid[:64, :96]
    disc = 255 * ((y - 30) ** 2 + (x - 40) ** 2 < 300)
    pixels = np.stack([disc, 2 * x, 3 * y], axis=2).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_maps_are_those_that_a_layer_gives() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.LazyLinear(2)).train()
    image = torch.randn(1, 3, 8, 9)
    network(image)
    assert map_layers(network, image) == {"0": (4, 6, 7), "1": (4, 6, 7)}
    maps = feature_maps(network, image, "0")
    assert torch.equal(maps.values, network[0](image)[0])  # not what the activation wrote over them
    assert (maps.values < 0).any()
    assert network.training
    with pytest.raises(InputError, match=r"No layer '2' gives maps; the nearest are 0, 1"):
        feature_maps(network, image, "2")
    with pytest.raises(InputError, match=r"cannot run on an image of 1 x 8 x 8"):
        map_layers(network, torch.zeros(1, 1, 8, 8))


def test_primary_and_cheap_maps_are_told_apart() -> None:
    network = refold.create_model("cghost_resnet56", num_classes=10).eval()
    image = torch.randn(1, 3, 32, 32)
    name, module = next(
        (name, module) for name, module in network.named_modules() if type(module).__name__ == "GhostModule"
    )
    maps = feature_maps(network, image, name)
    ((_, primary), (_, cheap)) = maps.parts
    assert [part for part, _ in maps.parts] == ["primary", "cheap"]
    assert torch.equal(maps.values[:primary], feature_maps(network, image, f"{name}.primary").values)
    assert torch.equal(maps.values[primary:], feature_maps(network, image, f"{name}.cheap").values[:cheap])
    assert module.out_channels == primary + cheap


def test_the_paths_of_a_g_ghost_stage_are_told_apart() -> None:
    network = refold.create_model("gghost_resnet56", num_classes=10).eval()
    stage: Any
    name, stage = next((n, m) for n, m in network.named_modules() if type(m).__name__ == "GGhostStage")
    maps = feature_maps(network, torch.randn(1, 3, 32, 32), name)
    assert maps.parts == (
        ("complicated path", stage.thin_channels),
        ("cheap operation", stage.ghost_channels),
    )


def test_kernels_and_correlations_are_those_of_a_plain_loop() -> None:
    torch.manual_seed(0)
    maps = torch.randn(3, 6, 7, dtype=torch.float64)
    kernel = torch.randn(1, 1, 3, 3, dtype=torch.float64)
    maps[2] = conv2d(maps[0][None, None], kernel, padding=1)[0, 0]
    found = similarity(maps, (1, 3))
    assert found.errors[3][0, 2] < 1e-20  # the kernel that made it
    assert found.errors[1][0, 2] > 0.1
    for source in range(3):
        for target in range(3):
            x, y = maps[source].flatten(), maps[target].flatten()
            assert found.correlations[source, target] == pytest.approx(np.corrcoef(x, y)[0, 1])
            best = (x @ y) / (x @ x)
            assert found.errors[1][source, target] == pytest.approx(float((best * x - y).square().mean()))
    assert found.variances.tolist() == pytest.approx(maps.flatten(1).var(dim=1, correction=0).tolist())
    assert found.squares.tolist() == pytest.approx(maps.square().mean(dim=(1, 2)).tolist())


def test_pairs_are_the_most_alike_and_none_of_a_constant_map() -> None:
    torch.manual_seed(1)
    base = torch.randn(4, 8, 8)
    maps = torch.stack(
        [base[0], base[1], 2 * base[0] + 1, -base[1], torch.ones(8, 8), base[1] + 0.1 * base[2]]
    )
    first, second, *others = similar_pairs(similarity(maps), count=3)
    assert (first.source, first.target) == (0, 2)
    assert first.correlation == pytest.approx(1)
    assert (second.source, second.target) == (1, 5)  # not its negative
    assert (
        len({channel for pair in (first, second, *others) for channel in (pair.source, pair.target)} & {4})
        == 0
    )
    assert not similar_pairs(similarity(torch.ones(3, 4, 4)))
    for size in (0, 2):
        with pytest.raises(InputError, match=f"kernel size is {size}; give an odd number"):
            similarity(maps, (size,))
    with pytest.raises(InputError, match="one map"):
        similarity(maps[:1])


def test_of_many_maps_the_first_are_drawn_and_it_is_said() -> None:
    maps = Maps("deep", torch.randn(600, 3, 3), (("primary", 300), ("cheap", 300)))
    half = MOST_MAPS // 2
    assert list(shown_parts(maps)) == [
        (f"deep: primary, 300 maps, the first {half}", range(half)),
        (f"deep: cheap, 300 maps, the first {half}", range(300, 300 + half)),
    ]
    assert len(draw_maps(maps).axes) == 2


def test_a_page_that_needs_nothing_else(tmp_path: Path) -> None:
    network = refold.create_model("ghostnet_050").eval()
    reports = report_layers(network, torch.randn(1, 3, 64, 64), ["stages.0.0.ghost1", "stem"], pairs=2)
    paths = save_maps(reports, tmp_path / "out", network="ghostnet_050", image="a & b.jpg")
    assert [path.name for path in paths] == [
        "stages.0.0.ghost1.png",
        "stages.0.0.ghost1-pairs.png",
        "stem.png",
        "stem-pairs.png",
        "index.html",
    ]
    page = paths[-1].read_text(encoding="utf-8")
    assert "a &amp; b.jpg" in page
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    pictures = re.findall(r"base64,([^\"]+)", page)
    assert [base64.b64decode(text) for text in pictures] == [path.read_bytes() for path in paths[:-1]]
    for path in paths[:-1]:
        with Image.open(path) as picture:
            assert np.asarray(picture.convert("L")).std() > 10
    assert page.count("<tr>") == 2 * 3


def test_on_the_command_line(photo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "maps"
    told = ["maps", "ghostnet_050", "--image", str(photo), "--input-size", "64"]
    listed = CliRunner().invoke(app, told)
    assert "stages.0.0.ghost1  8 x 32 x 32" in listed.output
    assert not folder.exists()
    drawn = CliRunner().invoke(
        app, [*told, "--layer", "stages.0.0.ghost1", "--pairs", "-o", str(folder), "--json"]
    )
    (described,) = json.loads(drawn.stdout)
    assert described["shape"] == [8, 32, 32]
    assert described["parts"] == {"primary": 4, "cheap": 4}
    assert {*described["pairs"][0]["errors"]} == {"1", "3", "5", "7"}
    assert (folder / "index.html").is_file()
    for wrong, message in (
        (["--layer", "stage.0"], "No layer 'stage.0' gives maps"),
        (["--image", str(tmp_path)], "is a folder; give one photo"),
    ):
        with pytest.raises(InputError, match=message):
            CliRunner().invoke(app, [*told, *wrong], catch_exceptions=False, standalone_mode=False)
