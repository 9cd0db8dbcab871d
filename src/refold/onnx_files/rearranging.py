"""Entries of the table of ONNX operators that move values: take tensors apart, put them together, change their axes.

As all of the table they are read by `operators.call_of`.
"""

from __future__ import annotations

import operator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from refold.onnx_files import functions
from refold.onnx_files.node import DTYPES, OnnxNode
from refold.onnx_files.table import Call, entry


@entry("Concat")
def _concatenation(node: OnnxNode) -> Call:
    return Call(torch.cat, "cat", (list(node.inputs), node.attribute("axis", 1)))


@entry("Split")
def _split(node: OnnxNode) -> Call | None:
    axis, shape = node.attribute("axis", 0), node.shape(node.inputs[0])
    sizes = node.numbers(1, "split")
    if sizes is None and len(node.inputs) < 2 and shape and shape[axis] is not None:
        each = -(-shape[axis] // len(node.outputs))
        sizes = [min(each, shape[axis] - each * i) for i in range(len(node.outputs))]
    return None if sizes is None else Call(torch.split, "split", (node.inputs[0], sizes, axis))


@entry("Slice")
def _slice(node: OnnxNode) -> Call:
    names = ("starts", "ends", "axes", "steps")
    given = [node.numbers(1 + i, name) for i, name in enumerate(names)]
    values = [*node.inputs[1:], None, None, None, None][:4]
    if any(value is not None and own is None for value, own in zip(values, given, strict=True)):
        mixed = [value if own is None else own for value, own in zip(values, given, strict=True)]
        return Call(functions.sliced, "", (node.inputs[0], *mixed))
    starts, ends, axes, steps = given
    assert starts is not None
    assert ends is not None
    steps = steps or [1] * len(starts)
    along = axes if axes is not None else list(range(len(starts)))
    if any(step < 1 for step in steps) or (any(a < 0 for a in along) and not node.shape(node.inputs[0])):
        return Call(functions.sliced, "", (node.inputs[0], starts, ends, axes, steps))
    along = [a % len(node.shape(node.inputs[0])) if a < 0 else a for a in along]
    index = [slice(None)] * (max(along) + 1)
    for start, end, axis, step in zip(starts, ends, along, steps, strict=True):
        index[axis] = slice(start, end, None if step == 1 else step)
    return Call(operator.getitem, "getitem", (node.inputs[0], tuple(index)))


@entry("Pad")
def _pad(node: OnnxNode) -> Call | None:
    ends = node.numbers(1, "pads")
    axes = node.numbers(3) if len(node.inputs) > 3 and node.inputs[3] is not None else None
    mode, value = node.attribute("mode", "constant"), node.attribute("value", 0.0)
    if ends is None or (len(node.inputs) > 3 and node.inputs[3] is not None and axes is None):
        return None
    if node.version > 10 and len(node.inputs) > 2 and node.inputs[2] is not None:
        known = node.known(node.inputs[2])
        if known is None:
            return None
        value = float(known)
    dimensions = len(node.shape(node.inputs[0])) or len(ends) // 2
    along = axes if axes is not None else list(range(len(ends) // 2))
    pairs = [(0, 0)] * dimensions
    for i, axis in enumerate(along):
        pairs[axis % dimensions] = (ends[i], ends[i + len(along)])
    first = next((i for i, pair in enumerate(pairs) if any(pair)), dimensions)
    flat = [end for pair in reversed(pairs[first:]) for end in pair]
    if not flat:
        return Call(functions.same, "alias", (node.inputs[0],))
    if mode == "constant":
        return Call(F.pad, "pad", (node.inputs[0], flat, mode, value))
    kept = 2 * (dimensions - 2)
    if first < 2 or mode not in ("reflect", "edge") or not 3 <= dimensions <= 5:
        return None
    flat = [*flat, *(0,) * (kept - len(flat))]
    return Call(F.pad, "pad", (node.inputs[0], flat, {"reflect": "reflect", "edge": "replicate"}[mode]))


@entry("Transpose")
def _transpose(node: OnnxNode) -> Call | None:
    order = node.attribute("perm", None)
    if order is None:
        order = list(range(len(node.shape(node.inputs[0]))))[::-1]
    return Call(torch.permute, "permute", (node.inputs[0], tuple(order))) if order else None


@entry("Flatten")
def _flatten(node: OnnxNode) -> Call:
    if node.attribute("axis", 1) == 1:
        return (
            Call(torch.flatten, "flatten", (node.inputs[0], 1))
            if len(node.shape(node.inputs[0])) > 1
            else (Call(functions.flatten, "reshape", (node.inputs[0], 1)))
        )
    return Call(functions.flatten, "reshape", (node.inputs[0], node.attribute("axis", 1)))


@entry("Reshape")
def _reshape(node: OnnxNode) -> Call:
    shape: Any = node.numbers(1)
    shape = node.inputs[1] if shape is None else shape
    return Call(functions.reshape, "reshape", (node.inputs[0], shape, bool(node.attribute("allowzero", 0))))


@entry("Squeeze", "Unsqueeze")
def _squeeze(node: OnnxNode) -> Call:
    axes: Any = node.numbers(1, "axes")
    if axes is None and len(node.inputs) > 1:
        axes = node.inputs[1]
    run = functions.squeeze if node.kind == "Squeeze" else functions.unsqueeze
    return Call(run, node.kind.lower(), (node.inputs[0], axes))


@entry("Expand", "Tile")
def _expand(node: OnnxNode) -> Call:
    shape: Any = node.numbers(1)
    run = functions.expand if node.kind == "Expand" else functions.tile
    return Call(run, "", (node.inputs[0], node.inputs[1] if shape is None else shape))


@entry("Shape")
def _shape(node: OnnxNode) -> Call:
    return Call(
        functions.shape_of, "", (node.inputs[0], node.attribute("start", 0), node.attribute("end", None))
    )


@entry("ConstantOfShape")
def _constant_of_shape(node: OnnxNode) -> Call:
    shape: Any = node.numbers(0)
    given: Any = node.attribute("value", None)
    value = 0.0 if given is None else given.numpy().flatten()[0].item()
    dtype = torch.float32 if given is None else DTYPES[given.dtype.value]
    return Call(functions.constant_of_shape, "", (node.inputs[0] if shape is None else shape, value, dtype))


@entry("Gather")
def _gather(node: OnnxNode) -> Call:
    return Call(functions.gather, "", (*node.inputs, node.attribute("axis", 0)))


@entry("GatherElements")
def _gather_elements(node: OnnxNode) -> Call:
    return Call(_gather_along, "", (*node.inputs, node.attribute("axis", 0)))


def _gather_along(x: Any, indices: Any, axis: int) -> Any:
    return torch.gather(x, axis, indices.long() % x.shape[axis])


@entry("DepthToSpace", "SpaceToDepth")
def _depth_to_space(node: OnnxNode) -> Call | None:
    block = node.attribute("blocksize")
    if node.kind == "SpaceToDepth" and node.attribute("mode", "DCR") != "DCR":
        return None
    if node.kind == "SpaceToDepth":
        return Call(functions.space_to_depth, "", (node.inputs[0], block))
    return Call(functions.depth_to_space, "", (node.inputs[0], block, node.attribute("mode", "DCR") == "CRD"))


@entry("Resize", "Upsample")
def _resize(node: OnnxNode) -> Call | None:
    """What `torch.nn.functional.interpolate` does as well; the other modes are left to ONNX's own implementation."""
    if node.kind == "Upsample":
        position, scales, size = "asymmetric", node.floats(1, "scales"), None
    else:
        place = 1 if node.version < 11 else 2
        scales = node.floats(place)
        sizes = node.inputs[3] if len(node.inputs) > 3 else None
        size = None if sizes is None else node.numbers(3) or sizes
        position = node.attribute(
            "coordinate_transformation_mode", "half_pixel" if node.version > 10 else "asymmetric"
        )
    mode, rounding = node.attribute("mode", "nearest"), node.attribute("nearest_mode", "round_prefer_floor")
    dimensions = len(node.shape(node.inputs[0]))
    strange = (
        any(node.attribute(name, 0) for name in ("antialias", "exclude_outside")) or "axes" in node.attributes
    )
    if strange or not 3 <= dimensions <= 5 or (size is None and not scales):
        return None
    if node.attribute("keep_aspect_ratio_policy", "stretch") != "stretch":
        return None
    if scales and size is None and (len(scales) != dimensions or scales[:2] != [1.0, 1.0]):
        return None
    run = partial(
        functions.resized,
        mode="nearest" if mode == "nearest" else "linear",
        corners=position == "align_corners",
        lone=position == "pytorch_half_pixel",
    )
    args = (node.inputs[0], size, None if size is not None else scales)
    if mode == "nearest":
        whole = size is None and all(scale >= 1 and scale == int(scale) for scale in scales or [])
        down = node.version < 11 or (position == "asymmetric" and rounding == "floor")
        even = whole and position in ("half_pixel", "pytorch_half_pixel") and rounding == "round_prefer_floor"
        return Call(run, "interpolate", args) if (down or even) else None
    if mode == "linear" and position in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        return Call(run, "interpolate", args)
    return None
