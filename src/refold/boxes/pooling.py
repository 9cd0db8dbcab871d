"""What the maps of a pyramid hold inside boxes: each box from the map that suits its size."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import roi_align

from refold.boxes.suppression import rank_in_group

# Boxes of this many pixels square are looked at in the map of this level, one of half the sides a level finer.
_SIDE, _LEVEL = 224.0, 4


def pooled_in_boxes(
    maps: Sequence[Tensor],
    strides: Sequence[int],
    boxes: Tensor,
    image_index: Tensor,
    *,
    side: int,
    samples: int = 2,
) -> Tensor:
    """The maps' values in boxes, ``side`` by ``side`` points of each: ``(n, channels, side, side)``.

    ``maps`` ``(batch, channels, height, width)``, the finest first, have ``strides`` of powers of two; ``boxes``
    ``(n, 4)`` are x1, y1, x2, y2 in pixels and have an area, ``image_index`` ``(n,)`` is the image of each. Every point
    is a mean of ``samples`` times ``samples`` values between the map's own. torchvision's `MultiScaleRoIAlign` gives
    the same for a list of boxes an image; this takes any number of images, so that it exports with a free batch.

    Source: Feature Pyramid Networks, eq. 1; Mask R-CNN, section 3, "RoIAlign".
    """
    finest, coarsest = (int(math.log2(stride)) for stride in (strides[0], strides[len(maps) - 1]))
    sides = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    levels = ((_LEVEL + (sides / _SIDE).log2() + 1e-6).floor().clamp(finest, coarsest) - finest).long()
    rows = torch.cat([image_index[:, None].to(boxes.dtype), boxes], 1)
    found = []
    for index, (map_, stride) in enumerate(zip(maps, strides, strict=False)):
        own = (levels == index).nonzero()[:, 0]
        # One box more, which goes again: not every engine takes none.
        filled = torch.cat([rows[own], rows.new_zeros(1, 5)])
        found.append(roi_align(map_, filled, side, 1 / stride, samples)[:-1])
    # Back into the order of the boxes: where each went, behind all of finer levels and the earlier ones of its own.
    finer = (levels[None] < torch.arange(len(maps), device=levels.device)[:, None]).long().sum(1)
    return torch.cat(found)[finer[levels] + rank_in_group(levels, len(maps))]
