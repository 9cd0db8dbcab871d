"""Run a traced graph once: shapes, which values share memory, which are changed in place."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from refold.errors import NotFoldable
from refold.folding.tracing import Unit, copy_tensors, plain_mode


def observe(unit: Unit) -> None:
    """Run the graph of a unit on its arguments and note in the unit what that shows.

    Raises NotFoldable where the graph computes something else than the module, and whatever its operators raise.
    """
    bound = inspect.signature(unit.module.forward).bind(*unit.arguments[0], **unit.arguments[1])
    bound.apply_defaults()
    observer = _Observer(unit)
    with plain_mode():
        found = observer.run(*[copy_tensors(bound.arguments[p]) for p in _parameter_names(unit)])
        expected = unit.module.forward(*copy_tensors(unit.arguments[0]), **copy_tensors(unit.arguments[1]))
    if not _agree(_tensors(expected), _tensors(found)):
        raise NotFoldable("its code takes another way when it is traced")
    unit.rebound = observer.rebound
    for changer, operand in unit.rebound:
        rebind(changer, operand)
    unit.barriers = observer.barriers()


def _agree(expected: list[Tensor], found: list[Tensor]) -> bool:
    """Whether two runs of the same operators gave the same, up to the order in which threads add."""
    if [e.shape for e in expected] != [f.shape for f in found]:
        return False
    return all(
        torch.allclose(e, f, rtol=1e-2, atol=1e-3, equal_nan=True)
        for e, f in zip(expected, found, strict=True)
    )


def rebind(changer: fx.Node, operand: fx.Node) -> None:
    """Let what reads `operand` after `changer` has changed it in place read the result, which is the same tensor."""
    for user in list(operand.users):
        if user > changer:
            user.replace_input_with(operand, changer)


def _parameter_names(unit: Unit) -> list[str]:
    return [node.target.lstrip("*") for node in unit.graph.nodes if node.op == "placeholder"]


class _Observer(fx.Interpreter):
    """Runs a graph and notes shapes, which values share memory, and which are changed in place."""

    def __init__(self, unit: Unit) -> None:
        super().__init__(unit.module, graph=unit.graph)
        self.unit = unit
        self.order = {node: index for index, node in enumerate(unit.graph.nodes)}
        self.alias: dict[fx.Node, set[fx.Node]] = {}
        self.mutations: list[tuple[fx.Node, fx.Node]] = []
        self.readers: set[fx.Node] = set()
        self.rebound: list[tuple[fx.Node, fx.Node]] = []

    def fetch_attr(self, target: str) -> Any:
        return self.unit.attribute(target)

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return next(self.args_iter)

    def run_node(self, n: fx.Node) -> Any:
        inputs = {node: _tensors(self.env[node]) for node in n.all_input_nodes}
        versions = {node: [t._version for t in tensors] for node, tensors in inputs.items()}
        result = super().run_node(n)
        storages = {t.untyped_storage().data_ptr() for t in _tensors(result)}
        self.alias[n] = {n}
        for node, tensors in inputs.items():
            if (
                isinstance(result, Tensor)
                and tensors
                and result is tensors[0]
                and [result._version] == versions[node]
            ):
                self.unit.handed_on.add(n)
            if [t._version for t in tensors] != versions[node]:
                self.mutations.append((n, node))
                if result is tensors[0]:
                    n.meta["operands"] = n.all_input_nodes
                    self.rebound.append((n, node))
            if n.op != "output" and any(t.untyped_storage().data_ptr() in storages for t in tensors):
                self.alias[n] |= self.alias[node]
        for node in self.alias[n]:
            self.alias[node] = self.alias[n]
        if isinstance(result, Tensor):
            self.unit.shapes[n] = tuple(result.shape)
            self.unit.kinds[n] = (result.dtype, result.device)
        if storages:
            self.readers.add(n)
        return result

    def barriers(self) -> set[fx.Node]:
        """Every operator that reads, or changes, memory which is changed while somebody else reads it."""
        found: set[fx.Node] = set()
        for mutation, operand in self.mutations:
            members = {m for m in self.alias[operand] if self.order[m] < self.order[mutation]}
            readers = {user for member in members for user in member.users} & self.readers
            arrived = self.unit.path and any(member.op == "placeholder" for member in members)
            if readers - members - {mutation} or arrived:  # code outside this unit may read what arrived, too
                found |= members | readers
        return found


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
