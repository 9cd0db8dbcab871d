"""The forward pass of one module call as a graph, written down from a recording."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Set
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from refold.errors import NotFoldable
from refold.folding.graphs import GraphCopy
from refold.folding.plain_class import require_fixed
from refold.folding.rewrite import NewLayer, Value
from refold.recording.recording import Built, ModuleCall, Recording, Scope, has_hooks, is_layer, nodes_in
from refold.recording.surroundings import fixed_part

_STARS: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


class ScopeGraph:
    """Writes the graph of one module call: its own operators, those of opened modules inside, and calls of others."""

    def __init__(
        self,
        recording: Recording,
        scope: Scope,
        opened: Set[str],
        steps: Mapping[fx.Node, Value],
        register: Callable[[NewLayer, str], str],
    ) -> None:
        self._recording, self._scope, self._opened = recording, scope, opened
        self._steps = steps
        self._module = recording.attribute(scope[-1].path)
        self._below = {id(m): name for name, m in reversed(list(self._module.named_modules()))}
        self._copy = GraphCopy(recording, steps, self._name_below, self._tensor_below, register)
        self._entered: set[Scope] = set()
        self.tensors: dict[str, torch.Tensor] = {}
        """Constant tensors that the module needs, by the names under which the graph reads them."""

    def graph(self, removable: Set[fx.Node]) -> fx.Graph:
        """The graph, without what nobody reads any more. Raises NotFoldable where it cannot be written down."""
        for scope, reasons in ((s, r) for r in (self._recording.closed, self._recording.guarded) for s in r):
            if scope == self._scope or (scope[: len(self._scope)] == self._scope and self._is_opened(scope)):
                raise NotFoldable(f"{reasons[scope]}, in {scope[-1].path or 'the model'}")
        call = self._recording.calls[self._scope]
        forward_name(self._module)
        self._placeholders(call)
        length = len(self._scope)
        for node in self._recording.within.get(self._scope, ()):
            scope = node.meta["scope"]
            if node.op == "placeholder":
                continue
            closed = next(
                (i for i in range(length, len(scope)) if scope[i].hooks or scope[i].path not in self._opened),
                None,
            )
            if closed is None:
                self._copy.copy(node)
            else:
                self._enter(scope[: closed + 1])
        self._copy.graph.output(self._returned(call.result))
        self._sweep(removable)
        return self._copy.graph

    def _is_opened(self, scope: Scope) -> bool:
        return all(call.path in self._opened for call in scope[len(self._scope) :])

    def _placeholders(self, call: ModuleCall) -> None:
        signature = inspect.signature(self._module.forward)
        bound = signature.bind(*call.args, **call.kwargs)
        graph, fixed = self._copy.graph, list[tuple[fx.Node, Any, str]]()
        times = Counter(node for value in bound.arguments.values() for node in nodes_in(value))
        twice = [node for node, count in times.items() if count > 1 and node in self._recording.shapes]
        for name, parameter in signature.parameters.items():
            stars = _STARS.get(parameter.kind, "")
            empty = bool(stars) or parameter.default is inspect.Signature.empty
            default: tuple[Any, ...] = () if empty else (parameter.default,)
            node = graph.create_node("placeholder", stars + name, default)
            value = bound.arguments.get(name, parameter.default)
            if any(True for _ in nodes_in(value)):
                self._copy.items(node, value)
            elif not stars and _is_plain(value):
                fixed.append((node, value, name))
        for node, value, name in fixed:
            graph.call_function(require_fixed, (node, value, name))
        for node in twice:
            del self._copy.values[node]

    def _enter(self, scope: Scope) -> None:
        """Call a module that stays closed, where its first operator ran."""
        if scope in self._entered:
            return
        self._entered.add(scope)
        call = self._recording.calls[scope]
        args, kwargs = self._arguments((call.args, call.kwargs))
        node = self._copy.graph.create_node("call_module", self._name_below(scope[-1].path), args, kwargs)
        self._copy.items(node, call.result)

    def _arguments(self, structure: Any) -> Any:
        if isinstance(structure, Built):
            given = {name: self._arguments(part) for name, part in structure.fields.items()}
            return self._copy.graph.create_node("call_function", structure.kind, (), given)
        if isinstance(structure, tuple) and hasattr(structure, "_fields"):
            return type(structure)(*(self._arguments(part) for part in structure))
        if isinstance(structure, (list, tuple)):
            return type(structure)(self._arguments(part) for part in structure)
        if isinstance(structure, dict):
            return {key: self._arguments(part) for key, part in structure.items()}
        if isinstance(structure, (fx.Node, slice)):
            return self._copy.mapped(structure)
        if not _is_plain(structure):
            raise NotFoldable(
                f"an object of class {type(structure).__name__} is handed on, which cannot be written down"
            )
        return structure

    def _returned(self, result: Any) -> Any:
        return self._arguments(result)

    def _sweep(self, removable: Set[fx.Node]) -> None:
        """Remove what nobody reads any more because it was folded, and identities that stood between."""
        recording, graph = self._recording, self._copy.graph
        origin = {made: node for node, made in self._copy.values.items()}
        for node in reversed(list(graph.nodes)):
            own = origin.get(node)
            kept = (
                node.op in ("placeholder", "output")
                or node.target is require_fixed
                or own in recording.effects
            )
            unread_before = (
                own is not None and own not in removable and not own.users and own in recording.varying
            )
            if not node.users and not kept and not unread_before and not self._calls_unread(node):
                graph.erase_node(node)
        for node in list(graph.nodes):
            if node.op == "call_module" and self._is_identity(str(node.target)):
                node.replace_all_uses_with(node.all_input_nodes[0])
                graph.erase_node(node)
        for node in graph.nodes:
            node.meta.clear()
        graph.lint()

    def _calls_unread(self, node: fx.Node) -> bool:
        """Whether it is the call of a module whose result nobody read before either."""
        if node.op != "call_module":
            return False
        path = f"{self._scope[-1].path}.{node.target}".strip(".")
        scopes = [scope for scope in self._entered if scope[-1].path == path]
        return any(not any(n.users for n in nodes_in(self._recording.calls[s].result)) for s in scopes)

    def _is_identity(self, name: str) -> bool:
        try:
            module = self._module.get_submodule(name)
        except AttributeError:
            return False
        return type(module) is nn.Identity and not has_hooks(module)

    @cached_property
    def _own_tensors(self) -> dict[int, str]:
        own = [
            *self._module.named_buffers(remove_duplicate=False),
            *self._module.named_parameters(remove_duplicate=False),
        ]
        return {id(tensor): name for name, tensor in reversed(own)}

    def _name_below(self, path: str) -> str:
        module = self._recording.attribute(path)
        name: str | None = self._below.get(id(module))
        if not name:
            raise NotFoldable(
                f"{path} is called from {self._scope[-1].path or 'the model'}, which does not hold it"
            )
        return name

    def _tensor_below(self, path: str) -> str:
        value = self._recording.attribute(path)
        name = self._own_tensors.get(id(value))
        if name is None:
            name = f"constant_{path}".replace(".", "_")
            self.tensors[name] = value
        return name


def fixed_arguments(module: nn.Module, call: ModuleCall) -> str:
    """The arguments of a call by their names, in words, values left out: the same for calls that do the same."""
    bound = inspect.signature(module.forward).bind(*call.args, **call.kwargs)
    return repr({name: fixed_part(value) for name, value in bound.arguments.items()})


def forward_name(module: nn.Module) -> str:
    """The method of its class that runs when the module is called. Raises NotFoldable where it is none."""
    own = vars(module).get("forward")
    if own is None:
        return "forward"
    if getattr(own, "__self__", None) is not module:
        raise NotFoldable("its forward is a function set on the instance, where nobody can replace it")
    return str(own.__name__)


def paths_below(scope: Scope, others: Set[Scope]) -> set[str]:
    """The modules that calls inside of `scope` lead through."""
    return {call.path for other in others for call in other[len(scope) :]}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return isinstance(value, (*_PLAIN, torch.memory_format))


def is_container(module: nn.Module) -> bool:
    """Whether the module is one of those whose places are named by numbers or keys."""
    return isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict, fx.GraphModule)) or is_layer(
        module
    )
