"""See any model as graphs of operators: which module called each one, and what its value looks like."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
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

    def __init__(self, is_leaf: LeafRule) -> None:
        super().__init__()
        self._is_leaf = is_leaf
        self._counts: Counter[tuple[Scope, str]] = Counter()
        self._names: dict[int, str] = {}
        self.calls: list[Call] = []
        self.arguments: dict[Scope, Arguments] = {}
        self.failed: nn.Module | None = None

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
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
        return concrete_args.get(name, proxy)

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

    def full_path(self, path: str) -> str:
        """The path in the whole model of a path in this unit."""
        return ".".join(part for part in (self.path, path) if part)


@dataclass(frozen=True)
class Untraced:
    """A module that could not be traced, and why; its children are units of their own."""

    path: str
    reason: str


def find_units(model: nn.Module, arguments: Arguments) -> tuple[list[Unit], list[Untraced]]:
    """The largest traceable parts of `model` (all of it, mostly) and the modules that do not trace.

    A layer that cannot be traced, or that has hooks, becomes one opaque operator,
    and what is inside units of their own.
    """
    units: list[Unit] = []
    untraced: list[Untraced] = []
    waiting: dict[str, Arguments | None] = {"": arguments}
    seen = {id(model)}
    while waiting:
        inner: list[str] = []
        for path, given in waiting.items():
            module = model.get_submodule(path)
            try:
                if given is None:
                    raise NotFoldable("it is called with different arguments that are no tensors")
                unit, opaque = _trace_unit(path, module, given)
            except NotFoldable as refusal:
                untraced.append(Untraced(path, str(refusal)))
                inner += _children(module, path)
                continue
            units.append(unit)
            for target, reason in opaque.items():
                untraced.append(Untraced(unit.full_path(target), reason))
                child, inside = module.get_submodule(target), unit.full_path(target)
                inner += (
                    [inside] if has_hooks(child) and not is_torch_leaf(child) else _children(child, inside)
                )
        fresh = {id(model.get_submodule(path)): path for path in reversed(inner)}
        paths = [path for key, path in fresh.items() if key not in seen]
        seen |= set(fresh)
        waiting = _capture_arguments(model, arguments, paths) if paths else {}
    return units, untraced


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


def _trace_unit(path: str, module: nn.Module, arguments: Arguments) -> tuple[Unit, dict[str, str]]:
    """Trace one module, its untraceable layers opaque; also those layers and why. Raises NotFoldable."""
    if isinstance(module, torch.jit.ScriptModule):
        raise NotFoldable("it is a TorchScript module")
    if is_torch_leaf(module):
        raise NotFoldable("it is a single layer")
    reasons: dict[type[nn.Module], str] = {}

    def is_leaf(child: nn.Module, _: str) -> bool:
        return is_torch_leaf(child) or type(child) in reasons or has_hooks(child)

    while True:
        tracer = ScopeTracer(is_leaf)
        try:
            graph = tracer.trace(module, fixed_arguments(module, arguments))
            break
        except Exception as error:
            reason = f"its forward cannot be traced ({first_line(error)})"
            if tracer.failed is None or tracer.failed is module or type(tracer.failed) in reasons:
                raise NotFoldable(reason) from error
            reasons[type(tracer.failed)] = reason
    unit = Unit(path, module, graph, arguments, tracer.constants, {(): arguments, **tracer.arguments})
    try:
        _observe(unit)
    except Exception as error:
        if isinstance(error, NotFoldable):
            raise
        raise NotFoldable(f"its graph cannot be run on the example ({first_line(error)})") from error
    opaque = {}
    for node in graph.nodes:
        if node.op == "call_module":
            leaf = module.get_submodule(node.target)
            if has_hooks(leaf):
                opaque[node.target] = "it has hooks, which folding could change"
            elif not is_torch_leaf(leaf):
                opaque[node.target] = reasons[type(leaf)]
    return unit, opaque


def _children(module: nn.Module, path: str) -> list[str]:
    """Paths of the modules directly inside that have code of their own to trace; lists of modules have none."""
    paths = []
    for name, child in module.named_children():
        inner = f"{path}.{name}" if path else name
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)) and type(child).forward is nn.Module.forward:
            paths += _children(child, inner)
        elif not is_torch_leaf(child):
            paths.append(inner)
    return paths


def _capture_arguments(
    model: nn.Module, arguments: Arguments, paths: Iterable[str]
) -> dict[str, Arguments | None]:
    """What each of the modules is called with when the model runs on `arguments`; None where calls differ."""
    captured: dict[str, Arguments | None] = {}

    def hook_for(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            known = captured.setdefault(path, (copy_tensors(args), copy_tensors(kwargs)))
            if known is not None and _call_shape(module, known) != _call_shape(module, (args, kwargs)):
                captured[path] = None

        return hook

    hooks = [
        model.get_submodule(path).register_forward_pre_hook(hook_for(path), with_kwargs=True)
        for path in paths
    ]
    try:
        with plain_mode():
            model(*copy_tensors(arguments[0]), **copy_tensors(arguments[1]))
    finally:
        for hook in hooks:
            hook.remove()
    return captured


def _call_shape(module: nn.Module, arguments: Arguments) -> str:
    """The part of a call that tracing takes as fixed."""
    return repr(sorted(fixed_arguments(module, arguments).items()))


@contextmanager
def plain_mode() -> Iterator[None]:
    """No gradients, and tensors that count their changes even inside `torch.inference_mode`."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def copy_tensors(values: Any) -> Any:
    """The same structure with every tensor copied, since a forward pass may change its input in place."""
    return tree_map(lambda v: v.detach().clone() if isinstance(v, Tensor) else v, values)


def first_line(error: Exception) -> str:
    """The first line of an error message, or the error's name."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _observe(unit: Unit) -> None:
    bound = inspect.signature(unit.module.forward).bind(*unit.arguments[0], **unit.arguments[1])
    bound.apply_defaults()
    observer = _Observer(unit)
    with plain_mode():
        found = observer.run(*[copy_tensors(bound.arguments[p]) for p in _parameter_names(unit)])
        expected = unit.module.forward(*copy_tensors(unit.arguments[0]), **copy_tensors(unit.arguments[1]))
    if not _agree(_tensors(expected), _tensors(found)):
        raise NotFoldable("its code takes another way when it is traced")
    unit.rebound = observer.rebound
    for changer, operand in unit.rebound:
        rebind(changer, operand)
    unit.barriers = observer.barriers()


def _agree(expected: list[Tensor], found: list[Tensor]) -> bool:
    """Whether two runs of the same operators gave the same, up to the order in which threads add."""
    if [e.shape for e in expected] != [f.shape for f in found]:
        return False
    return all(
        torch.allclose(e, f, rtol=1e-2, atol=1e-3, equal_nan=True)
        for e, f in zip(expected, found, strict=True)
    )


def rebind(changer: fx.Node, operand: fx.Node) -> None:
    """Let what reads `operand` after `changer` has changed it in place read the result, which is the same tensor."""
    for user in list(operand.users):
        if user > changer:
            user.replace_input_with(operand, changer)


def _parameter_names(unit: Unit) -> list[str]:
    return [node.target.lstrip("*") for node in unit.graph.nodes if node.op == "placeholder"]


class _Observer(fx.Interpreter):
    """Runs a graph and notes shapes, which values share memory, and which are changed in place."""

    def __init__(self, unit: Unit) -> None:
        super().__init__(unit.module, graph=unit.graph)
        self.unit = unit
        self.order = {node: index for index, node in enumerate(unit.graph.nodes)}
        self.alias: dict[fx.Node, set[fx.Node]] = {}
        self.mutations: list[tuple[fx.Node, fx.Node]] = []
        self.readers: set[fx.Node] = set()
        self.rebound: list[tuple[fx.Node, fx.Node]] = []

    def fetch_attr(self, target: str) -> Any:
        return self.unit.attribute(target)

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return next(self.args_iter)

    def run_node(self, n: fx.Node) -> Any:
        inputs = {node: _tensors(self.env[node]) for node in n.all_input_nodes}
        versions = {node: [t._version for t in tensors] for node, tensors in inputs.items()}
        result = super().run_node(n)
        storages = {t.untyped_storage().data_ptr() for t in _tensors(result)}
        self.alias[n] = {n}
        for node, tensors in inputs.items():
            if [t._version for t in tensors] != versions[node]:
                self.mutations.append((n, node))
                if result is tensors[0]:
                    n.meta["operands"] = n.all_input_nodes
                    self.rebound.append((n, node))
            if any(t.untyped_storage().data_ptr() in storages for t in tensors):
                self.alias[n] |= self.alias[node]
        for node in self.alias[n]:
            self.alias[node] = self.alias[n]
        if isinstance(result, Tensor):
            self.unit.shapes[n] = tuple(result.shape)
            self.unit.kinds[n] = (result.dtype, result.device)
        if storages:
            self.readers.add(n)
        return result

    def barriers(self) -> set[fx.Node]:
        """Every operator that reads, or changes, memory which is changed while somebody else reads it."""
        found: set[fx.Node] = set()
        for mutation, operand in self.mutations:
            members = {m for m in self.alias[operand] if self.order[m] < self.order[mutation]}
            readers = {user for member in members for user in member.users} & self.readers
            arrived = self.unit.path and any(member.op == "placeholder" for member in members)
            if readers - members - {mutation} or arrived:  # code outside this unit may read what arrived, too
                found |= members | readers
        return found


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
