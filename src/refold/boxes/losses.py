"""The losses of detectors, each a sum over an image that the caller divides."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss


def quality_loss(logits: Tensor, qualities: Tensor, *, weight: float = 0.75, power: float = 2.0) -> Tensor:
    """Cross entropy against wanted scores from 0 to 1; background counts the less the lower its score is already.

    ``logits`` and ``qualities`` ``(..., classes)`` give the sum over all.

    Source: VarifocalNet, eq. 2, with background weighted by ``weight * score^power`` and boxes by their quality.
    """
    scores = logits.sigmoid().detach()
    counts = torch.where(qualities > 0, torch.ones_like(scores), weight * scores**power)
    return (F.binary_cross_entropy_with_logits(logits, qualities, reduction="none") * counts).sum()


def focal_loss(logits: Tensor, wanted: Tensor, *, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Cross entropy against 0 and 1 that counts a score the less the closer to it it is, summed.

    Source: RetinaNet, eq. 5.
    """
    losses: Tensor = sigmoid_focal_loss(logits, wanted, alpha=alpha, gamma=gamma, reduction="sum")
    return losses


def box_loss(predicted: Tensor, boxes: Tensor, weights: Tensor) -> Tensor:
    """1 - GIoU of boxes ``(n, 4)``, weighted ``(n,)`` and summed; boxes without area give finite gradients.

    Source: Generalized Intersection over Union, algorithm 1.
    """
    losses: Tensor = generalized_box_iou_loss(predicted, boxes, eps=1e-7)
    return (losses * weights).sum()
