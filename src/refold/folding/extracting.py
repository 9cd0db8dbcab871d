"""Take the part of a network out that a rewrite changes, as a network of its own with one input."""

from __future__ import annotations

import copy
from collections.abc import Set
from dataclasses import dataclass

import torch
from torch import fx, nn

from refold.errors import NotFoldable
from refold.folding.graphs import GraphCopy
from refold.folding.planning import Planner
from refold.folding.rewrite import NewLayer, Rewrite, Value


@dataclass(frozen=True)
class Extract:
    """The operators from `source` to `roots`: they read nothing else, and nothing but `roots` is read elsewhere."""

    planner: Planner
    source: fx.Node
    roots: tuple[fx.Node, ...]
    nodes: frozenset[fx.Node]
    rewrite: Rewrite

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the input that the example gives."""
        return self.planner.shapes[self.source]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the input."""
        return self.planner.recording.kinds[self.source][0]

    def before(self) -> nn.Module:
        """A copy of the operators as a network, in evaluation mode on the CPU."""
        return self._network({})

    def after(self) -> nn.Module:
        """The same with the rewrite."""
        return self._network(self.rewrite.steps)

    def _network(self, steps: dict[fx.Node, Value]) -> nn.Module:
        recording = self.planner.recording
        parts: dict[str, object] = {}

        def kept(path: str) -> str:
            parts[path.replace(".", "_")] = copy.deepcopy(recording.attribute(path))
            return path.replace(".", "_")

        def register(layer: NewLayer, name: str) -> str:
            place, number = name.replace(".", "_"), 2
            while place in parts:
                place, number = f"{name.replace('.', '_')}_again_{number}", number + 1
            parts[place] = copy.deepcopy(layer.module)
            return place

        written = GraphCopy(recording, steps, kept, kept, register)
        written.values[self.source] = written.graph.placeholder("x")
        for node in self.planner.graph.nodes:
            if node in self.nodes:
                written.copy(node)
        results = tuple(written.find(root) for root in self.roots)
        written.graph.output(results if len(results) > 1 else results[0])
        for node in reversed(list(written.graph.nodes)):
            if not node.users and node.op not in ("placeholder", "output"):
                written.graph.erase_node(node)
        made = fx.GraphModule(parts, written.graph, "Part")
        made.delete_all_unused_submodules()
        return made.cpu().eval()


def extract(planner: Planner, nodes: Set[fx.Node], rewrite: Rewrite) -> Extract:
    """The smallest part of one input that holds `nodes`; of one output too, unless the model returns several of them.

    Raises NotFoldable where there is none.
    """
    graph, varying = list(planner.graph.nodes), planner.recording.varying
    shapes, order = planner.shapes, planner.order
    inside = {node for node in nodes if node.op != "output"}
    while True:
        inside |= _between(graph, inside)
        sources = {v for n in inside for v in n.all_input_nodes if v not in inside and v in varying}
        roots = {n for n in inside if set(n.users) - inside}
        last = max(sources, key=order.__getitem__, default=None)
        if last is None or any(node.op == "placeholder" for node in inside):
            raise NotFoldable("no part with one input holds it")
        readers = {u for root in roots for u in root.users if u not in inside}
        following = min(readers, key=order.__getitem__)
        whole = roots <= set(shapes) and (len(roots) == 1 or following.op == "output")
        if len(sources) > 1 or last not in shapes:
            inside.add(last)
        elif not whole:
            if following.op == "output":
                raise NotFoldable("what it returns is no tensor")
            inside.add(following)
        else:
            return Extract(
                planner, last, tuple(sorted(roots, key=order.__getitem__)), frozenset(inside), rewrite
            )


def _between(graph: list[fx.Node], inside: set[fx.Node]) -> set[fx.Node]:
    """Everything that is computed from the nodes and needed for them."""
    after, before = set(inside), set(inside)
    for node in graph:
        if not after.isdisjoint(node.all_input_nodes):
            after.add(node)
    for node in reversed(graph):
        if not before.isdisjoint(node.users):
            before.add(node)
    return after & before
