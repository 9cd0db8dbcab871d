"""See any model as a graph: run it once and write down every operator, the module calls around it, and its memory."""

from __future__ import annotations

import builtins
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from types import MethodDescriptorType, WrapperDescriptorType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from refold.recording.arguments import Arguments, copy_tensors, plain_mode, tensors_in
from refold.recording.notes import Notebook, tensors_read, version_of
from refold.recording.recording import (
    Call,
    FunctionCall,
    ModuleCall,
    Recording,
    has_hooks,
    is_layer,
    nodes_in,
    set_item,
)
from refold.recording.sizes import Quotient, Size

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
_INFIX |= {
    "neg": operator.neg,
    "pow": operator.pow,
    "matmul": operator.matmul,
    "__getitem__": operator.getitem,
}


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
    return id(tensor), version_of(tensor), 0 if tensor.is_meta else tensor.data_ptr()


class _Recorder(Notebook, TorchFunctionMode):
    """Writes down torch functions and module calls while it is the innermost mode."""

    def __init__(self, recording: Recording) -> None:
        Notebook.__init__(self, recording)
        TorchFunctionMode.__init__(self)

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
        wrapped = [
            (home, name, home[name]) for home, name in _wrapped_functions() if callable(home.get(name))
        ]
        for home, name, function in wrapped:
            home[name] = recorder._as_operator(function)
        try:
            with self:
                yield
        finally:
            for home, name, function in wrapped:
                home[name] = function
            nn.Module.__call__ = call_module  # type: ignore[method-assign]
            torch.autograd.Function.apply = apply

    def _as_operator(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            if self._inside or next(tensors_read((args, kwargs)), None) is None:
                return function(*args, **kwargs)
            return self._function(function, function, args, kwargs)

        return run

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._inside:
            return func(*args, **(kwargs or {}))
        return self._function(func, func, args, kwargs or {})

    def _function(self, func: Any, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = str(getattr(func, "__name__", ""))
        attribute = str(getattr(getattr(func, "__self__", None), "__name__", "")) if name == "__get__" else ""
        reads = list(tensors_read(args)) + list(tensors_read(kwargs))
        seen = [self._known(value) for value in reads]
        varies = any(node in self.recording.varying for node in seen if node is not None)
        with self._within():
            versions = [version_of(value) for value in reads]
        chance = None if varies else torch.get_rng_state()
        with self._within():
            out = func(*args, **kwargs)
        if attribute == "shape" or name == "size":
            return self._sizes(reads[0], out, *args[1:], **kwargs) if varies else out
        if name in ("numel", "nelement", "__len__", "stride") and varies:
            return self._extent(reads[0], name, out)
        if name == "__setitem__":
            self._note("call_function", set_item, args, kwargs, args[0], reads, versions)
            return out
        results = list(tensors_read(out))
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
        if name in ("split", "unbind", "tensor_split") and varies and isinstance(out, (list, tuple)):
            self._pieces(reads[0], name, args, kwargs)
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

    def _extent(self, value: Tensor, name: str, out: Any) -> Any:
        """A number of elements; a length or a stride, which code goes on with unseen."""
        if name in ("numel", "nelement"):
            return self._number(self._create("call_method", "numel", (self._node(value),), {}), out)
        self.decide(self._side(value, 0))
        return out

    def _pieces(self, value: Tensor, name: str, args: Any, kwargs: dict[str, Any]) -> None:
        """How many pieces there are depends on a size, and code may do something for each of them."""
        given = kwargs.get(
            "dim", args[1 if name == "unbind" else 2] if len(args) > (1 if name == "unbind" else 2) else 0
        )
        with self._within():
            dimensions = value.dim()
        if isinstance(given, int):
            self.decide(self._side(value, given % dimensions))

    def _module(self, module: nn.Module, run: Callable[[], Any], args: Any, kwargs: Any) -> Any:
        path = self._paths.get(id(module))
        if path is None or self._inside:
            return run()
        if is_layer(module) and self._scope:
            reads = list(tensors_read(args)) + list(tensors_read(kwargs))
            with self._within():
                versions = [version_of(value) for value in reads]
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
            if self._scope in self.recording.guarded and not has_hooks(module) and _holds_plain_values(out):
                self.recording.guarded[outer] = self.recording.guarded[self._scope]
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


def _wrapped_functions() -> list[tuple[dict[str, Any], str]]:
    """The functions whose authors said with `torch.fx.wrap` that they are one operator: where they live, and names."""
    known: dict[tuple[int, str], dict[str, Any]] = getattr(fx._symbolic_trace, "_wrapped_fns_to_patch", {})
    return [(home, name) for (_, name), home in known.items() if name not in vars(builtins)]


def _holds_plain_values(value: Any) -> bool:
    """Whether a result tells its caller something that is no tensor."""
    if isinstance(value, (list, tuple, dict)):
        return any(map(_holds_plain_values, value.values() if isinstance(value, dict) else value))
    return isinstance(value, (bool, int, float, str)) and not isinstance(value, (Size, Quotient))


def _written_as(
    func: Any, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[str, Any, tuple[Any, ...]]:
    """How a call is written down: as an infix operator, a method or a function."""
    name = str(getattr(func, "__name__", ""))
    if name in _REFLECTED and len(args) == 2:
        return "call_function", _REFLECTED[name], args[::-1]
    own = func is getattr(Tensor, name, None) or getattr(func, "__module__", "") == "torch._tensor"
    method = own or isinstance(func, (MethodDescriptorType, WrapperDescriptorType))
    if not method:
        return "call_function", target, args
    if name in _INFIX and not kwargs and len(args) == (1 if name == "neg" else 2):
        return "call_function", _INFIX[name], args
    return "call_method", name, args
