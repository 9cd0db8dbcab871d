"""An image for a network to run on."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_DEFAULT_SIZE = (3, 224, 224)


def example_input(model: nn.Module, input_size: Sequence[int] | None = None) -> Tensor:
    """One random image ``(1, channels, height, width)`` in the model's dtype and on its device.

    The size is ``input_size`` (channels, height, width) if given, else that of the preprocessing in the checkpoint
    that the model was loaded from, of the model's ``pretrained_cfg`` or 224 x 224 with the model's ``in_chans``.
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
    image = torch.randn(1, *input_size, generator=generator)
    return image.to(device=reference.device, dtype=reference.dtype)


def _input_channels(model: nn.Module) -> int:
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    return _DEFAULT_SIZE[0] if first is None else first.in_channels
