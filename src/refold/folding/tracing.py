"""See any model as graphs of operators: which module called each one, and what its value looks like."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from refold.errors import NotFoldable

Call = tuple[str, int]
Scope = tuple[Call, ...]
"""The chain of module calls, (path, how often it was called there before), in which an operator runs."""
Key = tuple[Scope, str, int]
"""Names one operator of a module call, the same one each time that the module is traced."""
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
LeafRule = Callable[[nn.Module, str], bool]


class ScopeTracer(fx.Tracer):
    """A symbolic tracer that notes in `node.meta` the scope and the key of each operator."""

    def __init__(self, is_leaf: LeafRule | None = None) -> None:
        super().__init__()
        self._is_leaf = is_leaf or (lambda module, _: is_torch_leaf(module))
        self._counts: Counter[tuple[Scope, str]] = Counter()
        self._names: dict[int, str] = {}
        self.calls: list[Call] = []
        self.arguments: dict[Scope, Arguments] = {}
        self.failed: nn.Module | None = None

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        self.traced_func_name = forward_name(root)
        tensors = [*root.named_buffers(), *root.named_parameters()]
        self._names = {id(tensor): name for name, tensor in reversed(tensors)}
        before = set(root.__dict__)
        try:
            graph = super().trace(root, concrete_args)
        except Exception:
            self.failed = self.failed or root
            raise
        finally:
            self.constants = {name: root.__dict__.pop(name) for name in set(root.__dict__) - before}
        return graph

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self._is_leaf(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        self.calls.append((path, self._number(path)))
        self.arguments[tuple(self.calls)] = (args, kwargs)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or m
            raise
        finally:
            self.calls.pop()

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, target, *args, **kwargs)
        node.meta["scope"] = tuple(self.calls)
        label = "operator" if kind in ("call_function", "call_method") else f"{kind} {target}"
        node.meta["key"] = (tuple(self.calls), label, self._number(label))
        return node

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        # Buffers too: what a layer computes from them has to be seen, so that it can be repeated in float64.
        name = self._names.get(id(attr_val)) if isinstance(attr_val, Tensor) else None
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def _proxy_placeholder(self, name: str, concrete_args: Any, sig: Any, fn_for_analysis: Any) -> Any:
        proxy = super()._proxy_placeholder(name, None, sig, fn_for_analysis)
        return (concrete_args or {}).get(name, proxy)

    def _number(self, label: str) -> int:
        place = (tuple(self.calls), label)
        self._counts[place] += 1
        return self._counts[place] - 1


@dataclass
class Unit:
    """A part of the model that traces as a whole: its graph, and what running it on the example showed."""

    path: str
    module: nn.Module
    graph: fx.Graph
    arguments: Arguments
    constants: dict[str, Tensor]
    calls: dict[Scope, Arguments]
    """What every module that was traced into was called with; values of the graph are proxies."""
    shapes: dict[fx.Node, tuple[int, ...]] = field(default_factory=dict)
    kinds: dict[fx.Node, tuple[torch.dtype, torch.device]] = field(default_factory=dict)
    barriers: set[fx.Node] = field(default_factory=set)
    """Operators that read a tensor which is changed in place while others read it too: left alone."""
    handed_on: set[fx.Node] = field(default_factory=set)
    """Operators that returned the very tensor that they were given, unchanged."""
    rebound: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)
    """(operator, operand): the operator changed the operand in place, and whoever read that later reads its result."""

    def attribute(self, target: str) -> Any:
        """The module or tensor that `target` names in this unit."""
        if target in self.constants:
            return self.constants[target]
        value: Any = self.module
        for name in target.split("."):
            value = getattr(value, name)
        return value

    def called_modules(self) -> set[int]:
        """The ids of all modules that the graph calls or was traced through."""
        paths = {str(node.target) for node in self.graph.nodes if node.op == "call_module"}
        paths |= {scope[-1][0] for scope in self.calls if scope}
        return {id(self.module), *(id(self.module.get_submodule(path)) for path in paths)}

    def transparent_paths(self) -> set[str]:
        """The modules that were traced into and ran no operator: they hand on what they are given."""
        busy = {path for node in self.graph.nodes for path, _ in node.meta["scope"]}
        return {scope[-1][0] for scope in self.calls if scope} - busy

    def full_path(self, path: str) -> str:
        """The path in the whole model of a path in this unit."""
        return ".".join(part for part in (self.path, path) if part)

    def full_scope(self, scope: Scope) -> str:
        """The path in the whole model of the module whose call `scope` is."""
        return self.full_path(scope[-1][0] if scope else "")


def trace(module: nn.Module, arguments: Arguments, is_leaf: LeafRule) -> tuple[fx.Graph, dict[str, Tensor]]:
    """The graph of one module called with `arguments`, and the constant tensors that its code made.

    Arguments that are no tensors, and defaults, are taken as fixed. Raises whatever the module's code raises.
    """
    tracer = ScopeTracer(is_leaf)
    graph = tracer.trace(module, fixed_arguments(module, arguments))
    return graph, tracer.constants


def fixed_arguments(module: nn.Module, arguments: Arguments) -> dict[str, Any]:
    """The arguments of a call, defaults included, that hold no tensor: tracing takes them as they are."""
    signature = inspect.signature(module.forward)
    bound = signature.bind(*arguments[0], **arguments[1])
    fixed = {}
    for name, parameter in signature.parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        value = bound.arguments.get(name, parameter.default)
        if not any(isinstance(leaf, (Tensor, fx.Proxy)) for leaf in tree_leaves(value)):
            fixed[name] = value
    return fixed


def forward_name(module: nn.Module) -> str:
    """The method of its class that runs when the module is called. Raises NotFoldable where it is none."""
    own = vars(module).get("forward")
    if own is None:
        return "forward"
    if getattr(own, "__self__", None) is not module:
        raise NotFoldable("its forward is a function set on the instance, where tracing does not see it")
    return str(own.__name__)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module runs code that its forward does not show."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def is_torch_leaf(module: nn.Module) -> bool:
    """Whether the module is one of torch's own layers, which the graph keeps as one operator."""
    own = type(module).__module__.startswith(("torch.nn.", "torch.ao.nn."))
    return own and not isinstance(module, nn.Sequential)


def checks(graph: fx.Graph) -> set[fx.Node]:
    """The operators that only assert something about a value, and those that compute what is asserted or nothing."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op not in ("call_function", "call_method"):
            continue
        asserts = getattr(node.target, "__name__", "") in ("_assert", "_assert_is_none")
        serves = found.issuperset(node.users) and (node.users or node.target is getattr)
        if asserts or serves:
            found.add(node)
    return found


@contextmanager
def plain_mode() -> Iterator[None]:
    """No gradients, and tensors that count their changes even inside `torch.inference_mode`."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def copy_tensors(values: Any) -> Any:
    """The same structure with every tensor copied, since a forward pass may change its input in place."""
    return tree_map(lambda v: v.detach().clone() if isinstance(v, Tensor) else v, values)
