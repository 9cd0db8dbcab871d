"""Which layers of a model can take branches: found by running the model once and watching its tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import log2
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from refold.errors import InputError, first_line
from refold.unfolding.branch import padding_of
from refold.unfolding.building import kind_of
from refold.unfolding.plans import Kind

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct2d)


@dataclass(frozen=True)
class Candidate:
    """A convolution that may take branches. `stage` counts how often the image was halved before its output."""

    path: str
    norm: str | None
    kind: Kind
    stage: int


@dataclass
class _Observed:
    calls: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, torch.Size] = field(default_factory=dict)
    writers: dict[int, str] = field(default_factory=dict)
    norms: dict[str, list[str]] = field(default_factory=dict)
    norm_calls: dict[str, int] = field(default_factory=dict)
    other_readers: set[str] = field(default_factory=set)
    looked_into: set[str] = field(default_factory=set)
    kept: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Layers:
    """What `observe` found: the layers that may take branches, in the order in which they run, the norm of every
    convolution, and what the model returned."""

    candidates: list[Candidate]
    norms: dict[str, str]
    outputs: list[Tensor]


def observe(model: nn.Module, arguments: tuple[Any, ...]) -> Layers:
    """Run the model on `arguments` in evaluation mode and find its layers.

    A norm belongs to a convolution if it alone reads what that writes, and both run once. Left out are convolutions
    that run more than once, are shared, have hooks or a computed weight, pad unevenly or not with zeros, or write maps
    of a single pixel; whose parameters are read by code around them; and that have neither a bias nor a norm that could
    take up the shift of a branch.

    Raises `InputError` where the model does not run on `arguments`.
    """
    observed = _watched_run(model, arguments)
    modules = dict(model.named_modules())
    shared = _shared(model)
    pairs: dict[str, str] = {}
    for norm, writers in observed.norms.items():
        conv = writers[0]
        once = len(writers) == 1 and observed.norm_calls[norm] == observed.calls[conv] == 1
        alone = sum(conv in others for others in observed.norms.values()) == 1
        if once and alone and conv not in observed.other_readers and not {conv, norm} & shared:
            pairs[conv] = norm
    side = max((max(leaf.shape[-2:]) for leaf in tree_leaves(arguments) if _is_map(leaf)), default=1)
    found = []
    for path, times in observed.calls.items():
        conv, own = modules[path], pairs.get(path)
        assert isinstance(conv, nn.Conv2d)
        kind, size = kind_of(conv), observed.sizes[path]
        usable = times == 1 and path not in shared and not _is_watched(conv) and padding_of(conv) is not None
        if kind is None or not usable or size[-1] * size[-2] == 1 or path in observed.looked_into:
            continue
        if conv.bias is None if own is None else not _is_movable(modules[own]):
            continue
        found.append(Candidate(path, own, kind, round(log2(max(1.0, side / max(size[-2:]))))))
    return Layers(found, pairs, observed.outputs)


def _is_map(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4


def _is_movable(norm: nn.Module) -> bool:
    """Whether it can become the norm of a branch."""
    return type(norm) in _NORMS and getattr(norm, "running_mean", None) is not None and not _is_watched(norm)


def _is_watched(module: nn.Module) -> bool:
    """Whether calling it runs more than its forward method."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _shared(model: nn.Module) -> set[str]:
    """Modules that have more than one name, or a parameter that another module has too."""
    owners: dict[int, set[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for item in (module, *module.parameters(recurse=False)):
            owners.setdefault(id(item), set()).add(path)
    return {path for paths in owners.values() if len(paths) > 1 for path in paths}


def run(model: nn.Module, arguments: tuple[Any, ...]) -> list[Tensor]:
    """The floating-point tensors that the model returns in evaluation mode, without gradients."""
    training = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            leaves = tree_leaves(model.eval()(*copy.deepcopy(arguments)))
    finally:
        for module, was_training in training.items():
            module.training = was_training
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _watched_run(model: nn.Module, arguments: tuple[Any, ...]) -> _Observed:
    observed = _Observed()
    mode = _Watch(observed)
    with ExitStack() as stack:
        for path, module in model.named_modules():
            if type(module) is nn.Conv2d:
                stack.enter_context(_hooked(module, mode, path, observed, norm=False))
            elif isinstance(module, _BatchNorm):
                stack.enter_context(_hooked(module, mode, path, observed, norm=True))
        try:
            with mode:
                observed.outputs = run(model, arguments)
        except Exception as error:
            shapes = ", ".join(str(tuple(v.shape)) for v in tree_leaves(arguments) if isinstance(v, Tensor))
            line = first_line(error)
            raise InputError(
                f"{type(model).__name__} cannot run on the example input (shape {shapes}): {line}; pass an "
                "example_input that its forward pass accepts."
            ) from error
    observed.other_readers.update(
        observed.writers[id(leaf)] for leaf in observed.outputs if id(leaf) in observed.writers
    )
    return observed


@contextmanager
def _hooked(module: nn.Module, mode: _Watch, path: str, observed: _Observed, *, norm: bool) -> Iterator[None]:
    def before(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        mode.depth += 1
        if inputs and id(inputs[0]) in observed.writers:
            writer = observed.writers[id(inputs[0])]
            if norm:
                observed.norms.setdefault(path, []).append(writer)
            else:
                observed.other_readers.add(writer)
        if norm:
            observed.norm_calls[path] = observed.norm_calls.get(path, 0) + 1

    def after(_: nn.Module, __: tuple[Any, ...], out: Tensor) -> None:
        mode.depth -= 1
        if not norm:
            observed.calls[path] = observed.calls.get(path, 0) + 1
            observed.sizes[path] = out.shape
            observed.writers[id(out)] = path
            # Kept alive, so that no later tensor gets the same id.
            observed.kept.append(out)

    def look() -> None:
        if mode.depth == 0:
            observed.looked_into.add(path)

    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    own = type(module)
    if not norm:
        vars(module)["_look"] = look
        module.__class__ = _Noting
    try:
        yield
    finally:
        module.__class__ = own
        vars(module).pop("_look", None)
        for handle in handles:
            handle.remove()


class _Noting(nn.Conv2d):
    """A convolution that notes when code around it asks for its parameters."""

    def __getattr__(self, name: str) -> Any:
        if name in ("weight", "bias") and "_look" in vars(self):
            vars(self)["_look"]()
        return super().__getattr__(name)


class _Watch(TorchFunctionMode):
    """Notes which outputs of convolutions are read by anything but a batch norm."""

    def __init__(self, observed: _Observed) -> None:
        super().__init__()
        self._observed = observed
        self.depth = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.depth == 0 and any(isinstance(leaf, Tensor) for leaf in tree_leaves(out)):
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor) and id(leaf) in self._observed.writers:
                    self._observed.other_readers.add(self._observed.writers[id(leaf)])
        return out
