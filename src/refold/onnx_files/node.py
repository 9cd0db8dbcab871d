"""One node of an ONNX graph as the table of operators reads it: its inputs, settings, and what is known of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

DTYPES = {
    ir.DataType.FLOAT.value: torch.float32,
    ir.DataType.DOUBLE.value: torch.float64,
    ir.DataType.FLOAT16.value: torch.float16,
    ir.DataType.BFLOAT16.value: torch.bfloat16,
    ir.DataType.BOOL.value: torch.bool,
    ir.DataType.UINT8.value: torch.uint8,
    ir.DataType.INT8.value: torch.int8,
    ir.DataType.INT16.value: torch.int16,
    ir.DataType.INT32.value: torch.int32,
    ir.DataType.INT64.value: torch.int64,
}
"""The types of tensors that torch has, by the numbers that ONNX gives them."""

Known = Callable[[ir.Value], "np.ndarray[Any, Any] | None"]


@dataclass(frozen=True)
class Types:
    """The type and shape of values, as the file says or as ONNX infers them; None for an axis that is free."""

    dtypes: Mapping[str, int]
    shapes: Mapping[str, tuple[int | None, ...]]


@dataclass(frozen=True)
class Window:
    """How a convolution or a pooling moves over its input."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    ends: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]


@dataclass(frozen=True)
class OnnxNode:
    """A node, the version of its operator set, and what is known of values before anything runs."""

    node: ir.Node
    version: int
    types: Types
    known: Known
    """The numbers of a small constant; None for any other value."""

    @property
    def kind(self) -> str:
        """The type of the operator."""
        return str(self.node.op_type)

    @property
    def domain(self) -> str:
        """Empty for ONNX's own operators."""
        return "" if self.node.domain == "ai.onnx" else self.node.domain

    @property
    def inputs(self) -> list[ir.Value | None]:
        """The values that it reads, None for what is left out."""
        return list(self.node.inputs)

    @property
    def outputs(self) -> list[ir.Value]:
        """The values that it writes, without those at the end that nobody names."""
        found = list(self.node.outputs)
        while found and not found[-1].name:
            found.pop()
        return found

    @property
    def attributes(self) -> Mapping[str, Any]:
        """Its settings."""
        return dict(self.node.attributes)

    def attribute(self, name: str, *default: Any) -> Any:
        """The value of a setting."""
        found: Any = self.node.attributes.get(name)
        if found is None:
            if not default:
                raise ValueError(f"the attribute '{name}' is missing")
            return default[0]
        return list(found.value) if isinstance(found.value, (tuple, list)) else found.value

    def numbers(self, place: int, name: str = "") -> list[int] | None:
        """Whole numbers that are an input or, in older versions, a setting; None where they are not known."""
        found = self._numbers(place, name)
        return None if found is None else [int(each) for each in found]

    def floats(self, place: int, name: str = "") -> list[float] | None:
        """The same for real numbers."""
        found = self._numbers(place, name)
        return None if found is None else [float(each) for each in found]

    def _numbers(self, place: int, name: str) -> list[Any] | None:
        value = self.node.inputs[place] if place < len(self.node.inputs) else None
        if value is not None:
            found = self.known(value)
            return None if found is None else list(found.flatten().tolist())
        return self.attribute(name, None) if name else None

    def shape(self, value: ir.Value | None) -> tuple[Any, ...]:
        """The shape of a value, None for a free axis; empty where nothing is known of it."""
        return () if value is None or not value.name else self.types.shapes.get(value.name, ())

    def dtype(self, value: ir.Value | None) -> torch.dtype | None:
        """The type of a value; None where it is not known, or is none of torch's."""
        return None if value is None or not value.name else DTYPES.get(self.types.dtypes.get(value.name, 0))

    def window(self, kernel_size: Sequence[int | None], source: ir.Value | None) -> Window | None:
        """How the kernel moves over `source`; None where that depends on a size which is free."""
        kernel = tuple(self.attribute("kernel_shape", None) or kernel_size)
        axes = len(kernel)
        if not axes or None in kernel:
            return None
        stride = tuple(self.attribute("strides", [1] * axes))
        dilation = tuple(self.attribute("dilations", [1] * axes))
        ends = self._ends(kernel, stride, dilation, self.shape(source)[2:])
        return None if ends is None else Window(kernel, stride, ends, dilation)

    def _ends(
        self,
        kernel: tuple[int, ...],
        stride: tuple[int, ...],
        dilation: tuple[int, ...],
        sides: tuple[Any, ...],
    ) -> tuple[tuple[int, int], ...] | None:
        axes, automatic = len(kernel), self.attribute("auto_pad", "NOTSET")
        if automatic in ("NOTSET", ""):
            flat = self.attribute("pads", [0] * 2 * axes)
            return tuple(zip(flat[:axes], flat[axes:], strict=True))
        if automatic == "VALID":
            return ((0, 0),) * axes
        found = []
        for i, (size, step, spacing) in enumerate(zip(kernel, stride, dilation, strict=True)):
            side = sides[i] if i < len(sides) else None
            if step > 1 and side is None:
                return None
            reach = (size - 1) * spacing
            missing = (
                reach
                if step == 1 or side is None
                else max(0, (-(-side // step) - 1) * step + reach + 1 - side)
            )
            small, large = missing // 2, missing - missing // 2
            found.append((small, large) if automatic == "SAME_UPPER" else (large, small))
        return tuple(found)
