"""What operators that take maps apart, put them together or fill their borders are linearly; as in `meanings`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from refold.recording.linear import Concatenation, ConstantBorder, Map, Slice, Use
from refold.recording.maps import padding
from refold.recording.recording import set_item


def concatenation(use: Use) -> Concatenation | None:
    inputs = use.argument(0, "tensors")
    axis = use.argument(1, "dim", use.node.kwargs.get("axis", 0))
    if not isinstance(inputs, (tuple, list)) or not all(isinstance(i, fx.Node) for i in inputs):
        return None
    axes = _layout(axis, len(use.shape(use.node)))
    return None if axes is None else Concatenation(tuple(inputs), axes)


def item(use: Use) -> Slice | None:
    value: Any = use.node.args[0]
    index: Any = use.argument(1, "index")
    if isinstance(value, fx.Node) and value not in use.recording.shapes and isinstance(index, int):
        return _chunk_item(use, value, index)
    if not isinstance(index, tuple) or value not in use.recording.shapes:
        return None
    shape = use.shape(value)
    sliced = [i for i, part in enumerate(index) if part is not Ellipsis and part != slice(None)]
    if len(sliced) != 1 or not isinstance(index[sliced[0]], slice):
        return None
    axis = sliced[0] - len(index) if Ellipsis in index[: sliced[0]] else sliced[0]
    part = index[sliced[0]]
    if any(not isinstance(end, (int, type(None))) for end in (part.start, part.stop, part.step)):
        return None
    axes = _layout(axis, len(shape))
    if axes is None:
        return None
    start, stop, step = part.indices(shape[axis])
    return Slice(value, start, stop, axes) if step == 1 and stop > start else None


def narrowed(use: Use) -> Slice | None:
    names = ("input", "dim", "start", "length")
    source, axis, start, length = (use.argument(i, name) for i, name in enumerate(names))
    axes = _layout(axis, len(use.shape(source)))
    if axes is None or not isinstance(start, int) or not isinstance(length, int) or start < 0:
        return None
    return Slice(source, start, start + length, axes)


def border(use: Use) -> ConstantBorder | None:
    """The last of several writes of one value into all the edges that a zero padding made (diverse branch block)."""
    sides: dict[tuple[int, bool], int] = {}
    node, value = use.node, None
    while isinstance(node, fx.Node) and node.target is set_item:
        one = Use(node, use.constants)
        side = _side(one, len(use.shape(use.node)))
        given = one.argument(2, "value")
        if side is None or use.varies(given):
            return None
        own = use.constant(given)
        if own is None or (value is not None and not torch.equal(own.flatten(), value)):
            return None
        value, sides[side[:2]] = own.flatten(), side[2]
        node = node.args[0]  # type: ignore[assignment]  # the first argument of set_item is a value
    padded = Use(node, use.constants)
    meaning = padding(padded) if padded.name in ("pad", "constant_pad_nd") else None
    if not isinstance(meaning, Map) or value is None:
        return None
    ends = meaning.structure.padding
    widths = {
        (i, j): end for i, pair in enumerate(ends) for j, end in ((True, pair[0]), (False, pair[1])) if end
    }
    channels = use.shape(use.node)[1]
    if widths != sides or value.numel() not in (1, channels):
        return None
    return ConstantBorder(meaning.input, ends, value.expand(channels))


def _side(use: Use, axes: int) -> tuple[int, bool, int] | None:
    """Which edge a write goes to: the spatial axis, whether at its start, and how many rows."""
    index = use.argument(1, "index")
    if not isinstance(index, tuple) or Ellipsis in index:
        return None
    written = [(i, part) for i, part in enumerate(index) if part != slice(None)]
    if len(written) != 1 or written[0][0] < 2 or not isinstance(written[0][1], slice):
        return None
    axis, part = written[0]
    size = use.shape(use.node)[axis]
    ends = (part.start, part.stop, part.step)
    if (
        axis >= axes
        or any(not isinstance(end, (int, type(None))) for end in ends)
        or part.step not in (None, 1)
    ):
        return None
    start, stop, _ = part.indices(size)
    from_start = part.start in (None, 0) and isinstance(part.stop, int) and part.stop > 0
    from_end = isinstance(part.start, int) and part.start < 0 and stop == size
    return (axis - 2, from_start, stop - start) if from_start or from_end else None


_CHUNKS = ("chunk", "split", "tensor_split")
_CHUNK_SIZES = (
    "chunks",
    "split_size_or_sections",
    "split_size",
    "indices_or_sections",
    "sections",
    "indices",
)


def _chunk_item(use: Use, chunks: fx.Node, index: int) -> Slice | None:
    """One item of `chunk` or `split`: the channels before it are those that the earlier items have."""
    split = Use(chunks, use.constants)
    name = split.name
    if name.removesuffix("_with_sizes") not in _CHUNKS:
        return None
    source = split.argument(0, "input", chunks.kwargs.get("tensor"))
    axis = split.argument(2, "dim", 0)
    sizes = next((split.argument(99, key) for key in _CHUNK_SIZES if key in chunks.kwargs), None)
    sizes = sizes or split.argument(1, "")
    shape, own = use.shape(source), use.shape(use.node)
    axes = _layout(axis, len(shape))
    ends = None if axes is None else _chunk_ends(name, sizes, shape[axis])
    if axes is None or ends is None:
        return None
    return Slice(source, ends[index] - own[axis], ends[index], axes)


def _chunk_ends(name: str, sizes: Any, total: int) -> list[int] | None:
    if isinstance(sizes, int):
        if name == "chunk":
            sizes = math.ceil(total / sizes)
        elif name == "tensor_split":
            return [total * (i + 1) // sizes for i in range(sizes)] if total % sizes == 0 else None
        return [min(start + sizes, total) for start in range(0, total, sizes)]
    if name == "tensor_split" or not all(isinstance(size, int) for size in sizes):
        return None
    return [sum(sizes[: i + 1]) for i in range(len(sizes))]


def _layout(axis: Any, dimensions: int) -> int | None:
    """The spatial axes of a layout whose channels are at `axis`; None where that is no channel axis."""
    if not isinstance(axis, int) or not 2 <= dimensions <= 5:
        return None
    axis %= dimensions
    if axis == 1:
        return dimensions - 2
    return 0 if axis == dimensions - 1 else None
