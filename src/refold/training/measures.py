"""Means over the images of all processes."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class MeanLoss(Metric):
    """The mean over images, of all processes, of losses that are means of batches.

    Without a look at each value, which would make an accelerator wait; `torchmetrics.MeanMetric` takes no weights then.
    """

    total: Tensor
    images: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "images"):
            self.add_state(name, torch.zeros(()), dist_reduce_fx="sum")

    def update(self, loss: Tensor, images: int) -> None:
        """Count the mean of a batch of that many images."""
        self.total += loss * images
        self.images += images

    def compute(self) -> Tensor:
        """The mean so far."""
        return self.total / self.images
