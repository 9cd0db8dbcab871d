"""Write down what runs in a graph: values, the memory they share, sizes, and what varies."""

from __future__ import annotations

import operator
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from refold.recording.recording import Built, Recording, Scope
from refold.recording.sizes import Quotient, Size, tracked


class Within:
    """While it is entered, nothing is written down."""

    def __init__(self, recorder: Notebook) -> None:
        self._recorder = recorder

    def __enter__(self) -> None:
        self._recorder._inside += 1

    def __exit__(self, *_: object) -> None:
        self._recorder._inside -= 1


class Notebook:
    """The graph of a recording while it is written."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self._nodes: dict[int, tuple[weakref.ref[Tensor], fx.Node]] = {}
        self._scope: Scope = ()
        self._counts: Counter[tuple[Scope, str]] = Counter()
        self._inside = 0
        self._alias: dict[fx.Node, set[fx.Node]] = {}
        self._order: dict[fx.Node, int] = {}
        self._mutations: list[tuple[fx.Node, fx.Node]] = []
        model = recording.model
        self._paths = {id(m): name for name, m in reversed(list(model.named_modules()))}
        self._names = {id(t): n for n, t in reversed([*model.named_buffers(), *model.named_parameters()])}
        self._loose = {id(t): (n, t) for n, t in _loose_tensors(model) if id(t) not in self._names}

    def finish(self) -> None:
        """Work out what needs the whole run: memory that is changed while others read it, and what varies."""
        recording = self.recording
        self._inside += 1  # numbers that live on, in caches of the user's code, are heard no more
        for mutation, operand in self._mutations:
            members = {
                m for m in self._alias.get(operand, {operand}) if self._order[m] < self._order[mutation]
            }
            readers = {user for member in members for user in member.users} & set(self._alias) - members - {
                mutation
            }
            if any(self._order[reader] > self._order[mutation] for reader in readers):
                recording.barriers |= members | {mutation}
            recording.mutations.append((mutation, members))
            if any(member.op in ("placeholder", "get_attr") for member in members):
                recording.effects.add(mutation)
        for node in recording.graph.nodes:
            changes = node.op == "get_attr" and str(node.target) in recording.written
            if changes or recording.varying.intersection(node.all_input_nodes):
                recording.varying.add(node)

    def compute(self, function: Callable[..., Any], operands: tuple[Any, ...], value: int | float) -> Any:
        """Write down arithmetic on sizes."""
        if self._inside:
            return value
        return self._number(self._create("call_function", function, self._mapped(operands), {}), value)

    def decide(self, number: Size | Quotient) -> None:
        """Note that code compares a size."""
        if not self._inside:
            last = next(node for node in reversed(self.recording.graph.nodes) if "number" not in node.meta)
            self.recording.decisions.append((self._scope, number.node, last))

    def _within(self) -> Within:
        """Inside one operator nothing is written down."""
        return Within(self)

    def _note(
        self,
        kind: str,
        target: Any,
        args: Any,
        kwargs: Any,
        out: Any,
        reads: list[Tensor],
        versions: list[int],
    ) -> tuple[fx.Node, Any]:
        """Write down one operator that ran; also its result, as a tensor of its own where it was its input."""
        operands = {id(value): self._node(value) for value in reads}
        node = self._create(kind, target, *self._mapped((tuple(args), dict(kwargs))))
        recording = self.recording
        if recording.varying.intersection(node.all_input_nodes):
            recording.varying.add(node)
        with self._within():
            changed = {id(v) for v, version in zip(reads, versions, strict=True) if version_of(v) != version}
            places = {id(v): _storage(v) for v in reads}
            storages = {_storage(v) for v in tensors_read(out)}
        self._mutations += [(node, operands[identity]) for identity in changed]
        if isinstance(out, Tensor) and id(out) in changed:
            recording.same_as[node] = operands[id(out)]
        elif isinstance(out, Tensor) and id(out) in operands:
            recording.handed_on.add(node)
            with self._within():
                out = out.detach()
        self._alias[node] = {node}
        for value in reads:
            if places[id(value)] in storages:
                self._alias[node] |= self._alias.setdefault(operands[id(value)], {operands[id(value)]})
        for member in self._alias[node]:
            self._alias[member] = self._alias[node]
        self._bind(out, node)
        return node, out

    def _bind(self, value: Any, node: fx.Node) -> None:
        """Let whoever reads these tensors read `node`, or an item of it."""
        if isinstance(value, Tensor):
            self._nodes[id(value)] = (weakref.ref(value), node)
            with self._within():
                self.recording.shapes[node] = tuple(value.shape)
                self.recording.kinds[node] = (value.dtype, value.device)
        elif isinstance(value, (list, tuple, dict)):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in items:
                if next(tensors_read(item), None) is not None:
                    part = self._create("call_function", operator.getitem, (node, key), {})
                    self._alias[part] = self._alias[node]
                    self._alias[node].add(part)
                    if node in self.recording.varying:
                        self.recording.varying.add(part)
                    self._bind(item, part)

    def _known(self, value: Tensor) -> fx.Node | None:
        found = self._nodes.get(id(value))
        return found[1] if found is not None and found[0]() is value else None

    def _node(self, value: Tensor) -> fx.Node:
        found = self._known(value)
        if found is not None:
            return found
        recording = self.recording
        name = self._names.get(id(value))
        if name is None and id(value) in self._loose:
            name = self._loose[id(value)][0]
            recording.constants[name] = value
        node = self._create("get_attr", name or f"_constant_{len(recording.unseen)}", (), {})
        if name is None:
            recording.unseen[node] = value
            recording.constants[str(node.target)] = value
        self._bind(value, node)
        return node

    def _mapped(self, value: Any) -> Any:
        """The same structure with nodes in the place of tensors and of numbers computed from sizes."""
        if isinstance(value, Tensor):
            return self._node(value)
        if isinstance(value, (Size, Quotient)):
            return value.node
        if isinstance(value, slice):
            return slice(self._mapped(value.start), self._mapped(value.stop), self._mapped(value.step))
        if is_dataclass(value) and not isinstance(value, type):
            given = {f.name: getattr(value, f.name) for f in fields(value) if f.init}
            return Built(type(value), {k: self._mapped(v) for k, v in given.items() if v is not None})
        if isinstance(value, tuple):
            items = [self._mapped(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        if isinstance(value, list):
            return [self._mapped(item) for item in value]
        if isinstance(value, dict):
            return {key: self._mapped(item) for key, item in value.items()}
        return value

    def _create(self, kind: str, target: Any, args: Any, kwargs: Any) -> fx.Node:
        node = self.recording.graph.create_node(kind, target, args, kwargs)
        label = f"{kind} {target if isinstance(target, str) else getattr(target, '__name__', target)}"
        place = (self._scope, label)
        scope = () if kind == "get_attr" else self._scope
        node.meta["scope"], node.meta["key"] = scope, (scope, label, self._counts[place])
        self._counts[place] += 1
        self._order[node] = len(self._order)
        return node

    def _sizes(self, value: Tensor, out: int | torch.Size, *given: Any, dim: int | None = None) -> Any:
        axis = given[0] if given and isinstance(given[0], int) else dim
        if isinstance(out, torch.Size):
            sides: list[Any] = [self._side(value, axis) for axis in range(len(out))]
            return torch.Size(sides)
        return (
            out
            if axis is None
            else self._side(value, int(axis) % len(self.recording.shapes[self._node(value)]))
        )

    def _side(self, value: Tensor, axis: int) -> Size | Quotient:
        node = self._create("call_method", "size", (self._node(value), axis), {})
        return self._number(node, self.recording.shapes[self._node(value)][axis])

    def _number(self, node: fx.Node, value: int | float) -> Size | Quotient:
        node.meta["number"] = value
        self.recording.varying.add(node)
        return tracked(value, node, self)


def version_of(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def tensors_read(value: Any) -> Iterator[Tensor]:
    """The tensors in what a function is given or returns."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_read(item)


def _storage(value: Tensor) -> int:
    try:
        return id(value) if value.is_meta else value.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # sparse tensors and those of torch.vmap have none
        return id(value)


def _loose_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors in attributes of modules that are neither parameters nor buffers."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers", "_modules"):
                continue
            for index, leaf in enumerate(tree_leaves(value)):
                if isinstance(leaf, Tensor):
                    place = f"{path}.{name}" if path else name
                    yield (place if leaf is value else f"{place}_{index}".replace(".", "_")), leaf
