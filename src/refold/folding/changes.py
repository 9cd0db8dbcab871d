"""A fold as data: the places of a model that changed and what stands there now; applied, written and read."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from refold.errors import InputError
from refold.folding.layers import described, from_description
from refold.folding.plain_class import become_plain
from refold.folding.written_graphs import CannotTell, graph_from_data, graph_to_data


@dataclass
class Change:
    """One place of a model, by path, and what stands there now: a layer, other values, or another forward pass."""

    place: str
    layer: nn.Module | None = None
    """What stands in the place of the module."""
    values: Mapping[str, nn.Parameter] | None = None
    """Parameters whose values, and nothing else, are others."""
    adds: Mapping[str, nn.Module] = field(default_factory=dict)
    """New layers inside of the module, by name."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """Constant tensors that become buffers of the module."""
    graph: fx.Graph | None = None
    """The forward pass that the module has now; layers that it does not call go."""
    becomes: Sequence[str] | None = None
    """The layers inside of the module of which it is no more than a sequence now: that stands in its place."""
    keep_methods: bool = False
    """Whether layers that other methods of the module mention stay."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Which of `adds` are copies, that do not work in place, of a layer at a path in the model."""


class _Model:
    """A model that is changed, and where each of its modules is registered, under one name or several."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._places: dict[int, list[tuple[nn.Module, str]]] = {}
        for parent in model.modules():
            for name, child in parent._modules.items():
                if child is not None:
                    self._places.setdefault(id(child), []).append((parent, name))

    def replace(self, old: nn.Module, new: nn.Module) -> None:
        places = self._places.pop(id(old), [])
        for parent, name in places:
            if parent._modules.get(name) is old:
                parent._modules[name] = new
        self._places.setdefault(id(new), []).extend(places)
        for name, child in new._modules.items():
            if child is not None:
                self._places.setdefault(id(child), []).append((new, name))
        if old is self.model:
            self.model = new

    def apply(self, change: Change) -> None:
        module = self.model.get_submodule(change.place)
        if change.layer is not None:
            self.replace(module, change.layer)
            return
        for name, value in (change.values or {}).items():
            module._parameters[name] = value
        for name, layer in change.adds.items():
            parent, _, last = name.rpartition(".")
            module.get_submodule(parent).add_module(last, layer)
        for name, tensor in change.tensors.items():
            module.register_buffer(name, tensor.detach().clone())
        if change.graph is None:
            return
        simple = None if change.becomes is None else _sequence(module, change.becomes)
        if simple is None and isinstance(module, fx.GraphModule):  # its class is made for its graph alone
            simple = _other_graph(module, change.graph)
        if simple is None:
            become_plain(module, change.graph, keep_methods=change.keep_methods)
        else:
            self.replace(module, simple.eval())


def apply(model: nn.Module, changes: Sequence[Change]) -> nn.Module:
    """Put changes into `model`, in place; the model, or what stands for it if it became one layer."""
    changed = _Model(model)
    for change in changes:
        changed.apply(change)
    return changed.model


def _sequence(module: nn.Module, layers: Sequence[str]) -> nn.Module:
    if not layers:
        return nn.Identity()
    if len(layers) == 1:
        return module.get_submodule(layers[0])
    return nn.Sequential(OrderedDict((name.replace(".", "_"), module.get_submodule(name)) for name in layers))


def _other_graph(module: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    made = fx.GraphModule(module, graph, type(module).__name__)
    made._forward_hooks, made._forward_pre_hooks = module._forward_hooks, module._forward_pre_hooks
    return made


def simplified(graph: fx.Graph) -> list[str] | None:
    """The layers that the graph calls one after the other on its first input; None where it does anything else."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if not inputs or any(node.users for node in inputs[1:]):
        return None
    value = inputs[0]
    layers: list[str] = []
    while True:
        users = list(value.users)
        if len(users) != 1 or users[0].args[:1] != (value,):
            return None
        (value,) = users
        if value.op == "output":
            return layers if len(graph.nodes) == len(inputs) + len(layers) + 1 else None
        if value.op != "call_module" or len(value.args) != 1 or value.kwargs:
            return None
        layers.append(str(value.target))


def to_data(changes: Sequence[Change]) -> list[dict[str, Any]] | None:
    """The changes as plain JSON-able values, without weights; None where one of them has no such form."""
    try:
        return [_to_data(change) for change in changes]
    except CannotTell:
        return None


def _to_data(change: Change) -> dict[str, Any]:
    data: dict[str, Any] = {"place": change.place}
    if change.layer is not None:
        data["layer"] = described(change.layer)
        return data
    if change.values is not None:
        data["values"] = sorted(change.values)
        return data
    data["adds"] = {
        name: {"copy_of": change.copies[name]} if name in change.copies else described(layer)
        for name, layer in change.adds.items()
    }
    data["tensors"] = {name: list(tensor.shape) for name, tensor in change.tensors.items()}
    if change.becomes is not None:
        data["becomes"] = list(change.becomes)
    elif change.graph is not None:
        data["forward"] = graph_to_data(change.graph)
        data["keep_methods"] = change.keep_methods
    return data


def apply_data(model: nn.Module, changes: Sequence[Mapping[str, Any]]) -> nn.Module:
    """Put changes that were written by `to_data` into `model`, in place, with layers whose values are not set.

    Raises `InputError` where they do not fit the model, or name what no fold writes.
    """
    changed = _Model(model)
    for data in changes:
        try:
            changed.apply(_from_data(changed.model, data))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"The record of a fold does not fit this {type(model).__name__} at '{data.get('place')}' ({error}); "
                "build the network with the arguments it was folded with."
            ) from error
    return changed.model


def _from_data(model: nn.Module, data: Mapping[str, Any]) -> Change:
    place = data["place"]
    module = model.get_submodule(place)
    if "layer" in data:
        return Change(place, layer=from_description(data["layer"], module))
    if "values" in data:
        return Change(place)
    adds = {}
    for name, description in data["adds"].items():
        if "copy_of" in description:
            adds[name] = copy.copy(model.get_submodule(description["copy_of"]))
            adds[name].inplace = False  # type: ignore[assignment]  # nn.Module types its attributes as modules
        else:
            adds[name] = from_description(description, None)
    tensors = {name: torch.empty(shape) for name, shape in data["tensors"].items()}
    graph = fx.Graph() if "becomes" in data else graph_from_data(data["forward"])
    return Change(
        place,
        adds=adds,
        tensors=tensors,
        graph=graph,
        becomes=data.get("becomes"),
        keep_methods=bool(data.get("keep_methods", False)),
    )
