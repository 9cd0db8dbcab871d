"""Operators that belong together: an activation written out in several nodes, which engines fuse again."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir


def parts_of_gelu(graph: ir.Graph) -> set[ir.Node]:
    """The nodes that scale in a GELU that is written with Erf: a fold of one of them into a convolution would cost less
    by itself, and more where the engine does not recognise the rest."""
    found: set[ir.Node] = set()
    for node in graph:
        if node.op_type != "Erf":
            continue
        before = node.inputs[0].producer() if node.inputs[0] is not None else None
        products = [m for add in _readers(node, "Add") for m in _readers(add, "Mul")]
        around = [value.producer() for m in products for value in m.inputs if value is not None]
        after = [scale for m in products for scale in _readers(m, "Mul", "Div")]
        scales = (each for each in (before, *around, *after) if each is not None and _scales(each))
        found |= {*scales, *_readers(node, "Add")}
    return found


def _readers(node: ir.Node, *kinds: str) -> Iterator[ir.Node]:
    for value in node.outputs:
        yield from (user for user, _ in value.uses() if user.op_type in kinds)


def _scales(node: ir.Node) -> bool:
    """Whether it multiplies or divides by one number."""
    if node.op_type not in ("Mul", "Div"):
        return False
    sizes = [_constant_size(value) for value in node.inputs]
    return 1 in sizes


def _constant_size(value: ir.Value | None) -> int:
    """How many numbers a constant has; 0 for what is none."""
    if value is None:
        return 0
    producer = value.producer()
    if producer is not None and producer.op_type == "Constant":
        tensor = producer.attributes.get("value")
        return 1 if tensor is None else int(tensor.value.size)
    return 0 if value.const_value is None else int(value.const_value.size)
