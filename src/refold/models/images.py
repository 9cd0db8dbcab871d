"""An image for a network to run on."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from refold.errors import InputError

_DEFAULT_SIZE = (3, 224, 224)
# Half a gigabyte in float32: no network takes such an image, and each layer would need that much again.
_MOST_NUMBERS = 2**27


def example_input(model: nn.Module, input_size: Sequence[int] | None = None) -> Tensor:
    """One random image ``(1, channels, height, width)`` in the model's dtype and on its device.

    The size is ``input_size`` (channels, height, width) if given, else that of the preprocessing in the checkpoint
    that the model was loaded from, of the model's ``pretrained_cfg`` or 224 x 224 with the model's ``in_chans``.
    Raises `InputError` for a size that is none of an image.
    """
    card: Any = getattr(model, "card", None)
    if input_size is None and card is not None and card.preprocessing is not None:
        input_size = card.preprocessing.get("input_size")
    if input_size is None:
        configured = getattr(model, "pretrained_cfg", None) or {}
        _, height, width = configured.get("input_size", _DEFAULT_SIZE)
        input_size = (getattr(model, "in_chans", None) or _input_channels(model), height, width)
    reference = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, *check_input_size(input_size), generator=generator)
    return image.to(device=reference.device, dtype=reference.dtype)


def check_input_size(size: Sequence[int]) -> Sequence[int]:
    """The size (channels, height, width); raises `InputError` where it is none, or no image is as large."""
    if len(size) != 3 or not all(isinstance(side, int) and side > 0 for side in size):
        raise InputError(
            f"The input size {list(size)!r:.100} is none of an image; give channels, height and width, each at least 1."
        )
    if math.prod(size) > _MOST_NUMBERS:
        raise InputError(
            f"An image of {' x '.join(map(str, size))} is too large; give a size of at most {_MOST_NUMBERS:,} numbers."
        )
    return size


def _input_channels(model: nn.Module) -> int:
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    return _DEFAULT_SIZE[0] if first is None else first.in_channels
