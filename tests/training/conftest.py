"""What several tests of training share."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """Write small images into class folders: ``make({"a": 5, "b": 5})`` gives their root."""

    def write(classes: dict[str, int], size: tuple[int, int] = (20, 12)) -> Path:
        generator = np.random.default_rng(0)
        for name, number in classes.items():
            folder = tmp_path / "data" / name
            folder.mkdir(parents=True)
            for index in range(number):
                pixels = generator.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
        return tmp_path / "data"

    return write
