"""Where the values of a detector's maps lie in the image: cell centres, and anchors around them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def cell_centres(map_: Tensor, stride: int) -> Tensor:
    """The centres (x, y) of the cells of a map ``(batch, channels, height, width)``, in pixels: ``(cells, 2)``.

    Cells run along rows, as the map's last two axes do when they are flattened.

    Examples:
        >>> import torch
        >>> from refold.boxes import cell_centres
        >>> cell_centres(torch.zeros(1, 1, 1, 2), stride=8)
        tensor([[ 4.,  4.],
                [12.,  4.]])
    """
    height, width = map_.shape[-2:]
    y, x = (
        (torch.arange(side, device=map_.device).to(map_.dtype) + 0.5) * stride for side in (height, width)
    )
    # Expanded, not repeated: with a free size PyTorch's repeat is written to ONNX in a way that does not run.
    return torch.stack([x[None, :].expand(height, width), y[:, None].expand(height, width)], -1).flatten(0, 1)


def anchor_boxes(map_: Tensor, stride: int, sizes: Sequence[tuple[float, float]]) -> Tensor:
    """Anchors of the given ``(width, height)`` around every cell of a map, in pixels: ``(cells * sizes, 4)``.

    Boxes are x1, y1, x2, y2; the anchors of one cell follow one another.
    """
    halves = torch.tensor(sizes, dtype=map_.dtype, device=map_.device) / 2
    centres = cell_centres(map_, stride)[:, None]
    return torch.cat([centres - halves, centres + halves], -1).flatten(0, 1)


def anchor_sizes(
    side: float, scales: Sequence[float], ratios: Sequence[float]
) -> tuple[tuple[float, float], ...]:
    """``(width, height)`` of anchors of the area ``(side * scale)²`` for each scale, and each ratio of height to width.

    Source: Faster R-CNN, section 3.1.1; RetinaNet, section 4, "Anchors".
    """
    return tuple(
        (side * scale / ratio**0.5, side * scale * ratio**0.5) for ratio in ratios for scale in scales
    )


def rows_of(map_: Tensor, values: int) -> Tensor:
    """A map ``(batch, boxes * values, height, width)`` as rows ``(batch, height * width * boxes, values)``.

    The order is that of `cell_centres` and `anchor_boxes`.
    """
    rows: Tensor = map_.flatten(2).transpose(1, 2).unflatten(2, (-1, values))
    return rows.flatten(1, 2)
