"""Means over images."""

import math

import pytest
import torch

from refold.training.measures import MeanLoss


def test_a_mean_loss_counts_images() -> None:
    """A smaller last batch counts less, and a loss that is no number is not lost."""
    mean = MeanLoss()
    for loss, images in ((2.0, 3), (5.0, 1)):
        mean.update(torch.tensor(loss), images)
    assert float(mean.compute()) == pytest.approx((2 * 3 + 5) / 4)
    mean.update(torch.tensor(float("nan")), 1)
    assert math.isnan(float(mean.compute()))
