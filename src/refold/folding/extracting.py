"""Take the part of a graph out that a rewrite changes, as a network of its own with one input and one output."""

from __future__ import annotations

import copy
from collections.abc import Callable, Set
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from refold.errors import NotFoldable, first_line
from refold.folding.planning import Planner
from refold.folding.precision import in_float64
from refold.folding.proof import distance, require_proved

Write = Callable[[fx.Graph, nn.Module, Callable[[fx.Node], fx.Node]], None]
"""Rewrites a graph of a module, in which the function finds the operators of the unit."""


@dataclass(frozen=True)
class Extract:
    """The operators from `source` to `roots`: they read nothing else, and nothing but `roots` is read elsewhere."""

    planner: Planner
    source: fx.Node
    roots: tuple[fx.Node, ...]
    nodes: frozenset[fx.Node]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the input that the example gives."""
        return self.planner.unit.shapes[self.source]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the input."""
        return self.planner.unit.kinds[self.source][0]

    def network(self, write: Write | None = None) -> fx.GraphModule:
        """A copy of the operators as a network, rewritten by `write`, in evaluation mode on the CPU."""
        graph, found = fx.Graph(), dict[fx.Node, fx.Node]()
        found[self.source] = graph.placeholder("x")
        for node in self._with_constants():
            found[node] = graph.node_copy(node, found.__getitem__)
        results = tuple(found[root] for root in self.roots)
        end = next(reversed(self.planner.unit.graph.nodes))
        found[end] = graph.output(results if len(results) > 1 else results[0])
        parts = fx.GraphModule({name: self._part(name) for name in _targets(graph)}, graph, "Part")
        if write is not None:
            write(parts.graph, parts, _same_nodes(graph, parts.graph, found))
            _sweep(parts.graph)
        parts.recompile()
        parts.delete_all_unused_submodules()
        return parts.cpu().eval()

    def prove(self, write: Write) -> float:
        """How far the rewritten operators are from these: in float64, on random inputs of two sizes.

        Raises NotFoldable where it is more than rounding, or they run on no random input.
        """
        before, after = self.network(), self.network(write)
        generator = torch.Generator().manual_seed(0)
        worst, proved, failure = 0.0, 0, ""
        for shape in self._probe_shapes():
            x = torch.randn(shape, dtype=torch.float64, generator=generator)
            try:
                with in_float64(), torch.no_grad():
                    expected, found = (tree_leaves(part(x.clone())) for part in (before, after))
            except Exception as error:  # not every map is large enough for every pooling
                failure = f"its operators do not run on a {shape} input ({first_line(error)})"
                continue
            worst = max([worst, *(distance(e, f) for e, f in zip(expected, found, strict=True))])
            proved += 1
            if proved == 2:
                break
        if not proved:
            raise NotFoldable(failure)
        require_proved(worst)
        return worst

    def _probe_shapes(self) -> list[tuple[int, ...]]:
        """Small inputs, not square and of odd and even sizes, and the example's own."""
        axes = len(self.shape) - 2
        sides = ((7, 10, 6), (12, 9, 8), (23, 38, 21), (46, 35, 27))
        small = [(2, self.shape[1], *side[:axes]) for side in sides] if 0 < axes < 4 else []
        return [*small, self.shape, (3, *self.shape[1:])]

    def _with_constants(self) -> list[fx.Node]:
        needed, waiting = set(self.nodes), list(self.nodes)
        while waiting:
            for value in waiting.pop().all_input_nodes:
                if value is not self.source and value not in needed:
                    needed.add(value)
                    waiting.append(value)
        return [node for node in self.planner.unit.graph.nodes if node in needed]

    def _part(self, name: str) -> object:
        """A copy of a module or a tensor of the unit."""
        return copy.deepcopy(self.planner.unit.attribute(name))


def extract(planner: Planner, nodes: Set[fx.Node]) -> Extract:
    """The smallest part of one input that holds `nodes`; of one output too, unless the unit returns several of them.

    Raises NotFoldable where there is none.
    """
    graph = list(planner.unit.graph.nodes)
    shapes, order = planner.unit.shapes, planner.order
    inside = {node for node in nodes if node not in planner.checks and node.op != "output"}
    while True:
        inside |= _between(graph, inside)
        sources = {
            v for n in inside for v in n.all_input_nodes if v not in inside and planner.constants.varies(v)
        }
        roots = {n for n in inside if set(n.users) - inside - planner.checks}
        last = max(sources, key=order.__getitem__, default=None)
        if last is None or any(node.op == "placeholder" for node in inside):
            raise NotFoldable("no part with one input holds it")
        readers = {u for root in roots for u in root.users if u not in inside and u not in planner.checks}
        following = min(readers, key=order.__getitem__)
        whole = roots <= set(shapes) and (len(roots) == 1 or following.op == "output")
        if len(sources) > 1 or last not in shapes:
            inside.add(last)
        elif not whole:
            if following.op == "output":
                raise NotFoldable("what it returns is no tensor")
            inside.add(following)
        else:
            return Extract(planner, last, tuple(sorted(roots, key=order.__getitem__)), frozenset(inside))


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


def _targets(graph: fx.Graph) -> list[str]:
    return list(dict.fromkeys(str(n.target) for n in graph.nodes if n.op in ("call_module", "get_attr")))


def _same_nodes(
    graph: fx.Graph, other: fx.Graph, found: dict[fx.Node, fx.Node]
) -> Callable[[fx.Node], fx.Node]:
    """Finds the operators of a unit in a copy of the graph that `found` leads to."""
    pairs = dict(zip(graph.nodes, other.nodes, strict=True))
    return lambda node: pairs[found[node]]


def _sweep(graph: fx.Graph) -> None:
    """Remove what nobody reads."""
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)
    graph.lint()
