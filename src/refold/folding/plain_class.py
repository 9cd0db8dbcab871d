"""Give one module another forward pass and keep all else: its class, attributes, hooks and other methods."""

from __future__ import annotations

import inspect
import itertools
import linecache
from typing import Any

from torch import fx, nn

_numbers = itertools.count()


def become_plain(module: nn.Module, graph: fx.Graph) -> None:
    """Change the forward pass of `module`, in place, to `graph`, and drop the layers that it no longer calls.

    The module becomes an instance of a subclass of its own class, of the same name, that pickles and copies. A layer
    that another of its methods mentions stays, so that the method keeps working.
    """
    base = getattr(type(module), "_base", type(module))
    module.__class__ = _plain_class(base, graph)
    _drop_unused(module, base, graph)


def _plain_class(base: type[nn.Module], graph: fx.Graph) -> type[nn.Module]:
    code = graph.python_code("self")
    filename = f"<plain {base.__name__} {next(_numbers)}>"
    linecache.cache[filename] = (len(code.src), None, code.src.splitlines(keepends=True), filename)
    namespace: dict[str, Any] = dict(code.globals)
    exec(compile(code.src, filename, "exec"), namespace)
    attributes = {
        "forward": namespace["forward"],
        "__reduce_ex__": _reduce,
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        "_base": base,
        "_graph": graph,
    }
    return type(base.__name__, (base,), attributes)


def _reduce(module: Any, _: Any) -> tuple[Any, ...]:
    return _restore, (module._base, module._graph), module.__getstate__()


def _restore(base: type[nn.Module], graph: fx.Graph) -> nn.Module:
    own = _plain_class(base, graph)
    return own.__new__(own)


def _drop_unused(module: nn.Module, base: type[nn.Module], graph: fx.Graph) -> None:
    used = {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}
    mentioned = _mentioned_by_methods(base)

    def prune(parent: nn.Module, prefix: str) -> None:
        for name in [*parent._parameters, *parent._buffers, *parent._modules]:
            path = f"{prefix}{name}"
            if path in used or (not prefix and name in mentioned):
                continue
            child = parent._modules.get(name)
            if child is not None and any(target.startswith(f"{path}.") for target in used):
                prune(child, f"{path}.")
            else:
                delattr(parent, name)

    prune(module, "")


def _mentioned_by_methods(base: type[nn.Module]) -> set[str]:
    """The names that any method but `forward` and the special ones uses."""
    names: set[str] = set()
    for owner in base.__mro__:
        if owner is nn.Module:
            break
        for name, method in vars(owner).items():
            function = inspect.unwrap(getattr(method, "__func__", method))
            if name != "forward" and not name.startswith("__") and inspect.isfunction(function):
                names |= set(function.__code__.co_names)
    return names
