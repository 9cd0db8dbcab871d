"""Copy recorded operators into a new graph, with the steps of rewrites in the place of some."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import getitem
from typing import Any

from torch import fx

from refold.errors import NotFoldable
from refold.folding.rewrite import MODULE, Applied, NewLayer, Operation, Value, mapped
from refold.recording.recording import Built, Recording, nodes_in


class GraphCopy:
    """A graph into which operators of a recording are copied. `values` are what stands for recorded values in it."""

    def __init__(
        self,
        recording: Recording,
        steps: Mapping[fx.Node, Value],
        module: Callable[[str], str],
        tensor: Callable[[str], str],
        register: Callable[[NewLayer, str], str],
    ) -> None:
        """`module` and `tensor` name what the new graph's module calls what the model has at a path; `register` puts
        a new layer into it and names it."""
        self.graph = fx.Graph()
        self.values: dict[fx.Node, fx.Node] = {}
        self._recording, self._steps = recording, steps
        self._module, self._tensor, self._register = module, tensor, register
        self._emitted: dict[int, fx.Node] = {}

    def copy(self, node: fx.Node) -> None:
        """Copy one operator, or put in what a step says."""
        step = self._steps.get(node)
        if step is not None:
            self.values[node] = self.emit(step)
            return
        args, kwargs = self.mapped((node.args, dict(node.kwargs)))
        target = self._module(str(node.target)) if node.op == MODULE else node.target
        self.values[node] = self.graph.create_node(node.op, target, args, kwargs)

    def emit(self, value: Value) -> fx.Node:
        """The node for a value, made where the graph ends now."""
        if isinstance(value, fx.Node):
            return self.find(value)
        if id(value) not in self._emitted:
            self._emitted[id(value)] = self._emit(value)
        return self._emitted[id(value)]

    def mapped(self, value: Any) -> Any:
        """A structure of arguments with this graph's nodes in the place of recorded values and of steps."""
        return mapped(value, self.emit)

    def find(self, value: fx.Node) -> fx.Node:
        """What stands for a recorded value. Raises NotFoldable where nothing does."""
        found: fx.Node | None = value
        while found is not None and found not in self.values:
            if found.op == "get_attr" or found not in self._recording.varying:
                return self._constant(found)
            found = self._recording.same_as.get(found)
        if found is None:
            raise NotFoldable(
                f"it reads a value ({value.name}) that is handed to it in a way that nobody sees"
            )
        return self.values[found]

    def _constant(self, node: fx.Node) -> fx.Node:
        if node.op == "get_attr":
            self.values[node] = self.graph.create_node("get_attr", self._tensor(str(node.target)))
        else:  # computed from parameters alone, on every call
            self.copy(node)
        return self.values[node]

    def _emit(self, value: Applied | Operation) -> fx.Node:
        if isinstance(value, Applied):
            source = self.emit(value.source)
            return self.graph.call_module(self._register(value.layer, value.name), (source,))
        args, kwargs = self.mapped((value.args, value.kwargs))
        target = self._module(value.target) if value.kind == MODULE else value.target
        return self.graph.create_node(value.kind, target, args, kwargs)

    def items(self, node: fx.Node, structure: Any) -> None:
        """Let the values in a structure be read from `node`, which holds the structure."""
        if isinstance(structure, fx.Node):
            self.values[structure] = node
        elif isinstance(structure, Built):
            for name, part in structure.fields.items():
                if _holds_values(part):
                    self.items(self.graph.call_function(getattr, (node, name)), part)
        elif isinstance(structure, (list, tuple, dict)):
            for key, part in structure.items() if isinstance(structure, dict) else enumerate(structure):
                if _holds_values(part):
                    self.items(self.graph.call_function(getitem, (node, key)), part)


def _holds_values(structure: Any) -> bool:
    return next(nodes_in(structure), None) is not None
