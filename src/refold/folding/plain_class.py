"""Give one module another forward pass and keep all else: its class, attributes, hooks and other methods."""

from __future__ import annotations

import importlib
import inspect
import itertools
import linecache
from collections.abc import Iterator
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any, NoReturn

from torch import fx, nn

from refold.errors import InputError

_numbers = itertools.count()


def become_plain(module: nn.Module, graph: fx.Graph, *, keep_methods: bool) -> None:
    """Change the forward pass of `module`, in place, to `graph`, and drop the layers that it no longer calls.

    The module becomes an instance of a subclass of its own class, of the same name, that pickles and copies. A layer
    that another of its methods mentions stays where `keep_methods` is set, so that the method keeps working; otherwise
    it goes, and the method with it.
    """
    base = getattr(type(module), "_base", type(module))
    mentioned = {name: set(function.__code__.co_names) for name, function in _methods(base)}
    kept = set().union(*mentioned.values()) if keep_methods else set()
    dropped = _drop_unused(module, graph, kept)
    gone = tuple(sorted(name for name, names in mentioned.items() if names & dropped))
    code = graph.python_code("self")
    names = {
        name: _Reference(value.__name__) if isinstance(value, ModuleType) else value
        for name, value in code.globals.items()
    }
    vars(module).pop("forward", None)  # one that was set on the instance
    module.__class__ = _plain_class(base, code.src, names, gone)


def require_fixed(value: Any, fixed: Any, name: str) -> None:
    """Raise InputError where an argument that folding took as fixed is now given another value."""
    if value is not fixed and value != fixed:
        raise InputError(
            f"this network was folded for {name}={fixed!r}, not {value!r}; "
            "fold it with that value in the example input."
        )


@dataclass(frozen=True)
class _Reference:
    """Stands for an imported module where code is pickled."""

    module: str


class _Gone:
    """In the place of a method that needs layers which were folded away."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: object, owner: type) -> NoReturn:
        raise AttributeError(f"{owner.__name__}.{self.name} needs layers that were folded away")


def _plain_class(
    base: type[nn.Module], source: str, names: dict[str, Any], gone: tuple[str, ...]
) -> type[nn.Module]:
    filename = f"<plain {base.__name__} {next(_numbers)}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace = {
        name: importlib.import_module(value.module) if isinstance(value, _Reference) else value
        for name, value in names.items()
    }
    exec(compile(source, filename, "exec"), namespace)
    attributes = {
        **{name: _Gone() for name in gone},
        "forward": namespace["forward"],
        "__reduce_ex__": _reduce,
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        "_base": base,
        "_recipe": (base, source, names, gone),
    }
    return type(base.__name__, (base,), attributes)


def _reduce(module: Any, _: Any) -> tuple[Any, ...]:
    return _restore, module._recipe, module.__getstate__()


def _restore(base: type[nn.Module], source: str, names: dict[str, Any], gone: tuple[str, ...]) -> nn.Module:
    own = _plain_class(base, source, names, gone)
    return own.__new__(own)


def _drop_unused(module: nn.Module, graph: fx.Graph, kept: set[str]) -> set[str]:
    """Drop what the graph does not use; the names of the direct parts that went."""
    used = {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}
    dropped: set[str] = set()

    def prune(parent: nn.Module, prefix: str) -> None:
        for name in [*parent._parameters, *parent._buffers, *parent._modules]:
            path = f"{prefix}{name}"
            if path in used or (not prefix and name in kept):
                continue
            child = parent._modules.get(name)
            if child is not None and any(target.startswith(f"{path}.") for target in used):
                prune(child, f"{path}.")
                continue
            if child is None:
                # The name stays, without a tensor: PyTorch's own layers ask for it when they are printed.
                setattr(parent, name, None)
                if name == "num_batches_tracked":  # a norm that counts puts it back when it is loaded
                    parent.track_running_stats = False  # type: ignore[assignment]  # nn.Module types attributes
            else:
                delattr(parent, name)
            if not prefix:
                dropped.add(name)

    prune(module, "")
    return dropped


def _methods(base: type[nn.Module]) -> Iterator[tuple[str, FunctionType]]:
    """Every method but `forward` and the special ones."""
    for owner in base.__mro__:
        if owner is nn.Module:
            break
        for name, method in vars(owner).items():
            function = inspect.unwrap(getattr(method, "__func__", getattr(method, "fget", None) or method))
            if name != "forward" and not name.startswith("__") and isinstance(function, FunctionType):
                yield name, function
