"""The handwritten digits that scikit-learn bundles: one an image, and in scenes with boxes."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from refold.training.images import Images, LabelledImages, hold_out_share
from refold.training.labels import BoxLabels
from refold.training.pictures import Source

# Of a digit with its border, in pixels.
_SIDES = (28, 57)


def bundled_digits(seed: int = 0) -> LabelledImages:
    """The 1,797 handwritten digits (8 x 8, grey) that scikit-learn bundles, a fifth of each held out."""
    digits = load_digits()
    pictures = (digits.images * (255 / 16)).round().astype(np.uint8)
    sources: list[Source] = [Image.fromarray(picture).convert("RGB") for picture in pictures]
    names = [str(name) for name in digits.target_names]
    return hold_out_share(
        "handwritten digits (scikit-learn)", names, sources, digits.target.tolist(), seed, mirror=False
    )


def digit_scenes(seed: int = 0, training: int = 3200, held_out: int = 200, side: int = 96) -> LabelledImages:
    """Grey scenes with one to five of scikit-learn's digits each, at chance places and sizes, some of them held out.

    No digit of a held-out scene is in a scene to train on.
    """
    digits = bundled_digits(seed)
    chance = np.random.default_rng(seed)
    parts = []
    for images, count in ((digits.training, training), (digits.held_out, held_out)):
        pairs = [_scene(images, side, chance) for _ in range(count)]
        parts.append(Images([picture for picture, _ in pairs], [labels for _, labels in pairs]))
    title = f"scenes of handwritten digits (scikit-learn), {side} x {side}"
    return LabelledImages(title, digits.class_names, parts[0], parts[1], mirror=False, task="detect")


def _scene(digits: Images, side: int, chance: np.random.Generator) -> tuple[Image.Image, BoxLabels]:
    canvas = chance.normal(40, 12, (side, side))
    boxes: list[tuple[int, int, int, int]] = []
    labels: list[int] = []
    wanted = int(chance.integers(1, 6))
    for _ in range(20):
        if len(boxes) == wanted:
            break
        size = int(chance.integers(*_SIDES))
        x, y = (int(chance.integers(0, side - size + 1)) for _ in range(2))
        number = int(chance.integers(len(digits)))
        source: Any = digits.sources[number]
        pixels = np.asarray(source.convert("L").resize((size, size), Image.Resampling.BILINEAR), dtype=float)
        rows, columns = np.nonzero(pixels > 60)
        left, right = x + int(columns.min()), x + int(columns.max()) + 1
        box = (left, y + int(rows.min()), right, y + int(rows.max()) + 1)
        if any(
            min(box[2], b[2]) > max(box[0], b[0]) and min(box[3], b[3]) > max(box[1], b[1]) for b in boxes
        ):
            continue
        place = canvas[y : y + size, x : x + size]
        np.maximum(place, pixels, out=place)
        boxes.append(box)
        labels.append(digits.targets[number])
    picture = Image.fromarray(canvas.clip(0, 255).astype(np.uint8)).convert("RGB")
    return picture, BoxLabels(tuple(boxes), tuple(labels), size=(side, side))
