"""Released weights asked about photos: the right counts of known weights, and a reason where there are none."""

import json
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from PIL import Image
from typer.testing import CliRunner

from refold.cli import app
from refold.errors import InputError
from refold.models import default_cfgs
from refold.replication import evaluate
from refold.replication.evaluating import imagenet_photos

NAME = "repghostnet_050"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Four photos of the class 0 of ImageNet and two of its class 1, by their WordNet numbers."""
    for name, count in (("n01440764", 4), ("n01443537", 2)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(count):
            picture = Image.new("RGB", (60, 48), (40 * index, 200, 90))
            picture.save(tmp_path / "photos" / name / f"{index}.png")
    return tmp_path / "photos"


@pytest.fixture(autouse=True)
def released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Weights in the official layout whose first answer is always class 1 and whose second is class 0; nothing else."""
    weights = timm.create_model(NAME).state_dict()
    weights["classifier.weight"].zero_()
    weights["classifier.bias"].zero_()[:2] = torch.tensor([1.0, 2.0])
    torch.save({"state_dict": weights}, tmp_path / "weights.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    url = (tmp_path / "weights.pth").as_uri()
    monkeypatch.setitem(default_cfgs, NAME, replace(default_cfgs[NAME], hf_hub_id=None, url=url))
    return url


def test_rows_have_the_accuracies_of_their_weights_or_a_reason(photos: Path, released: str) -> None:
    said: list[str] = []
    sheet = evaluate("repghost/table-4", photos, only=[NAME], say=said.append)
    other, row = sheet.grid.rows
    # Two of six are first, all are among the first five; the paper prints 66.9 and 86.9.
    assert row == [
        "RepGhostNet 0.5×", NAME, released, "66.9", "33.33", "-33.57", "86.9", "100.00", "+13.10",
    ]  # fmt: skip
    assert other[:6] == ["GhostNet 0.5×", "ghostnet_050", "", "66.4", "", ""]
    assert any(
        line.startswith("GhostNet 0.5×: No pretrained weights are published") for line in sheet.remarks
    )
    assert said == ["ghostnet_050: 6 photos", f"{NAME}: 6 photos"]


def test_variants_have_none_and_a_network_is_asked_once(photos: Path, released: str) -> None:
    said: list[str] = []
    sheet = evaluate("repghost/table-7", photos, say=said.append)
    assert [cells[4] for cells in sheet.grid.rows] == ["", "", "", "33.33", "", "", ""]
    assert "id: no weights of this variant are published" in sheet.remarks
    assert said == [f"{NAME}: 6 photos"]


def test_on_the_command_line(photos: Path, tmp_path: Path) -> None:
    words = ["paper", "repghost/table-7", "--pretrained", str(photos), "--only", "BN"]
    result = CliRunner().invoke(app, [*words, "-o", str(tmp_path / "t.json"), "--markdown"])
    assert result.exit_code == 0, result.output
    assert "| BN | repghostnet_050 |" in result.stdout
    row = json.loads((tmp_path / "t.json").read_text())["rows"][0]
    assert row["accuracies"] == {"top-1": pytest.approx(100 / 3), "top-5": 100}


def test_folders_are_wordnets_or_all_thousand(tmp_path: Path, photos: Path) -> None:
    assert [label for _, label in imagenet_photos(photos)] == [0] * 4 + [1] * 2
    (photos / "shark").mkdir()
    with pytest.raises(InputError, match="shark' is no class of ImageNet; name its folders by WordNet"):
        imagenet_photos(photos)
    with pytest.raises(InputError, match="There is no folder"):
        imagenet_photos(tmp_path / "nowhere")
    with pytest.raises(InputError, match="repghost/table-1 prints no accuracy"):
        evaluate("repghost/table-1", photos)
    for place in range(1000):
        (tmp_path / "all" / f"{place:03}").mkdir(parents=True)
        (tmp_path / "all" / f"{place:03}" / "a.png").write_bytes(b"")
    assert [label for _, label in imagenet_photos(tmp_path / "all")] == list(range(1000))
