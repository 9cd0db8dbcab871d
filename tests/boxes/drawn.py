"""Random boxes."""

import torch
from torch import Tensor


def drawn_boxes(count: int, side: float = 100.0) -> Tensor:
    corners = torch.rand(count, 2, dtype=torch.float64) * side
    return torch.cat([corners, corners + 1 + torch.rand(count, 2, dtype=torch.float64) * side], 1)
