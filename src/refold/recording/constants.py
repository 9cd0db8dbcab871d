"""The values in a graph that do not depend on its inputs, in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from refold.errors import NotFoldable, first_line
from refold.recording.precision import in_float64
from refold.recording.recording import Recording


class Constants:
    """What the constant values of a recording are.

    Computed from the parameters and buffers themselves and in float64, so that a layer which computes its weight or
    its scale (weight standardisation, frozen batch norm) folds as exactly as one that stores it.
    """

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.order = {node: index for index, node in enumerate(recording.graph.nodes)}
        """The places of all operators in the order they ran."""
        self._values: dict[fx.Node, Any] = {}

    def operations(self, node: fx.Node) -> int:
        """How many operators run, on every call, to compute the constants that `node` reads."""
        found: set[fx.Node] = set()
        waiting = [node]
        while waiting:
            for value in waiting.pop().all_input_nodes:
                if value not in self.recording.varying and value not in found:
                    found.add(value)
                    waiting.append(value)
        return sum(value.op != "get_attr" for value in found)

    def value(self, node: fx.Node) -> Tensor:
        """The constant tensor at `node`, float64 on the CPU. Raises NotFoldable where there is none."""
        if node in self.recording.varying:
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
            value: Any = self.recording.attribute(str(node.target))
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.evaluate)
            try:
                with in_float64(), torch.no_grad():
                    value = apply(self.recording, node, args, kwargs)
            except Exception as error:
                raise NotFoldable(f"its constant cannot be computed ({first_line(error)})") from error
        self._values[node] = value
        return value


def apply(recording: Recording, node: fx.Node, args: Any, kwargs: Any) -> Any:
    """Run one operator."""
    if node.op == "call_module":
        return recording.attribute(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)
