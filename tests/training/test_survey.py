"""What a training would learn from is counted, and what is left out is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from refold import cli
from refold.errors import InputError

Make = Callable[..., Path]


@pytest.fixture
def data(make: Make) -> Path:
    root = make({"cat": 20, "dog": 6})
    (root / "cat" / "3.png").write_bytes(b"no image")
    (root / "dog" / "phone.heic").touch()
    shutil.copy(root / "cat" / "1.png", root / "cat" / "copy.png")
    pixels = np.random.default_rng(0).integers(0, 255, (30, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "cat" / "wide.png")
    return root


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, ["check-data", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_images_of_each_class_their_sizes_and_what_is_left_out(data: Path) -> None:
    found = json.loads(invoke(str(data), "--json"))
    assert {name: found["training"][name] + found["held_out"][name] for name in ("cat", "dog")} == {
        "cat": 21,
        "dog": 6,
    }
    assert found["sizes"] == {"20 x 12": 25, "50 x 30": 1}
    notes = " ".join(found["notes"])
    assert "1 doubles of another file of their class (cat/copy.png)" in notes
    assert "(dog/phone.heic)" in notes
    assert f"Left out: The image '{data / 'cat' / '3.png'}' cannot be read" in notes
    assert "1 classes have fewer than 10 training images (dog)" in notes


def test_a_table_and_a_picture(data: Path, tmp_path: Path) -> None:
    printed = invoke(str(data), "-o", str(tmp_path / "sheet.png"))
    assert "cat" in printed
    assert "20 x 12 (25), 50 x 30 (1)" in printed
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert min(sheet.size) > 200
        assert (
            len(sheet.convert("RGB").getcolors(1 << 24) or ()) > 1000
        )  # noise of the images, not a blank page


def test_names_without_a_glyph_or_with_control_characters_do_not_reach_the_terminal(make: Make) -> None:
    root = make({"a\x1b[31m": 6, "$b^": 6})
    printed = invoke(str(root))
    assert "\x1b[31m" not in printed
    assert "a\\x1b[31m" in printed


def test_what_cannot_be_used_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no folder"):
        invoke(str(tmp_path / "missing"))
    with pytest.raises(InputError, match="does not exist; create it first"):
        invoke("digits", "-o", str(tmp_path / "missing" / "sheet.png"))
