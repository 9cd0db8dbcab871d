"""The run of a model as data: its operators in order, the module calls around them, and the memory they share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.overrides import handle_torch_function, has_torch_function

from refold.recording.arguments import Arguments


class Call(NamedTuple):
    """One call of a module: its path, how often it was called there before, and whether this is the part of the call
    in which its hooks run, around the forward pass."""

    path: str
    number: int
    hooks: bool = False


Scope = tuple[Call, ...]
"""The chain of module calls in which an operator runs, from the model itself inwards."""
OperatorKey = tuple[Scope, str, int]
"""Names one operator of one module call, the same one each time that the model is recorded."""


@dataclass(frozen=True)
class Built:
    """An object that a module returned or was given, by its class and the values of its fields."""

    kind: type
    fields: dict[str, Any]


@dataclass(frozen=True)
class FunctionCall:
    """The call of a user's own autograd function, as an operator of a graph."""

    kind: type[torch.autograd.Function]
    run: Callable[..., Any] | None = field(default=None, compare=False, repr=False)

    @property
    def __name__(self) -> str:
        return f"{self.kind.__name__}_apply"

    def __call__(self, *args: Any) -> Any:
        return (self.run or self.kind.apply)(*args)

    def __reduce__(self) -> Any:
        return FunctionCall, (self.kind,)


@dataclass(frozen=True)
class PlacedFunction:
    """A function that is recorded as one operator and stands at a place of its own: an operator of a file.

    The registry knows it as `operator`, or not at all where that is empty. Two places are two functions, whatever they
    run.
    """

    run: Callable[..., Any] = field(compare=False, repr=False)
    operator: str
    kind: str
    """What the file calls it."""
    place: str
    """Where it stands, in words: modules from the outermost inwards, with dots between."""
    number: int
    """Which operator of the file it is."""

    @property
    def __name__(self) -> str:
        return self.kind

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if has_torch_function(args):  # so that whoever watches torch's functions sees one operator
            return handle_torch_function(self, args, *args, **kwargs)
        return self.run(*args, **kwargs)


@dataclass
class ModuleCall:
    """What a module was called with and what it returned, nodes of the graph in the place of tensors and sizes."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any = None


@dataclass
class Recording:
    """A run of a model: its operators in the order they ran, and what was seen of each."""

    model: nn.Module
    graph: fx.Graph
    arguments: Arguments
    calls: dict[Scope, ModuleCall] = field(default_factory=dict)
    shapes: dict[fx.Node, tuple[int, ...]] = field(default_factory=dict)
    kinds: dict[fx.Node, tuple[torch.dtype, torch.device]] = field(default_factory=dict)
    varying: set[fx.Node] = field(default_factory=set)
    """The values that depend on the input, on chance, or on what the model changes while it runs."""
    barriers: set[fx.Node] = field(default_factory=set)
    """Operators whose result is changed in place by others, and read afterwards: nothing is folded into them."""
    mutations: list[tuple[fx.Node, set[fx.Node]]] = field(default_factory=list)
    """Operators that change memory in place, and the values that lie there."""
    same_as: dict[fx.Node, fx.Node] = field(default_factory=dict)
    """Operators that returned their operand itself, changed in place, and that operand."""
    effects: set[fx.Node] = field(default_factory=set)
    """Operators that change the input or a tensor of the model."""
    handed_on: set[fx.Node] = field(default_factory=set)
    """Operators that returned their input unchanged."""
    written: set[str] = field(default_factory=set)
    """Parameters and buffers that the forward pass changes."""
    guarded: dict[Scope, str] = field(default_factory=dict)
    """Calls whose own code, or hooks, look at values: nothing is folded across it; and why."""
    closed: dict[Scope, str] = field(default_factory=dict)
    """Calls whose forward pass cannot be written down from this recording, and why."""
    decisions: list[tuple[Scope, fx.Node, fx.Node]] = field(default_factory=list)
    """Where code compared a number computed from a size, or went on with it unseen: the call, the number, and the
    last operator before."""
    steady: dict[fx.Node, int | float] = field(default_factory=dict)
    """Numbers computed from sizes that were the same at another size, such as those of channels."""
    unseen: dict[fx.Node, Tensor] = field(default_factory=dict)
    """Tensors that came from code which nobody can look into."""
    constants: dict[str, Tensor] = field(default_factory=dict)
    """Tensors that are neither parameters nor buffers, by the name of their node."""
    random: bool = False
    """Whether the forward pass drew random numbers."""
    rounds_to: set[torch.dtype] = field(default_factory=set)
    outputs: list[Tensor] = field(default_factory=list)
    """The tensors that the model returned, in its own dtype."""

    def sweep(self) -> None:
        """Forget sizes that nothing is computed from."""
        for node in reversed(list(self.graph.nodes)):
            if not node.users and "number" in node.meta:
                self.graph.erase_node(node)

    @cached_property
    def within(self) -> dict[Scope, list[fx.Node]]:
        """The operators that run in each call, and in calls inside of it, in order."""
        found: dict[Scope, list[fx.Node]] = {}
        for node in self.graph.nodes:
            scope = node.meta.get("scope", ())
            for length in range(1, len(scope) + 1):
                found.setdefault(scope[:length], []).append(node)
        return found

    @cached_property
    def readers(self) -> dict[str, set[fx.Node]]:
        """What reads the parameters and buffers of a module itself, by the module's path."""
        found: dict[str, set[fx.Node]] = {}
        for node in self.graph.nodes:
            if node.op == "get_attr":
                found.setdefault(str(node.target).rpartition(".")[0], set()).update(node.users)
        return found

    def attribute(self, target: str) -> Any:
        """The module or tensor that `target` names in the model."""
        if target in self.constants:
            return self.constants[target]
        value: Any = self.model
        for name in target.split(".") if target else ():
            value = getattr(value, name)
        return value


_HOMES = {"torch", "_operator", "builtins", ""}


def name_of(target: Any) -> str:
    """The name under which the registry of operators knows a function or method, empty where it is not torch's own."""
    if isinstance(target, str):
        return target.rstrip("_")
    if isinstance(target, PlacedFunction):
        return target.operator
    name = str(getattr(target, "__name__", ""))
    home = str(getattr(target, "__module__", None) or "")
    if home.startswith("torch._ops") and home != "torch._ops.aten":
        return ""
    if home.split(".")[0] not in _HOMES and not home.startswith("refold.recording"):
        return ""
    return name.split(".")[0].rstrip("_")


def path_of(node: fx.Node) -> str:
    """Where an operator runs: its place in a file, or the path of the module whose code calls it."""
    if isinstance(node.target, PlacedFunction):
        return node.target.place
    scope: Scope = node.meta["scope"]
    return scope[-1].path


def common_path(nodes: Iterable[fx.Node]) -> str:
    """The path of the innermost module that all of the operators run in, or what their places have in common."""
    found = list(nodes)
    if not all(isinstance(node.target, PlacedFunction) for node in found):
        return common_scope([node.meta["scope"] for node in found])[-1].path
    parts = zip(*(path_of(node).split(".") for node in found), strict=False)
    return ".".join(each[0] for each in takewhile(lambda names: len(set(names)) == 1, parts))


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module runs code that its forward does not show."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def is_layer(module: nn.Module) -> bool:
    """Whether the module is recorded as one operator: torch's own layers, and what is compiled."""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    if isinstance(module, (nn.Sequential, nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return False
    inner = list(module.modules())
    return all(type(each).__module__.startswith(("torch.nn.", "torch.ao.nn.")) for each in inner)


def common_scope(scopes: list[Scope]) -> Scope:
    """The innermost module call that all of the scopes are in."""
    shortest = min(scopes, key=len)
    length = next((i for i in range(len(shortest)) if len({s[i] for s in scopes}) > 1), len(shortest))
    return shortest[:length]


def nodes_in(value: Any) -> Iterator[fx.Node]:
    """All nodes in a structure of a call."""
    if isinstance(value, fx.Node):
        yield value
    elif isinstance(value, Built):
        yield from nodes_in(value.fields)
    elif isinstance(value, slice):
        yield from nodes_in((value.start, value.stop, value.step))
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from nodes_in(item)


def set_item(tensor: Tensor, index: Any, value: Any) -> Tensor:
    """`tensor[index] = value`, and the tensor."""
    tensor[index] = value
    return tensor
