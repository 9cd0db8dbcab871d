"""Graphs of forward passes as plain JSON-able values, and back: only operators of torch, no code."""

from __future__ import annotations

import builtins
import math
import operator
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from refold.folding.plain_class import require_fixed
from refold.recording.recording import set_item


class CannotTell(Exception):
    """Something has no form as plain values."""


_OWN = {"set_item": set_item, "require_fixed": require_fixed}
_HOMES = {
    "operator": operator,
    "math": math,
    "torch": torch,
    "torch.nn.functional": torch.nn.functional,
    "torch._C._nn": torch._C._nn,
}
_ARITHMETIC = {
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "abs", "matmul", "getitem", "iadd"),
    *("ceil", "floor", "trunc"),
}


@cache
def _torch_functions() -> set[Any]:
    """The functions of torch that compute with tensors, and do nothing else."""
    listed = torch.overrides.get_overridable_functions()
    factories = {
        getattr(torch, n) for n in ("zeros", "ones", "full", "arange", "linspace", "empty", "tensor", "eye")
    }
    return {
        function for home, functions in listed.items() if home is not Tensor for function in functions
    } | factories


def graph_to_data(graph: fx.Graph) -> list[list[Any]]:
    """One entry an operator: name, kind, target, arguments by position and by name. Raises CannotTell."""
    return [
        [n.name, n.op, _target_name(n), _to_data(n.args), {k: _to_data(v) for k, v in n.kwargs.items()}]
        for n in graph.nodes
    ]


def graph_from_data(data: list[list[Any]]) -> fx.Graph:
    """The graph that `graph_to_data` wrote. Raises ValueError for an operator that no fold writes."""
    graph, nodes = fx.Graph(), dict[str, fx.Node]()
    for name, kind, target, args, kwargs in data:
        _require_names(kind, target, kwargs)
        if kind == "output":
            graph.output(_from_data(args, nodes)[0])
            continue
        found: Any = _function(target) if kind == "call_function" else target
        if kind == "call_method" and (not hasattr(Tensor, target) or target.startswith("__")):
            raise ValueError(f"'{target}' is no method of a tensor")
        given = {key: _from_data(value, nodes) for key, value in kwargs.items()}
        nodes[name] = graph.create_node(kind, found, _from_data(args, nodes), given, name=name)
    graph.lint()
    return graph


def _require_names(kind: str, target: str, kwargs: dict[str, Any]) -> None:
    """torch.fx writes these into Python code as they are, so that a name must not be able to be anything else."""
    is_name = (
        str.isidentifier(target.lstrip("*")) if kind == "placeholder" else not set(target) & set("\"'\\\r\n")
    )
    if not is_name or not all(key.isidentifier() for key in kwargs):
        raise ValueError(f"{target!r} with {list(kwargs)} is no name that a fold writes")


def _target_name(node: fx.Node) -> str:
    target: Any = node.target
    if node.op != "call_function":
        if node.op == "call_method" and str(target).startswith("__"):
            raise CannotTell(target)
        return str(target)
    name = str(getattr(target, "__name__", ""))
    if _OWN.get(name) is target:
        return name
    if target in (builtins.getattr, builtins.round):
        return f"builtins.{name}"
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return f"torch.ops.{target}"
    for home, module in _HOMES.items():
        if getattr(module, name, None) is target and _is_known(home, name, target):
            return f"{home}.{name}"
    raise CannotTell(name)


def _is_known(home: str, name: str, function: Any) -> bool:
    return name in _ARITHMETIC if home in ("operator", "math") else function in _torch_functions()


def _function(target: str) -> Any:
    if target in _OWN:
        return _OWN[target]
    home, _, name = target.rpartition(".")
    if target in ("builtins.getattr", "builtins.round"):
        return getattr(builtins, name)
    if target.startswith("torch.ops."):
        found: Any = torch.ops
        for part in target.removeprefix("torch.ops.").split("."):
            found = getattr(found, part)
        if "file" not in target and isinstance(found, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            return found
    elif home in _HOMES:
        found = getattr(_HOMES[home], name, None)
        if found is not None and _is_known(home, name, found):
            return found
    raise ValueError(f"'{target}' is no operator that a fold writes")


def _to_data(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, slice):
        return {"slice": [_to_data(part) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, tuple):
        return {"tuple": [_to_data(item) for item in value]}
    if isinstance(value, list):
        return [_to_data(item) for item in value]
    if isinstance(value, dict):
        return {"dict": [[_to_data(key), _to_data(item)] for key, item in value.items()]}
    if isinstance(value, (torch.dtype, torch.memory_format)):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if value is Ellipsis:
        return {"ellipsis": True}
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    raise CannotTell(type(value).__name__)


def _from_data(value: Any, nodes: dict[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_from_data(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[content]
    if kind == "slice":
        return slice(*(_from_data(part, nodes) for part in content))
    if kind == "tuple":
        return tuple(_from_data(item, nodes) for item in content)
    if kind == "dict":
        return {_from_data(key, nodes): _from_data(item, nodes) for key, item in content}
    if kind == "torch":
        found = getattr(torch, content)
        if isinstance(found, (torch.dtype, torch.memory_format)):
            return found
    if kind == "device":
        return torch.device(content)
    if kind == "ellipsis":
        return Ellipsis
    raise ValueError(f"{value!r} is no argument that a fold writes")
