"""Which layers of a model can take branches: found by running the model once and watching its tensors."""

from __future__ import annotations

from dataclasses import dataclass
from math import log2
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from refold.blocks.parallel.branch import padding_of
from refold.conversion.observation import WATCHED, observe_convolutions
from refold.recording.recording import has_hooks
from refold.unfolding.building import kind_of
from refold.unfolding.plans import Kind


@dataclass(frozen=True)
class UnfoldableLayer:
    """A convolution that may take branches. `stage` counts how often the image was halved before its output."""

    path: str
    norm: str | None
    kind: Kind
    stage: int


@dataclass(frozen=True)
class Layers:
    """What `observe` found: the layers that may take branches, in the order in which they run, the norm of every
    convolution, and what the model returned."""

    unfoldable: list[UnfoldableLayer]
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
    runs, outputs = observe_convolutions(model, arguments)
    paths = {id(module): path for path, module in model.named_modules()}
    modules = dict(model.named_modules())
    shared = _shared(model)
    side = max((max(leaf.shape[-2:]) for leaf in tree_leaves(arguments) if _is_map(leaf)), default=1)
    found, norms = [], {}
    for identity, run in runs.items():
        path = paths[identity]
        conv, own = modules[path], None if run.norm is None else paths[id(run.norm)]
        if own is not None and not {path, own} & shared:
            norms[path] = own
        if (
            not path
            or type(conv) not in WATCHED
            or run.times > 1
            or path in shared
            or run.is_looked_into
            or has_hooks(conv)
        ):
            continue
        assert isinstance(conv, nn.Conv2d)
        kind = kind_of(conv)
        if kind is None or padding_of(conv) is None or run.pixels == 1:
            continue
        if conv.bias is None if path not in norms else not _is_movable(run.norm):
            continue
        stage = round(log2(max(1.0, side / max(run.shape[-2:]))))
        found.append(UnfoldableLayer(path, norms.get(path), kind, stage))
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
