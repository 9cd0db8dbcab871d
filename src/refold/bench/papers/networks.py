"""How a row's network is built: by name, or those of RepGhost's tables 1 and 10."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from refold.bench.papers.published import OPERATORS, PaperRow
from refold.bench.papers.yolov5 import YOLOv5
from refold.checkpoints import example_input
from refold.conversion import pointwise_to_linear
from refold.errors import InputError
from refold.folding import fold
from refold.models import create_model
from refold.models.ghostnet import GHOST_ROWS
from refold.unfolding import unfold

YOLOV5 = "refold/yolov5"


def build(row: PaperRow, *, device: str = "cpu") -> nn.Module:
    """The eval-mode network of a row, in training form, with the branches of its plan; with `linear` it is folded.

    On the meta device it has no weights, which suffices for its size.
    """
    if row.network is None:
        raise InputError(f"{row.model} cannot be built here.")
    with torch.device(device):
        if row.network == YOLOV5:
            return YOLOv5(**row.arguments).eval()
        if row.network == OPERATORS:
            return GhostOperators(**row.arguments).eval()
        network = create_model(row.network, **row.arguments).eval()
    if row.unfold:
        network = unfold(network, row.unfold)
    return pointwise_to_linear(fold(network, example_input(network))) if row.linear else network


class GhostOperators(nn.Module):
    """The concatenations of GhostNet 1.0x alone, or additions of the same tensors, or neither.

    For each of the 32 ghost modules two activated 1x1 convolutions make tensors of the shape of its halves from the
    image; `operator` ("concatenation", "addition" or "none") joins them; averages of the map read the result. All three
    networks have the same convolutions and average as many channels: with "addition" the sum and one of the halves,
    with "none" both halves. So the time of the operators is the difference to "none".
    Maps `(batch, 3, 224, 224)` to `(batch, channels)`.

    Source: RepGhost, table 1.
    """

    def __init__(self, operator: Literal["concatenation", "addition", "none"]) -> None:
        super().__init__()
        self.operator = operator
        self.pretrained_cfg = {"input_size": (3, 224, 224)}
        halves, stride = [], 2
        for row in GHOST_ROWS:
            halves.append((row.mid_channels // 2, stride))
            stride *= row.stride
            halves.append((row.out_channels // 2, stride))
        self.first, self.second = (
            nn.ModuleList(
                nn.Sequential(nn.Conv2d(3, channels, 1, stride), nn.ReLU()) for channels, stride in halves
            )
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        means = []
        for first, second in zip(self.first, self.second, strict=True):
            one, other = first(x), second(x)
            if self.operator == "concatenation":
                read = [torch.cat([one, other], dim=1)]
            elif self.operator == "addition":
                read = [one + other, one]
            else:
                read = [one, other]
            means += [adaptive_avg_pool2d(part, 1).flatten(1) for part in read]
        return torch.cat(means, dim=1)
