"""An ONNX graph as a network of PyTorch: one function for each operator, which a recording shows as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, fx, nn

from refold.errors import InputError
from refold.onnx_files.steps import Name, Step


@dataclass(frozen=True, eq=False)
class Program:
    """A file that is read: the model, and its operators in the order that they run."""

    model: onnx.ModelProto
    """Large tensors of the file stay in it."""
    path: Path | None
    """The file that it was read from, beside which large tensors may lie."""
    name: str
    """What to call it."""
    steps: tuple[Step, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sides: tuple[tuple[int | None, ...] | None, ...]
    """The shape of each input, None for a free axis; None for one that has no shape."""
    dtypes: tuple[torch.dtype, ...]
    done: tuple[tuple[str, ...], ...]
    """What nobody reads after each operator."""
    constants: Mapping[str, str] = field(default_factory=dict)
    """The names of constants by those under which the network keeps them."""
    notes: tuple[str, ...] = ()
    has_tensors_beside: bool = False
    """Whether tensors lie beside the file."""

    def __deepcopy__(self, memo: Any) -> Program:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "model": self.model.SerializeToString()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({**state, "model": onnx.ModelProto.FromString(state["model"])})


class OnnxNetwork(nn.Module):
    """The graph of an ONNX file. It takes its inputs by position and returns a tensor, or a tuple of several.

    Raises `InputError` where inputs have another number, type or shape than the file says.
    """

    def __init__(self, program: Program, tensors: Mapping[str, Tensor], statistics: set[str]) -> None:
        super().__init__()
        self.program = program
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and name not in statistics:
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
            else:
                self.register_buffer(name, tensor)

    def forward(self, *inputs: Tensor) -> Any:
        program = self.program
        with torch._C.DisableTorchFunction():  # a recording need not see it
            _check_inputs(program, inputs)
        values: dict[str, Any] = dict(zip(program.inputs, inputs, strict=True))
        values |= {known: getattr(self, own) for own, known in program.constants.items()}
        for step, done in zip(program.steps, program.done, strict=True):
            args, kwargs = filled(step.args, values), filled(step.kwargs, values)
            found = step.function(*args, **kwargs)
            several = isinstance(found, (tuple, list))
            values.update(zip(step.outputs, found if several else (found,), strict=True))
            for name in done:
                del values[name]
        results = tuple(values[name] for name in program.outputs)
        return results if len(results) > 1 else results[0]


def filled(structure: Any, values: Mapping[str, Any]) -> Any:
    """The structure with values in the place of their names."""
    return fx.node.map_aggregate(structure, lambda v: values[v.value] if isinstance(v, Name) else v)


def _check_inputs(program: Program, inputs: Sequence[Tensor]) -> None:
    if len(inputs) != len(program.inputs):
        raise InputError(f"{program.name} takes {len(program.inputs)} inputs, not {len(inputs)}.")
    for name, sides, value in zip(program.inputs, program.sides, inputs, strict=True):
        if sides is None:
            continue
        fits = len(sides) == value.dim() and all(
            side in (None, own) for side, own in zip(sides, value.shape, strict=True)
        )
        if not fits:
            asked = "x".join("?" if side is None else str(side) for side in sides)
            raise InputError(
                f"The input '{name}' of {program.name} is {asked}, not {'x'.join(map(str, value.shape))}."
            )
