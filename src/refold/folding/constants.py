"""The values in a graph that do not depend on its inputs, in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from refold.errors import NotFoldable, first_line
from refold.folding.precision import in_float64
from refold.folding.tracing import Unit


class Constants:
    """Which values of a unit's graph are constant, and what they are.

    Computed from the parameters and buffers themselves and in float64, so that a layer which computes its weight or
    its scale (weight standardisation, frozen batch norm) folds as exactly as one that stores it.
    """

    def __init__(self, unit: Unit) -> None:
        self.unit = unit
        self._varying: set[fx.Node] = set()
        self._values: dict[fx.Node, Any] = {}
        for node in unit.graph.nodes:
            if node.op in ("placeholder", "call_module") or any(
                n in self._varying for n in node.all_input_nodes
            ):
                self._varying.add(node)

    def varies(self, value: Any) -> bool:
        """Whether the value depends on the input of the unit."""
        return isinstance(value, fx.Node) and value in self._varying

    def operations(self, node: fx.Node) -> int:
        """How many operators run, on every call, to compute the constants that `node` reads."""
        found: set[fx.Node] = set()
        waiting = [node]
        while waiting:
            for value in waiting.pop().all_input_nodes:
                if value not in self._varying and value not in found:
                    found.add(value)
                    waiting.append(value)
        return sum(value.op in ("call_function", "call_method") for value in found)

    def value(self, node: fx.Node) -> Tensor:
        """The constant tensor at `node`, float64 on the CPU. Raises NotFoldable where there is none."""
        if node in self._varying:
            raise NotFoldable("it depends on the input")
        value = self.evaluate(node)
        if isinstance(value, (int, float)):
            value = torch.tensor(value)
        if not isinstance(value, Tensor) or (not value.dtype.is_floating_point and value.is_complex()):
            raise NotFoldable("it is not a tensor of real numbers")
        return value.detach().to(device="cpu", dtype=torch.float64)

    def evaluate(self, node: fx.Node) -> Any:
        """Whatever constant is at `node`: a tensor as the model stores it, or in float64 where it is computed."""
        if node in self._values:
            return self._values[node]
        if node.op == "get_attr":
            value: Any = self.unit.attribute(str(node.target))
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.evaluate)
            try:
                with in_float64(), torch.no_grad():
                    value = apply(node, args, kwargs)
            except Exception as error:
                raise NotFoldable(f"its constant cannot be computed ({first_line(error)})") from error
        self._values[node] = value
        return value


def apply(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """Run the function or method of one node."""
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)
