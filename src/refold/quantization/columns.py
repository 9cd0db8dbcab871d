"""A layer as a matrix: rows of weights in the order in which the engines' kernels go through them, and their inputs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import Tensor

from refold.quantization.skeleton import Array

# Positions of a map at which the inputs of a layer are looked at, over all images.
_POSITIONS = 12_000


@dataclass(frozen=True)
class Layout:
    """How the weight of a layer, of ``shape``, becomes rows: ``[groups, rows, columns]``.

    ``channels`` are those of one position of the kernel; ``attributes`` are the operator's.
    """

    kind: str
    shape: tuple[int, ...]
    groups: int
    attributes: dict[str, Any]

    @property
    def transposed(self) -> bool:
        """Whether the output channels are the last axis of the weight."""
        return self.kind == "MatMul" or (self.kind == "Gemm" and not self.attributes.get("transB"))

    @property
    def channel_axis(self) -> int:
        """The axis of the weight along which its output channels lie."""
        return len(self.shape) - 1 if self.transposed else 0

    @property
    def channels(self) -> int:
        """The channels that one position of the kernel reads."""
        return self.shape[0] if self.transposed else self.shape[1]

    @property
    def columns(self) -> int:
        """The weights of a row."""
        return self.channels * prod(self.shape[2:])

    @property
    def is_depthwise(self) -> bool:
        """Whether each channel is filtered by itself, for which engines have kernels that add in 32 bits."""
        return self.kind == "Conv" and self.shape[1] == 1 and self.groups > 1

    def rows(self, weight: Array) -> Array:
        """A weight as ``[groups, rows, columns]``."""
        if self.transposed:
            weight = weight.T
        if weight.ndim > 2:
            weight = np.moveaxis(weight, 1, -1)
        return np.ascontiguousarray(weight.reshape(self.groups, -1, self.columns))

    def weight(self, rows: Array) -> Array:
        """Rows, ``[..., columns]``, as a weight of the layer."""
        outputs = self.shape[self.channel_axis]
        if len(self.shape) > 2:
            spread = rows.reshape(outputs, *self.shape[2:], self.channels)
            return np.ascontiguousarray(np.moveaxis(spread, -1, 1))
        flat = rows.reshape(outputs, self.columns)
        return np.ascontiguousarray(flat.T if self.transposed else flat)


def layout_of(node: Any, shape: tuple[int, ...]) -> Layout:
    """The layout of a Conv, Gemm or MatMul with a weight of ``shape``."""
    attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
    return Layout(node.op_type, tuple(shape), int(attributes.get("group", 1)), attributes)


def products_of_columns(layout: Layout, parts: Iterable[Array], count: int) -> Tensor:
    """The mean products of the inputs of the columns, ``[groups, columns, columns]``, over ``count`` parts."""
    total = torch.zeros(layout.groups, layout.columns, layout.columns)
    seen = 0
    generator = torch.Generator().manual_seed(0)
    for part in parts:
        found = _columns(layout, torch.from_numpy(part), max(1, _POSITIONS // count), generator)
        total += found @ found.transpose(1, 2)
        seen += found.shape[-1]
    return total / max(seen, 1)


def _columns(layout: Layout, x: Tensor, positions: int, generator: torch.Generator) -> Tensor:
    """Inputs ``[groups, columns, positions]`` at places that are drawn."""
    if layout.kind != "Conv":
        flat = x.reshape(-1, x.shape[-1])
        return _drawn(flat.T[None], positions, generator)
    if layout.groups > 1:
        positions = max(1, positions // 8)  # few columns need few places
    kernel = layout.shape[2:]
    spatial = len(kernel)
    strides = tuple(layout.attributes.get("strides", (1,) * spatial))
    pads = tuple(layout.attributes.get("pads", (0,) * 2 * spatial))
    if spatial != 2:
        raise ValueError("only layers of images are rounded together")
    x = F.pad(x, (pads[1], pads[3], pads[0], pads[2]))
    if prod(kernel) == 1:
        taken = x[:, :, :: strides[0], :: strides[1]].flatten(2)
    else:
        dilation = tuple(layout.attributes.get("dilations", (1, 1)))
        places = (x.shape[2] // strides[0]) * (x.shape[3] // strides[1])
        images = min(len(x), max(1, -(-2 * positions // places)))
        step = max(1, len(x) // images)
        taken = F.unfold(x[::step], kernel, dilation=dilation, stride=strides)
    images, _, places = taken.shape
    split = taken.view(images, layout.groups, layout.channels, prod(kernel), places)
    ordered = split.permute(1, 3, 2, 0, 4).reshape(layout.groups, layout.columns, -1)
    return _drawn(ordered, positions, generator)


def _drawn(columns: Tensor, positions: int, generator: torch.Generator) -> Tensor:
    if columns.shape[-1] <= positions:
        return columns
    return columns[:, :, torch.randperm(columns.shape[-1], generator=generator)[:positions]]
