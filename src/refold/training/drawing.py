"""Boxes and masks on pictures."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import draw_segmentation_masks

_TRANSPARENCY = 0.5


def colour_of(number: int) -> tuple[int, int, int]:
    """A bright colour for a class, far from those of the numbers beside it."""
    # Steps of the golden ratio never come back to where they were.
    red, green, blue = colorsys.hsv_to_rgb(number * 0.618033988749895 % 1, 0.75, 0.95)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_boxes(
    image: Image.Image,
    boxes: Sequence[Sequence[float]],
    names: Sequence[str],
    numbers: Sequence[int] | None = None,
) -> Image.Image:
    """A copy of an RGB image with boxes x1, y1, x2, y2 in pixels and a name at each, in the colour of its class."""
    drawn = image.copy()
    canvas = ImageDraw.Draw(drawn)
    side = max(image.size)
    line, font = max(1, side // 300), ImageFont.load_default(max(10, side // 45))
    known = {name: index for index, name in enumerate(dict.fromkeys(names))}
    numbers = [known[name] for name in names] if numbers is None else numbers
    for box, name, number in zip(boxes, names, numbers, strict=True):
        colour = colour_of(number)
        canvas.rectangle([round(value) for value in box], outline=colour, width=line)
        left, top, right, bottom = canvas.textbbox((0, 0), name, font=font)
        height = bottom - top + 2 * line
        # Above its box, or inside of it where there is no room.
        x, y = max(0.0, min(box[0], image.width - right + left)), box[1] - height
        y = y if y >= 0 else box[1]
        canvas.rectangle([x, y, x + right - left + 2 * line, y + height], fill=colour)
        canvas.text((x + line - left, y + line - top), name, fill=(0, 0, 0), font=font)
    return drawn


def draw_mask(image: Image.Image, mask: Tensor, names: Sequence[str], *, ignored: int = 255) -> Image.Image:
    """A copy of an RGB image with a mask of classes ``(height, width)`` over it, and the names of those that occur."""
    numbers = [number for number in mask.unique().tolist() if number != ignored]
    layers = torch.stack([mask == number for number in numbers]) if numbers else mask[None] != mask
    picture = draw_objects(image, layers, numbers or [0])
    return draw_names(picture, [names[number] for number in numbers], numbers)


def draw_objects(image: Image.Image, masks: Tensor, numbers: Sequence[int]) -> Image.Image:
    """A copy of an RGB image with masks ``(n, height, width)`` of truth values, each in the colour of its class."""
    if not len(masks):
        return image.copy()
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    colours = [colour_of(number) for number in numbers]
    drawn = draw_segmentation_masks(
        pixels.view(image.height, image.width, 3).permute(2, 0, 1), masks, 1 - _TRANSPARENCY, colours
    )
    return Image.fromarray(drawn.permute(1, 2, 0).contiguous().numpy())


def draw_names(image: Image.Image, names: Sequence[str], numbers: Sequence[int] | None = None) -> Image.Image:
    """A copy of an RGB image with names one below the other in its upper left corner, each in a colour of its own."""
    drawn = image.copy()
    canvas = ImageDraw.Draw(drawn)
    font = ImageFont.load_default(max(10, max(image.size) // 45))
    y = 2.0
    for name, number in zip(names, range(len(names)) if numbers is None else numbers, strict=True):
        left, top, right, bottom = canvas.textbbox((2, y), name, font=font)
        canvas.rectangle([left - 2, top - 2, right + 2, bottom + 2], fill=colour_of(number))
        canvas.text((2, y), name, fill=(0, 0, 0), font=font)
        y = bottom + 6
    return drawn
