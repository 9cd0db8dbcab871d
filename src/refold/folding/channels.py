"""Which values of a graph share their channels: everything that treats each channel for itself keeps them apart."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import fx

from refold.algebra import Convolution
from refold.folding.planning import Planner
from refold.recording.linear import Concatenation, Map, Same
from refold.recording.operators import is_batch_norm, operator_of
from refold.recording.recording import name_of

_META = torch.device("meta")


class Role(Enum):
    """What an operator does to channels."""

    CONCATENATES = "puts the channels of its inputs one after the other"
    MIXES = "computes each channel from all of its input: a dense convolution, a linear layer"
    FILTERS = "a convolution or batch norm of each channel, or each group, for itself"
    KEEPS = "treats every channel alike and for itself"
    MEASURES = "reads the size of a map"
    OTHER = "anything else"


@dataclass(eq=False)
class ChannelClass:
    """Values that have the same channels, in the order they are computed; and who reads them."""

    members: list[fx.Node] = field(default_factory=list)
    readers: set[fx.Node] = field(default_factory=set)
    """The operators that read a member and are none."""
    channels: int = 0


class Channels:
    """The channel classes of a unit's graph."""

    def __init__(self, planner: Planner) -> None:
        self.planner = planner
        self._shapes = planner.shapes
        self.roles = {node: self._role(node) for node in planner.graph.nodes}
        self._parents: dict[fx.Node, fx.Node] = {}
        for node, role in self.roles.items():
            if role in (Role.KEEPS, Role.FILTERS):
                for value in self.inputs(node):
                    self._parents[self._find(value)] = self._find(node)
        self.classes: dict[fx.Node, ChannelClass] = defaultdict(ChannelClass)
        for node in planner.graph.nodes:
            if len(self._shapes.get(node, ())) > 1:
                own = self.classes[self._find(node)]
                own.members.append(node)
                own.channels = self._shapes[node][1]
        for own in self.classes.values():
            own.readers = {u for m in own.members for u in m.users} - set(own.members)

    def of(self, node: fx.Node) -> ChannelClass | None:
        """The class of a value; None for what has no channels."""
        return self.classes.get(self._find(node))

    def inputs(self, node: fx.Node) -> list[fx.Node]:
        """The inputs of an operator that keeps channels which have the channels that it returns."""
        channels = self._shapes[node][1]
        return [v for v in node.all_input_nodes if self._varying(v) and self._shapes[v][1] == channels]

    def convolution(self, node: fx.Node, device: torch.device) -> Convolution:
        """The convolution that a node which mixes or filters channels is."""
        operator = self.planner.operators[node]
        assert isinstance(operator, Map)
        return operator.build(device)

    def parts(self, own: ChannelClass) -> tuple[int, ...] | None:
        """How many channels each part of a class has that its concatenations are made of; None where they differ,
        where there is none, or where the class cannot be computed in parts."""
        roles, barriers = self.roles, self.planner.recording.barriers
        joins = [m for m in own.members if roles[m] is Role.CONCATENATES]
        sizes = {tuple(self._shapes[v][1] for v in self.joined(join)) for join in joins}
        if len(sizes) != 1 or barriers.intersection(own.members):
            return None
        (found,) = sizes
        produced = (Role.CONCATENATES, Role.MIXES, Role.KEEPS, Role.FILTERS)
        if len(found) < 2 or any(roles[m] not in produced for m in own.members):
            return None
        return found if all(n % self._group(m) == 0 for m in own.members for n in found) else None

    def mixers(self, own: ChannelClass) -> list[fx.Node]:
        """The dense convolutions that read the class."""
        return [node for node in own.readers if self.roles[node] is Role.MIXES]

    def may_be_padded(self, own: ChannelClass, readers: set[fx.Node]) -> bool:
        """Whether channels of zeros may be added: only dense convolutions, or those given, read the values, and no
        division meets them."""
        roles, planner = self.roles, self.planner
        kept = (Role.MIXES, Role.KEEPS, Role.FILTERS, Role.CONCATENATES)
        for node in own.members:
            divides = name_of(node.target) in ("truediv", "div", "divide")
            norm = roles[node] is Role.FILTERS and is_batch_norm(planner.use(node))
            if roles[node] not in kept or divides or norm or self._group(node) > 1:
                return False
        measured = (Role.MIXES, Role.MEASURES)
        barred = planner.recording.barriers.intersection(own.members)
        return not barred and all(roles[n] in measured or n in readers for n in own.readers)

    def touched(self, own: ChannelClass) -> set[fx.Node]:
        """Every operator that changes where the class is computed in parts; all others read it put together again."""
        return {*own.members, *(node for node in own.readers if self.roles[node] is not Role.OTHER)}

    def joined(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """What a concatenation puts together."""
        operator = self.planner.operators[node]
        assert isinstance(operator, Concatenation)
        return operator.inputs

    def _group(self, node: fx.Node) -> int:
        """The channels that a convolution of groups reads together."""
        if self.roles[node] is not Role.FILTERS or is_batch_norm(self.planner.use(node)):
            return 1
        return self.convolution(node, _META).weight.shape[1]

    def _find(self, node: fx.Node) -> fx.Node:
        while (parent := self._parents.get(node, node)) is not node:
            self._parents[node] = self._parents.get(parent, parent)
            node = parent
        return node

    def _varying(self, node: fx.Node) -> bool:
        return len(self._shapes.get(node, ())) > 1 and node in self.planner.recording.varying

    def _role(self, node: fx.Node) -> Role:
        planner, shape = self.planner, self._shapes.get(node)
        scope, recording = node.meta["scope"], self.planner.recording
        around = [scope[:length] for length in range(2, len(scope) + 1)] or [scope]
        if any(each in recording.closed or each in recording.guarded for each in around):
            return Role.OTHER  # code that cannot be written anew reads and writes values as they are
        if "number" in node.meta:
            side = node.args[1] if node.op == "call_method" and node.target == "size" else 0
            return Role.MEASURES if isinstance(side, int) and side > 1 else Role.OTHER
        if shape is None or len(shape) < 2 or node.op not in ("call_module", "call_function", "call_method"):
            return Role.OTHER
        operator = planner.operators.get(node)
        if isinstance(operator, Concatenation):
            return Role.CONCATENATES if operator.spatial_axes == len(shape) - 2 else Role.OTHER
        if isinstance(operator, Map) and operator.multiplies:
            return self._convolution_role(operator, shape)
        if isinstance(operator, Same):
            return Role.KEEPS
        if isinstance(operator, Map) and is_batch_norm(planner.use(node)):
            return Role.FILTERS if len(shape) < 6 else Role.OTHER
        return Role.KEEPS if self._keeps_channels(node, shape) else Role.OTHER

    def _convolution_role(self, operator: Map, shape: tuple[int, ...]) -> Role:
        convolution = operator.structure
        if convolution.spatial_axes != len(shape) - 2:
            return Role.OTHER
        if convolution.groups == 1:
            return Role.MIXES
        return Role.FILTERS if convolution.in_channels == convolution.out_channels else Role.OTHER

    def _keeps_channels(self, node: fx.Node, shape: tuple[int, ...]) -> bool:
        entry = operator_of(self.planner.use(node))
        varying = self.planner.recording.varying
        tensors = [v for v in node.all_input_nodes if v in varying and v in self._shapes]
        if (
            entry is None
            or entry.channels is None
            or not tensors
            or any(len(self._shapes[v]) < 2 for v in tensors)
        ):
            return False
        if entry.word in ("add", "multiply"):
            alike = all(len(self._shapes[v]) == len(shape) for v in tensors)
            fits = all(self._shapes[v][1] in (1, shape[1]) for v in tensors)
            return alike and fits and set(node.all_input_nodes) == set(tensors) and not node.kwargs
        source = self._shapes[tensors[0]]
        if len(tensors) > 1 or node.args[:1] != (tensors[0],) or source[:2] != shape[:2]:
            return False
        if name_of(node.target) == "mean":
            return _averages_space(node, len(source))
        if entry.word == "reshape":
            one_pixel = all(side == 1 for side in source[2:]) and len(shape) == 2
            return entry.linear is not None and one_pixel
        return entry.word not in ("permute", "copy") or node.target == "contiguous"


def _averages_space(node: fx.Node, axes: int) -> bool:
    """Whether a mean is over axes behind the channels alone."""
    given: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    along = (given,) if isinstance(given, int) else given
    if not isinstance(along, (tuple, list)) or not along or not all(isinstance(a, int) for a in along):
        return False
    return all(a % axes > 1 for a in along)


def connected(groups: list[set[fx.Node]]) -> Iterator[list[int]]:
    """The indices of sets, those together that share an element directly or through others."""
    left = dict(enumerate(groups))
    while left:
        first, seen = next(iter(left.items()))
        del left[first]
        together, seen = [first], set(seen)
        while more := [i for i, group in left.items() if group & seen]:
            for i in more:
                seen |= left.pop(i)
                together.append(i)
        yield sorted(together)
