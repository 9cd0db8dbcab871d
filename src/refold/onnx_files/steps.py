"""The operators of a file as they are run: one step each, with names in the place of tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from torch import Tensor, nn

from refold.onnx_files.places import place_of
from refold.onnx_files.table import Call
from refold.recording.recording import PlacedFunction


@dataclass(frozen=True)
class Name:
    """Stands for the tensor of a name in what a function is called with."""

    value: str


@dataclass(frozen=True)
class Step:
    """One operator: what runs, what it is called with, and the names of what it returns."""

    function: PlacedFunction
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: tuple[int, ...]
    """Which inputs of the node the tensors in the arguments are, in order; those that only its subgraphs read are
    numbered behind them."""
    captured: tuple[str, ...]
    """What only its subgraphs read."""
    outputs: tuple[str, ...]


def step_of(number: int, node: ir.Node, call: Call, captured: list[ir.Value], outputs: list[str]) -> Step:
    """The step of a node, the `number`-th of its graph."""
    function = PlacedFunction(call.run, call.operator, node.op_type, place_of(node), number)
    values = [*node.inputs, *captured]
    left = list(range(len(values)))
    reads = []
    for value in _values((call.args, call.kwargs)):
        places = [i for i, own in enumerate(values) if own is value]
        place = next((i for i in places if i in left), places[-1])
        if place in left:
            left.remove(place)
        reads.append(place)
    args, kwargs = _named((call.args, call.kwargs))
    names = tuple(str(value.name) for value in captured)
    return Step(function, args, kwargs, tuple(reads), names, tuple(outputs))


def captured_by(node: ir.Node) -> list[ir.Value]:
    """What only the subgraphs of a node read of the graph around it."""
    found: dict[ir.Value, None] = {}
    for attribute in node.attributes.values():
        graphs = [attribute.value] if attribute.type == ir.AttributeType.GRAPH else []
        graphs = list(attribute.value) if attribute.type == ir.AttributeType.GRAPHS else graphs
        for graph in graphs:
            own = set(graph.inputs) | set(graph.initializers.values())
            read: list[ir.Value | None] = list(graph.outputs)
            for inner in graph:
                own |= set(inner.outputs)
                read += [*inner.inputs, *captured_by(inner)]
            found |= dict.fromkeys(value for value in read if value is not None and value not in own)
    return list(found)


def _values(structure: Any) -> Iterator[ir.Value]:
    if isinstance(structure, ir.Value):
        yield structure
    elif isinstance(structure, (list, tuple, dict)):
        for item in structure.values() if isinstance(structure, dict) else structure:
            yield from _values(item)


def names_in(structure: Any) -> list[str]:
    """The names of all tensors in a structure, in order."""
    if isinstance(structure, Name):
        return [structure.value]
    if isinstance(structure, (list, tuple, dict)):
        items = structure.values() if isinstance(structure, dict) else structure
        return [name for item in items for name in names_in(item)]
    return []


def _named(structure: Any) -> Any:
    """The structure with names in the place of values."""
    if isinstance(structure, ir.Value):
        return Name(str(structure.name))
    if isinstance(structure, (list, tuple)):
        return type(structure)(_named(item) for item in structure)
    if isinstance(structure, dict):
        return {key: _named(item) for key, item in structure.items()}
    return structure


def with_tensors(call: Call, tensors: Mapping[str, Tensor]) -> tuple[Any, dict[str, Any]]:
    """What a call's function is given, with tensors by their names in the place of values."""

    def of(structure: Any) -> Any:
        if isinstance(structure, ir.Value):
            return tensors[str(structure.name)]
        if isinstance(structure, (list, tuple)):
            return type(structure)(of(item) for item in structure)
        return structure

    return of(call.args), {key: of(item) for key, item in call.kwargs.items()}


def last_uses(steps: list[Step], outputs: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """What nobody reads after each step."""
    seen, found = set(outputs), list[tuple[str, ...]]()
    for step in reversed(steps):
        names = dict.fromkeys((*names_in((step.args, step.kwargs)), *step.outputs))
        found.append(tuple(name for name in names if name not in seen))
        seen.update(names)
    return tuple(found[::-1])


def own_names(names: Mapping[str, None]) -> dict[str, str]:
    """Names of attributes for constants."""
    found: dict[str, str] = {}
    taken = set(dir(nn.Module())) | {"program"}
    for name in names:
        own = re.sub(r"\W", "_", name) or "constant"
        own = own if own.isidentifier() and not own.startswith("_") else f"constant_{own.lstrip('_')}"
        number, plain = 2, own
        while own in taken:
            own, number = f"{plain}_{number}", number + 1
        taken.add(own)
        found[name] = own
    return found
