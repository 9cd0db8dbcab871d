"""See any model as a graph: run it once and write down every operator, the module calls around it, and its memory."""

from __future__ import annotations

import operator
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cached_property
from types import MethodDescriptorType, WrapperDescriptorType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from refold.folding.arguments import Arguments, copy_tensors, plain_mode, tensors_in
from refold.folding.sizes import Ratio, Size, tracked


class Call(NamedTuple):
    """One call of a module: its path, how often it was called there before, and whether this is the part of the call
    in which its hooks run, around the forward pass."""

    path: str
    number: int
    hooks: bool = False


Scope = tuple[Call, ...]
"""The chain of module calls in which an operator runs, from the model itself inwards."""
Key = tuple[Scope, str, int]
"""Names one operator of one module call, the same one each time that the model is recorded."""

_METADATA = {
    *(
        "dim",
        "ndimension",
        "is_contiguous",
        "is_floating_point",
        "is_complex",
        "is_same_size",
        "get_device",
        "type",
    ),
    *(
        "stride",
        "storage_offset",
        "data_ptr",
        "untyped_storage",
        "element_size",
        "_is_view",
        "is_signed",
        "__len__",
    ),
    *(
        "has_names",
        "is_tensor",
        "is_inference",
        "requires_grad_",
        "__hash__",
        "__repr__",
        "__format__",
        "_assert",
    ),
    *(
        "numel",
        "nelement",
        "size",
        "_has_compatible_shallow_copy_type",
        "is_pinned",
        "is_nested",
        "is_sparse",
    ),
}
"""What code may ask of a tensor without looking at its values."""
_REFLECTED = {"__rsub__": operator.sub, "__rdiv__": operator.truediv, "__rtruediv__": operator.truediv}
_REFLECTED |= {"__rpow__": operator.pow, "__rmatmul__": operator.matmul, "__rfloordiv__": operator.floordiv}
_INFIX: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
}
_INFIX |= {"neg": operator.neg, "matmul": operator.matmul, "__getitem__": operator.getitem}


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
    decisions: list[tuple[Scope, fx.Node]] = field(default_factory=list)
    """Where code compared a number computed from a size, or went on with it unseen: the call and the number."""
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


def record(model: nn.Module, arguments: Arguments, beside: Any = None) -> Recording:
    """Run `model`, a copy in evaluation mode that is thrown away, on `arguments` and write down what ran.

    `beside` is a mode to run it in as well. Raises whatever the model raises.
    """
    recorder = _Recorder(Recording(model, fx.Graph(), arguments))
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    before = {name: _state(tensor) for name, tensor in tensors.items()}
    chance = torch.get_rng_state()
    with plain_mode():
        given = copy_tensors(arguments)
        with beside or nullcontext(), recorder.watching():
            recorder.run(given)
    recording = recorder.recording
    recording.random = not torch.equal(chance, torch.get_rng_state())
    after = dict([*model.named_parameters(), *model.named_buffers()])
    recording.written = {
        name for name, state in before.items() if name not in after or _state(after[name]) != state
    }
    recorder.finish()
    return recording


def _state(tensor: Tensor) -> tuple[int, int, int]:
    return id(tensor), _version(tensor), 0 if tensor.is_meta else tensor.data_ptr()


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


class _Within:
    """While it is entered, nothing is written down."""

    def __init__(self, recorder: _Recorder) -> None:
        self._recorder = recorder

    def __enter__(self) -> None:
        self._recorder._inside += 1

    def __exit__(self, *_: object) -> None:
        self._recorder._inside -= 1


class _Recorder(TorchFunctionMode):
    """Writes down torch functions and module calls while it is the innermost mode."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
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

    def run(self, arguments: Arguments) -> None:
        """Call the model, its input being the graph's."""
        for index, value in enumerate(v for v in tree_leaves(arguments) if isinstance(v, Tensor)):
            node = self._create("placeholder", f"input_{index}", (), {})
            self.recording.varying.add(node)
            self._bind(value, node)
        result = self.recording.model(*arguments[0], **arguments[1])
        end = self.recording.graph.output(tuple(nodes_in(self._mapped(result))))
        end.meta["scope"] = ()
        with self._within():
            self.recording.outputs = [value.detach() for value in tensors_in(result)]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Intercept the calls of modules and of autograd functions, and every torch function."""
        call_module, apply = nn.Module.__call__, torch.autograd.Function.__dict__["apply"]
        recorder = self

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return recorder._module(module, lambda: call_module(module, *args, **kwargs), args, kwargs)

        def apply_function(cls: Any, *args: Any, **kwargs: Any) -> Any:
            own = FunctionCall(cls, apply.__get__(None, cls))
            return recorder._function(own, own, args, kwargs)

        nn.Module.__call__ = call  # type: ignore[method-assign]  # as torch.fx does
        torch.autograd.Function.apply = classmethod(apply_function)
        try:
            with self:
                yield
        finally:
            nn.Module.__call__ = call_module  # type: ignore[method-assign]
            torch.autograd.Function.apply = apply

    def finish(self) -> None:
        """Work out what needs the whole run: memory that is changed while others read it, and what varies."""
        recording = self.recording
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

    def decide(self, number: Size | Ratio) -> None:
        """Note that code compares a size."""
        if not self._inside:
            self.recording.decisions.append((self._scope, number.node))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._inside:
            return func(*args, **(kwargs or {}))
        return self._function(func, func, args, kwargs or {})

    def _function(self, func: Any, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = str(getattr(func, "__name__", ""))
        attribute = str(getattr(getattr(func, "__self__", None), "__name__", "")) if name == "__get__" else ""
        reads = list(_read(args)) + list(_read(kwargs))
        seen = [self._known(value) for value in reads]
        varies = any(node in self.recording.varying for node in seen if node is not None)
        with self._within():
            versions = [_version(value) for value in reads]
        chance = None if varies else torch.get_rng_state()
        with self._within():
            out = func(*args, **kwargs)
        if attribute == "shape" or name == "size":
            return self._sizes(reads[0], out, *args[1:], **kwargs) if varies else out
        if name == "__setitem__":
            self._note("call_function", set_item, args, kwargs, args[0], reads, versions)
            return out
        results = list(_read(out))
        if not results:
            if varies and not attribute and name not in _METADATA and name not in ("__set__", "__delete__"):
                self.recording.guarded[self._scope] = (
                    f"its code looks at the values of a tensor ({name.strip('_')})"
                )
            return out
        if attribute:
            kind, target, args = "call_function", getattr, (args[0], attribute)
        else:
            kind, target, args = _written_as(func, target, args, kwargs)
        node, out = self._note(kind, target, args, kwargs, out, reads, versions)
        if chance is not None and not torch.equal(chance, torch.get_rng_state()):
            self.recording.varying.add(node)
        self._note_rounding(node)
        return out

    def _note_rounding(self, node: fx.Node) -> None:
        """Note that an operator wrote smaller numbers than it read."""
        kinds = self.recording.kinds
        own = kinds.get(node)
        read = [kinds[v][0] for v in node.all_input_nodes if v in kinds]
        if own is not None and own[0].is_floating_point and read and own[0].itemsize < read[0].itemsize:
            self.recording.rounds_to.add(own[0])

    def _module(self, module: nn.Module, run: Callable[[], Any], args: Any, kwargs: Any) -> Any:
        path = self._paths.get(id(module))
        if path is None or self._inside:
            return run()
        if is_layer(module) and self._scope:
            reads = list(_read(args)) + list(_read(kwargs))
            with self._within():
                versions = [_version(value) for value in reads]
                out = run()
            return self._note("call_module", path, args, kwargs, out, reads, versions)[1]
        outer = self._scope
        try:
            if has_hooks(module):
                self._enter(path, hooks=True)
                self.recording.guarded[self._scope] = "it has hooks, which folding could change"
                self.recording.calls[self._scope] = call = ModuleCall(*self._mapped((args, kwargs)))
                with self._around_forward(module, path):
                    out = run()
            else:
                call = self._enter_call(path, args, kwargs)
                out = run()
            call.result = self._mapped(out)
            return out
        finally:
            self._scope = outer

    @contextmanager
    def _around_forward(self, module: nn.Module, path: str) -> Iterator[None]:
        """Open the scope of the forward pass itself inside that of the hooks."""
        own = vars(module).get("forward")
        forward = module.forward

        def recorded(*args: Any, **kwargs: Any) -> Any:
            outer = self._scope
            call = self._enter_call(path, args, kwargs)
            try:
                out = forward(*args, **kwargs)
                call.result = self._mapped(out)
                return out
            finally:
                self._scope = outer

        module.forward = recorded
        try:
            yield
        finally:
            del module.forward
            if own is not None:
                module.forward = own

    def _enter_call(self, path: str, args: Any, kwargs: Any) -> ModuleCall:
        self._enter(path)
        call = ModuleCall(*self._mapped((args, kwargs)))
        self.recording.calls[self._scope] = call
        return call

    def _enter(self, path: str, *, hooks: bool = False) -> None:
        place = (self._scope, f"enter {path}")
        self._scope = (*self._scope, Call(path, self._counts[place], hooks))
        self._counts[place] += 1

    def _within(self) -> _Within:
        """Inside one operator nothing is written down."""
        return _Within(self)

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
            changed = {id(v) for v, version in zip(reads, versions, strict=True) if _version(v) != version}
            places = {id(v): _storage(v) for v in reads}
            storages = {_storage(v) for v in _read(out)}
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
                if next(_read(item), None) is not None:
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
        if isinstance(value, (Size, Ratio)):
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

    def _side(self, value: Tensor, axis: int) -> Size | Ratio:
        node = self._create("call_method", "size", (self._node(value), axis), {})
        return self._number(node, self.recording.shapes[self._node(value)][axis])

    def _number(self, node: fx.Node, value: int | float) -> Size | Ratio:
        node.meta["number"] = value
        self.recording.varying.add(node)
        return tracked(value, node, self)


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


def _read(value: Any) -> Iterator[Tensor]:
    """The tensors in what a function is given or returns."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _read(item)


def set_item(tensor: Tensor, index: Any, value: Any) -> Tensor:
    """`tensor[index] = value`, and the tensor."""
    tensor[index] = value
    return tensor


def _written_as(
    func: Any, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[str, Any, tuple[Any, ...]]:
    """How a call is written down: as an infix operator, a method or a function."""
    name = str(getattr(func, "__name__", ""))
    if name in _REFLECTED and len(args) == 2:
        return "call_function", _REFLECTED[name], args[::-1]
    method = isinstance(func, (MethodDescriptorType, WrapperDescriptorType)) or func is getattr(
        Tensor, name, None
    )
    if not method:
        return "call_function", target, args
    if name in _INFIX and not kwargs and len(args) == (1 if name == "neg" else 2):
        return "call_function", _INFIX[name], args
    return "call_method", name, args


def _storage(value: Tensor) -> int:
    return id(value) if value.is_meta or value.layout != torch.strided else value.untyped_storage().data_ptr()


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
