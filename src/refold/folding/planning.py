"""Choose what becomes one convolution: the regions of a graph that are linear in one value, where folding them pays."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx

from refold.algebra import (
    Convolution,
    is_channelwise,
)
from refold.errors import NotFoldable, first_line
from refold.folding.composing import Composer
from refold.folding.constants import Constants
from refold.folding.operators import (
    Flattened,
    Linear,
    Map,
    Restored,
    Same,
    Slice,
    Sum,
    inputs_of,
)
from refold.folding.recognition import linear_operator, scalable_module
from refold.folding.tracing import Scope, Unit, checks

_MOST_SOURCES = 16
"""How many values a purely linear chain may be computed from: the nearest, and its start."""

Price = tuple[int, int, int]
"""Multiply-accumulates, weights, operators: what a choice costs, in the order that decides."""
_NOTHING: Price = (0, 0, 0)


@dataclass(frozen=True)
class Region:
    """The operators between `source` and `root` that together are one convolution of `source`."""

    source: fx.Node
    root: fx.Node
    operators: dict[fx.Node, Linear]
    """In the order they run, `root` the last."""
    nodes: frozenset[fx.Node]
    """The operators and the helpers between them, such as the call of `chunk` behind its items."""
    structure: Convolution
    """The convolution without its numbers, on the meta device."""
    convolution: Callable[[], Convolution]
    """Computes it in float64 on the CPU; anew each time, for all of them together would outweigh the model."""
    rescales: bool = False
    """Whether `source` is a convolution layer of another kind, whose outputs `convolution` only scales and shifts."""
    tail: tuple[Tensor, Tensor | None] | None = None
    """A scale and a shift that `convolution` applies on top of what the operators compute."""


class Planner:
    """Plans one unit. Only shapes are looked at (tensors on the meta device): a region computes its numbers later."""

    def __init__(self, unit: Unit) -> None:
        self.unit = unit
        self.constants = Constants(unit)
        self.refusals: dict[fx.Node, str] = {}
        self.demanded: set[fx.Node] = set()
        """The values that have to be computed, filled in by `plan`."""
        self.order = {node: index for index, node in enumerate(unit.graph.nodes)}
        self.checks = checks(unit.graph)
        self._times = Counter(scope[-1][0] for scope in unit.calls if scope)
        self.operators = {n: op for n in unit.graph.nodes if (op := self._recognise(n)) is not None}
        self.composer = Composer(self.operators, unit.shapes)
        self._depthwise_counts = True
        self._own_prices: dict[fx.Node, Price] = {}
        self._emission_prices: dict[tuple[fx.Node, fx.Node], Price | None] = {}

    def plan(self, *, depthwise_counts: bool = True) -> list[Region]:
        """Choose for every value that something non-linear needs, from the last to the first, how to compute it.

        `depthwise_counts` says whether the multiply-accumulates and weights of depthwise convolutions have a price.
        """
        self._depthwise_counts = depthwise_counts
        regions: list[Region] = []
        demanded = self.demanded
        for node in reversed(self.unit.graph.nodes):
            unread = not node.users and node not in self.checks  # it runs all the same
            if node.op == "output" or ((node in demanded or unread) and node not in self.operators):
                demanded.update(node.all_input_nodes)
            elif node in demanded or unread:
                source = self._best_source(node)
                if source is None:
                    demanded.update(inputs_of(self.operators[node]))
                    continue
                demanded.add(source)
                region = self._region(node, source)
                if region is not None:
                    regions.append(region)
        return regions[::-1]

    def _recognise(self, node: fx.Node) -> Linear | None:
        if node in self.unit.barriers:
            self.refusals[node] = "a tensor that it reads is changed in place while others read it"
            return None
        if node not in self.unit.shapes or not self.constants.varies(node):
            return None
        try:
            return linear_operator(node, self.constants)
        except NotFoldable as refusal:
            self.refusals[node] = str(refusal)
        except Exception as error:  # one strange call of a known function must not stop the rest
            self.refusals[node] = f"it is called in a way that is not understood ({first_line(error)})"
        return None

    def closure(self, root: fx.Node) -> list[fx.Node]:
        """The linear operators that `root` depends on through linear operators alone, in the order they run."""
        found, waiting = {root}, [root]
        while waiting:
            reader = waiting.pop()
            for node in inputs_of(self.operators[reader]):
                if node in self.operators and node not in found and self.same_call(node, reader):
                    found.add(node)
                    waiting.append(node)
        return sorted(found, key=self.order.__getitem__)

    def same_call(self, node: fx.Node, reader: fx.Node) -> bool:
        """Whether no border of a module that is called several times lies between: its other calls must not see it."""
        return self._shared_call(node) == self._shared_call(reader)

    def _shared_call(self, node: fx.Node) -> Scope:
        """The innermost call around the node of a module that is called more often than what calls it."""
        operator = self.operators.get(node)
        if isinstance(operator, Same):  # nothing is edited there
            return self._shared_call(operator.input)
        scope: Scope = node.meta["scope"]
        times = [1, *(self._times[path] for path, _ in scope)]
        return next((scope[:i] for i in range(len(scope), 0, -1) if times[i] > times[i - 1]), ())

    def _best_source(self, root: fx.Node) -> fx.Node | None:
        """From which value to compute `root` with one convolution; None to run its own operator."""
        region = self.closure(root)
        free = self._needed_anyway(root, region)
        sources: dict[fx.Node, list[fx.Node]] = {}
        price: dict[fx.Node, Price] = {}
        choice: fx.Node | None = None
        for node in region:
            sources[node] = self._sources(node, sources)
            inputs = inputs_of(self.operators[node])
            best = _total([self._own_price(node), *(price.get(i, _NOTHING) for i in inputs)])
            choice = None
            for source in sources[node][1:]:
                emitted = self._emission_price(node, source)
                if emitted is None:
                    continue
                cost = _total([emitted, price.get(source, _NOTHING)])
                if cost < best:
                    best, choice = cost, source
            price[node] = _NOTHING if node in free else best
        if choice is not None and self._raises_cost(root, choice):
            return None
        return choice

    def _needed_anyway(self, root: fx.Node, region: list[fx.Node]) -> set[fx.Node]:
        """The values in the region that something else reads too, and all that those are computed from."""
        inside, free = set(region), set[fx.Node]()
        for node in reversed(region):
            read_elsewhere = any(user not in inside and user not in self.checks for user in node.users)
            if node is not root and (read_elsewhere or any(node in self._inputs(user) for user in free)):
                free.add(node)
        return free

    def _inputs(self, node: fx.Node) -> tuple[fx.Node, ...]:
        return inputs_of(self.operators[node])

    def _sources(self, node: fx.Node, known: dict[fx.Node, list[fx.Node]]) -> list[fx.Node]:
        """The values of which `node` may be a linear function, itself first, then from the nearest on."""
        common: list[fx.Node] | None = None
        for value in inputs_of(self.operators[node]):
            reachable = known.get(value, [value]) if self.same_call(value, node) else [value]
            common = reachable if common is None else [s for s in common if s in set(reachable)]
        sources = [node, *(common or [])]
        return sources if len(sources) <= _MOST_SOURCES else [*sources[: _MOST_SOURCES - 1], sources[-1]]

    def _own_price(self, node: fx.Node) -> Price:
        """What running the node's own operator costs."""
        if node not in self._own_prices:
            self._own_prices[node] = self._price_operator(node)
        return self._own_prices[node]

    def _price_operator(self, node: fx.Node) -> Price:
        operator = self.operators[node]
        if isinstance(operator, (Same, Slice, Flattened, Restored)):
            return _NOTHING
        constants = self.constants.operations(node)
        if isinstance(operator, Map) and operator.multiplies:
            macs, weights, layers = self._layer_price(node, operator.build(torch.device("meta")))
            return macs, weights, layers + constants
        own = max(1, len(inputs_of(operator)) - 1) if isinstance(operator, Sum) else 1
        return 0, 0, own + constants

    def _layer_price(self, node: fx.Node, convolution: Convolution) -> Price:
        """The price of the layer that computes `convolution`, a linear layer having no groups."""
        read = convolution.weight.shape[1] if convolution.spatial_axes else convolution.in_channels
        taps = read * math.prod(convolution.kernel_size)
        layers = 1 if convolution.has_symmetric_padding else 2
        if convolution.groups == convolution.in_channels and not self._depthwise_counts:
            return 0, 0, layers
        return math.prod(self.unit.shapes[node]) * taps, convolution.out_channels * taps, layers

    def _emission_price(self, node: fx.Node, source: fx.Node) -> Price | None:
        """What `node` costs as one convolution of `source`; None where it is none, or reads only a part of it."""
        if (node, source) not in self._emission_prices:
            emitted = self._emission_prices[node, source] = self._price_emission(node, source)
            if emitted is not None:
                self._note_cost(node, source, emitted)
        return self._emission_prices[node, source]

    def _price_emission(self, node: fx.Node, source: fx.Node) -> Price | None:
        try:
            branch = self.composer.structure(node, source)
        except NotFoldable as refusal:
            self.refusals.setdefault(node, str(refusal))
            return None
        if branch.convolution is None or self._rescales(source, node, branch.convolution):
            return _NOTHING
        shape, axes = self.unit.shapes[source], branch.convolution.spatial_axes
        channels = shape[1] if axes else shape[-1]
        whole = not branch.first and branch.convolution.in_channels == channels
        if not whole or branch.flattened or (axes and len(shape) != axes + 2):
            return None
        return self._layer_price(node, branch.convolution)

    def _rescales(self, source: fx.Node, root: fx.Node, convolution: Convolution) -> bool:
        """Whether the source is a layer that can take up the convolution in its own weight, for nobody else to see."""
        if not is_channelwise(convolution) or scalable_module(source, self.constants) is None:
            return False
        between = self.composer.between(source, root)
        readers = {user for node in (source, *between[:-1]) for user in node.users}
        return readers <= {*between, *self.checks}

    def _raises_cost(self, root: fx.Node, source: fx.Node) -> bool:
        """Whether the convolution costs more than all that it replaces, each operator counted once."""
        emitted = self._emission_price(root, source)
        assert emitted is not None
        return emitted[:2] > _total(self._own_price(node) for node in self.composer.between(source, root))[:2]

    def _note_cost(self, node: fx.Node, source: fx.Node, emitted: Price) -> None:
        """Note that an exact fold was declined, where it would have removed a layer and not only cheap operators."""
        replaced = _total(self._own_price(n) for n in self.composer.between(source, node))
        if emitted[0] > replaced[0] > 0:
            self.refusals.setdefault(
                node,
                f"as one convolution it would take {emitted[0]:,} multiply-accumulates, not {replaced[0]:,}",
            )
        elif emitted[:2] > replaced[:2] and replaced[0] > 0:
            self.refusals.setdefault(
                node, f"as one convolution it would have {emitted[1]:,} weights, not {replaced[1]:,}"
            )

    def _region(self, root: fx.Node, source: fx.Node) -> Region | None:
        """The chosen region; None where nothing has to run (an identity)."""
        structure = self.composer.structure(root, source).convolution
        if structure is None:
            return None
        operators = {node: self.operators[node] for node in self.composer.between(source, root)}
        nodes, waiting = {root}, [root]
        while waiting:
            for node in waiting.pop().all_input_nodes:
                if node is not source and node not in nodes and self.constants.varies(node):
                    nodes.add(node)
                    waiting.append(node)
        rescales = self._rescales(source, root, structure)
        compute = partial(self.composer.convolution, root, source)
        return Region(source, root, operators, frozenset(nodes), structure, compute, rescales)


def _total(prices: Iterable[Price]) -> Price:
    macs, weights, operators = map(sum, zip(*prices, strict=True))
    return macs, weights, operators
