"""Split a model into units that trace as a whole: all of it, mostly."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from refold.errors import NotFoldable, first_line
from refold.folding.observing import observe
from refold.folding.tracing import (
    Arguments,
    ScopeTracer,
    Unit,
    copy_tensors,
    fixed_arguments,
    forward_name,
    has_hooks,
    is_torch_leaf,
    plain_mode,
)

_COMPILED = "it is compiled (TorchScript)"


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


def _trace_unit(path: str, module: nn.Module, arguments: Arguments) -> tuple[Unit, dict[str, str]]:
    """Trace one module, its untraceable layers opaque; also those layers and why. Raises NotFoldable."""
    if isinstance(module, torch.jit.ScriptModule):
        raise NotFoldable(_COMPILED)
    forward_name(module)
    if is_torch_leaf(module):
        inner = next(module.children(), None)
        raise NotFoldable("it is a single layer" if inner is None else "its forward cannot be traced")
    reasons: dict[type[nn.Module], str] = {}

    def is_leaf(child: nn.Module, _: str) -> bool:
        compiled = isinstance(child, torch.jit.ScriptModule)
        return is_torch_leaf(child) or type(child) in reasons or has_hooks(child) or compiled

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
        observe(unit)
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
                opaque[node.target] = reasons.get(type(leaf), _COMPILED)
    return unit, opaque


def _children(module: nn.Module, path: str) -> list[str]:
    """Paths of the modules directly inside that have code of their own to trace; lists of modules have none."""
    paths: list[str] = []
    if isinstance(module, torch.jit.ScriptModule):
        return paths
    for name, child in module.named_children():
        inner = f"{path}.{name}" if path else name
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)) and type(child).forward is nn.Module.forward:
            paths += _children(child, inner)
        elif not is_torch_leaf(child) or next(child.children(), None) is not None:
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
