"""Which layers of a model can take branches: found by running the model once and watching its tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import log2
from typing import Any

from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from refold.blocks.parallel.branch import padding_of
from refold.folding.recording import has_hooks
from refold.models.observation import observe_convolutions
from refold.unfolding.building import kind_of
from refold.unfolding.plans import Kind


@dataclass(frozen=True)
class Candidate:
    """A convolution that may take branches. `stage` counts how often the image was halved before its output."""

    path: str
    norm: str | None
    kind: Kind
    stage: int


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
    that are the model itself, run more than once, are shared, have hooks or a computed weight, pad unevenly or not
    with zeros, or write maps of a single pixel; whose parameters are read by code around them; and that have neither
    a bias nor a norm that could take up the shift of a branch.

    Raises `InputError` where the model does not run on `arguments`.
    """
    with _noting(model) as looked_into:
        calls, outputs = observe_convolutions(model, arguments)
    paths = {id(module): path for path, module in model.named_modules()}
    modules = dict(model.named_modules())
    shared = _shared(model)
    side = max((max(leaf.shape[-2:]) for leaf in tree_leaves(arguments) if _is_map(leaf)), default=1)
    found, norms = [], {}
    for identity, call in calls.items():
        path = paths[identity]
        conv, own = modules[path], None if call.norm is None else paths[id(call.norm)]
        if own is not None and not {path, own} & shared:
            norms[path] = own
        if (
            not path
            or type(conv) not in _NOTING
            or call.times > 1
            or path in shared | looked_into
            or has_hooks(conv)
        ):
            continue
        assert isinstance(conv, nn.Conv2d)
        kind = kind_of(conv)
        if kind is None or padding_of(conv) is None or call.pixels == 1:
            continue
        if conv.bias is None if path not in norms else not _is_movable(call.norm):
            continue
        stage = round(log2(max(1.0, side / max(call.shape[-2:]))))
        found.append(Candidate(path, norms.get(path), kind, stage))
    return Layers(found, norms, outputs)


def _is_map(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4


def _is_movable(norm: nn.Module | None) -> bool:
    """Whether it can become the norm of a branch."""
    return getattr(norm, "running_mean", None) is not None


def _shared(model: nn.Module) -> set[str]:
    """Modules that have more than one name, or a parameter that another module has too."""
    owners: dict[int, set[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for item in (module, *module.parameters(recurse=False)):
            owners.setdefault(id(item), set()).add(path)
    return {path for paths in owners.values() if len(paths) > 1 for path in paths}


@contextmanager
def _noting(model: nn.Module) -> Iterator[set[str]]:
    """The paths of the convolutions whose parameters are read by code around them meanwhile."""
    looked_into: set[str] = set()
    changed = [(path, module) for path, module in model.named_modules() if type(module) in _NOTING]
    for path, module in changed:
        vars(module)["_look"] = partial(looked_into.add, path)
        module.__class__ = _NOTING[type(module)]
    try:
        yield looked_into
    finally:
        for _, module in changed:
            module.__class__ = type(module).__bases__[-1]
            del vars(module)["_look"]


class _Noting:
    """A convolution that notes when code around it asks for its parameters."""

    _runs = False

    def forward(self, *inputs: Any, **others: Any) -> Any:
        self._runs = True
        try:
            return super().forward(*inputs, **others)  # type: ignore[misc]  # that of the convolution
        finally:
            del self._runs

    def __getattr__(self, name: str) -> Any:
        if name in ("weight", "bias") and not self._runs:
            vars(self)["_look"]()
        return super().__getattr__(name)  # type: ignore[misc]  # that of nn.Module


class _NotingConv2d(_Noting, nn.Conv2d):
    pass


class _NotingConv2dSame(_Noting, Conv2dSame):  # type: ignore[misc]  # timm is not typed
    pass


_NOTING: dict[type, type] = {nn.Conv2d: _NotingConv2d, Conv2dSame: _NotingConv2dSame}
