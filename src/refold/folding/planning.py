"""Choose what becomes one convolution: the regions of a graph that are linear in one value, where folding them pays."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Set
from functools import partial

from torch import fx

from refold.algebra import Convolution, is_channelwise
from refold.errors import NotFoldable
from refold.folding.composing import Composer
from refold.folding.grouping import regrouped
from refold.folding.region import NOTHING, Price, Region, plus, total
from refold.recording.constants import Constants
from refold.recording.linear import Flattened, Linear, Map, Moved, Restored, Same, Slice, Sum, Use, inputs_of
from refold.recording.operators import meaning, takes_scale
from refold.recording.recording import Scope
from refold.recording.surroundings import Recorded, crossed

_MOST_SOURCES = 16
"""How many values a purely linear chain may be computed from: the nearest, and its start."""

_CHANGED = "a tensor that it reads is changed in place while others read it"


class Planner:
    """Plans one model. Only shapes are looked at (tensors on the meta device): a region computes its numbers later."""

    def __init__(self, recorded: Recorded) -> None:
        self.recorded, self.recording = recorded, recorded.first
        self.graph, self.shapes = self.recording.graph, self.recording.shapes
        self.constants = Constants(self.recording)
        self.refusals: dict[fx.Node, str] = {}
        self.excluded: set[object] = set()
        """What was planned and then refused: the next best is planned instead."""
        self.taken: set[fx.Node] = set()
        """The operators that the regions of the last plan take up."""
        self.demanded: set[fx.Node] = set()
        """The values that have to be computed, filled in by `plan`."""
        self.order = self.constants.order
        self._times = Counter(scope[-1].path for scope in self.recording.calls if not scope[-1].hooks)
        self.operators = {n: op for n in self.graph.nodes if (op := self._recognise(n)) is not None}
        self.composer = Composer(self.operators, self.shapes)
        self._depthwise_counts = True
        self._own_prices: dict[fx.Node, Price] = {}
        self._emission_prices: dict[tuple[fx.Node, fx.Node], Price | None] = {}
        self.sums: dict[tuple[fx.Node, tuple[fx.Node, ...]], fx.Node] = {}
        self._borders: dict[tuple[fx.Node, fx.Node], bool] = {}

    def use(self, node: fx.Node) -> Use:
        """A node as the registry of operators reads it."""
        return Use(node, self.constants)

    def plan(self, *, depthwise_counts: bool = True, regroup: Set[fx.Node] = frozenset()) -> list[Region]:
        """Choose for every value that something non-linear needs, from the last to the first, how to compute it.

        `depthwise_counts` says whether the multiply-accumulates and weights of depthwise convolutions have a price.
        Of the sums in `regroup`, those terms that read the same value are merged; `ungrouped` are all that may be.
        """
        if depthwise_counts is not self._depthwise_counts:
            self._depthwise_counts = depthwise_counts
            self._own_prices.clear()
            self._emission_prices.clear()
        regions: list[Region] = []
        self.demanded = demanded = set[fx.Node]()
        self.ungrouped: set[fx.Node] = set()
        for node in reversed(self.graph.nodes):
            unread = not node.users  # it runs all the same
            if node.op == "output" or ((node in demanded or unread) and node not in self.operators):
                demanded.update(node.all_input_nodes)
            elif node in demanded or unread:
                source = self._best_source(node)
                regions += (
                    self._planned(node, source) if source is not None else regrouped(self, node, regroup)
                )
        return regions[::-1]

    def _planned(self, node: fx.Node, source: fx.Node) -> list[Region]:
        self.demanded.add(source)
        region = self.region(node, source)
        return [] if region is None else [region]

    def forget(self, refused: Container[object]) -> None:
        """Forget the prices of what was refused, so that the next best is chosen."""
        for pair in [pair for pair in self._emission_prices if pair in refused]:
            del self._emission_prices[pair]

    def _recognise(self, node: fx.Node) -> Linear | None:
        if node in self.recording.barriers:
            self.refusals[node] = _CHANGED
            return None
        if node not in self.shapes or node not in self.recording.varying or node.op == "placeholder":
            return None
        if node in self.recorded.changed:
            self.refusals[node] = self.recorded.changed[node]
            return None
        try:
            found = meaning(self.use(node))
        except NotFoldable as refusal:
            self.refusals[node] = str(refusal)
            return None
        return (
            found if found is not None and all(value in self.shapes for value in inputs_of(found)) else None
        )

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
        """Whether a change may lie across: no border of a module that is called several times is between, whose other
        calls must not see it, nor code or hooks that look at values, and it is the same at another size."""
        if (node, reader) not in self._borders:
            self._borders[node, reader] = self._is_open(node, reader)
        return self._borders[node, reader]

    def _is_open(self, node: fx.Node, reader: fx.Node) -> bool:
        guarded = next(
            (s for s in crossed(self.recording, node, reader) if s in self.recording.guarded), None
        )
        if guarded is not None:
            where = guarded[-1].path or "the model"
            self.refusals.setdefault(reader, f"{self.recording.guarded[guarded]}, in {where}")
            return False
        if (node, reader) in self.recorded.moved:
            self.refusals.setdefault(reader, "it reads something else at another size of the input")
            return False
        ways = {
            s: last
            for s, last in self.recorded.turns
            if self.order[node] <= self.order.get(last, -1) < self.order[reader]
        }
        if any(scope in ways for scope in crossed(self.recording, node, reader)):
            self.refusals.setdefault(
                reader, "the code before it may do something else for another size of the input"
            )
            return False
        return self._shared_call(node) == self._shared_call(reader)

    def _shared_call(self, node: fx.Node) -> Scope:
        """The innermost call around the node of a module that is called more often than what calls it."""
        operator = self.operators.get(node)
        if isinstance(operator, Same):  # nothing is edited there
            return self._shared_call(operator.input)
        scope: Scope = node.meta["scope"]
        times = [1, *(self._times[call.path] for call in scope)]
        return next((scope[:i] for i in range(len(scope), 0, -1) if times[i] > times[i - 1]), ())

    def _best_source(self, root: fx.Node) -> fx.Node | None:
        """From which value to compute `root` with one convolution; None to run its own operator."""
        region = self.closure(root)
        free = self._needed_anyway(root, region)
        sources: dict[fx.Node, list[fx.Node]] = {}
        price: dict[fx.Node, Price] = {}
        choice: fx.Node | None = None
        for node in region:
            sources[node] = self.sources(node, sources)
            inputs = inputs_of(self.operators[node])
            best = self.own_price(node)
            for value in inputs:
                best = plus(best, price.get(value, NOTHING))
            choice = None
            for source in sources[node][1:]:
                emitted = self.emission_price(node, source)
                if emitted is None:
                    continue
                cost = plus(emitted, price.get(source, NOTHING))
                if cost < best:
                    best, choice = cost, source
            price[node] = NOTHING if node in free else best
        if choice is not None and self._raises_cost(root, choice):
            return None
        return choice

    def _needed_anyway(self, root: fx.Node, region: list[fx.Node]) -> set[fx.Node]:
        """The values in the region that something else reads too, and all that those are computed from."""
        inside, free, needed = set(region), set[fx.Node](), set[fx.Node]()
        for node in reversed(region):
            if node is not root and (node in needed or any(user not in inside for user in node.users)):
                free.add(node)
                needed.update(inputs_of(self.operators[node]))
        return free

    def sources(self, node: fx.Node, known: dict[fx.Node, list[fx.Node]]) -> list[fx.Node]:
        """The values of which `node` may be a linear function, itself first, then from the nearest on."""
        common: list[fx.Node] | None = None
        for value in inputs_of(self.operators[node]):
            reachable = known.get(value, [value]) if self.same_call(value, node) else [value]
            reached = set(reachable)
            common = reachable if common is None else [s for s in common if s in reached]
        sources = [node, *(common or [])]
        return sources if len(sources) <= _MOST_SOURCES else [*sources[: _MOST_SOURCES - 1], sources[-1]]

    def own_price(self, node: fx.Node) -> Price:
        """What running the node's own operator costs."""
        if node not in self._own_prices:
            self._own_prices[node] = self._price_operator(node)
        return self._own_prices[node]

    def _price_operator(self, node: fx.Node) -> Price:
        operator = self.operators[node]
        if isinstance(operator, (Same, Slice, Flattened, Restored, Moved)):
            return NOTHING
        constants = self.constants.operations(node)
        if isinstance(operator, Map) and operator.multiplies:
            macs, weights, layers = self._layer_price(node, operator.structure)
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
        return math.prod(self.shapes[node]) * taps, convolution.out_channels * taps, layers

    def emission_price(self, node: fx.Node, source: fx.Node) -> Price | None:
        """What `node` costs as one convolution of `source`; None where it is none, or reads only a part of it."""
        if (node, source) not in self._emission_prices:
            emitted = self._emission_prices[node, source] = self._price_emission(node, source)
            if emitted is not None:
                self._note_cost(node, source, emitted)
        return self._emission_prices[node, source]

    def _price_emission(self, node: fx.Node, source: fx.Node) -> Price | None:
        if (node, source) in self.excluded:
            return None
        try:
            branch = self.composer.structure(node, source)
        except NotFoldable as refusal:
            self.refusals.setdefault(node, str(refusal))
            return None
        if branch.convolution is None:
            return None if branch.moved else NOTHING
        if self._rescales(source, node, branch.convolution):
            return NOTHING
        shape, axes = self.shapes[source], branch.convolution.spatial_axes
        channels = shape[1] if axes else shape[-1]
        whole = not branch.first and branch.convolution.in_channels == channels
        if not whole or branch.flattened or branch.moved or (axes and len(shape) != axes + 2):
            return None
        if self.changes_between(source, node):
            self.refusals.setdefault(node, _CHANGED)
            return None
        return self._layer_price(node, branch.convolution)

    def changes_between(self, source: fx.Node, root: fx.Node) -> bool:
        """Whether the source is changed in place, by what stays, before `root` would read it."""
        between = set(self.composer.between(source, root)) if self.recording.mutations else set()
        for mutation, members in self.recording.mutations:
            stays = mutation not in between or not set(mutation.users) <= between
            stays = stays or mutation in self.recording.effects
            if source in members and self.order[source] < self.order[mutation] < self.order[root] and stays:
                return True
        return False

    def _rescales(self, source: fx.Node, root: fx.Node, convolution: Convolution) -> bool:
        """Whether the source is a layer that can take up the convolution in its own weight, for nobody else to see."""
        if not is_channelwise(convolution) or source in self.operators or not takes_scale(self.use(source)):
            return False
        if source in self.recording.barriers or source in self.recorded.changed:
            return False
        between = self.composer.between(source, root)
        readers = {user for node in (source, *between[:-1]) for user in node.users}
        return readers <= set(between)

    def _raises_cost(self, root: fx.Node, source: fx.Node) -> bool:
        """Whether the convolution costs more than all that it replaces, each operator counted once."""
        emitted = self.emission_price(root, source)
        assert emitted is not None
        return emitted[:2] > total(self.own_price(node) for node in self.composer.between(source, root))[:2]

    def _note_cost(self, node: fx.Node, source: fx.Node, emitted: Price) -> None:
        """Note that an exact fold was declined, where it would have removed a layer and not only cheap operators."""
        replaced = total(self.own_price(n) for n in self.composer.between(source, node))
        if emitted[0] > replaced[0] > 0:
            self.refusals.setdefault(
                node,
                f"as one convolution it would take {emitted[0]:,} multiply-accumulates, not {replaced[0]:,}",
            )
        elif emitted[:2] > replaced[:2] and replaced[0] > 0:
            self.refusals.setdefault(
                node, f"as one convolution it would have {emitted[1]:,} weights, not {replaced[1]:,}"
            )

    def region(self, root: fx.Node, source: fx.Node) -> Region | None:
        """The chosen region; None where nothing has to run (an identity)."""
        structure = self.composer.structure(root, source).convolution
        if structure is None:
            return None
        operators = {node: self.operators[node] for node in self.composer.between(source, root)}
        nodes, waiting = {root}, [root]
        while waiting:
            reader = waiting.pop()
            for node in reader.all_input_nodes or inputs_of(self.operators[reader]):
                inside = node is not source and "number" not in node.meta
                if inside and node not in nodes and node in self.recording.varying:
                    nodes.add(node)
                    waiting.append(node)
        rescales = self._rescales(source, root, structure)
        compute = partial(self.composer.convolution, root, source)
        return Region(source, root, operators, frozenset(nodes), structure, compute, rescales)
