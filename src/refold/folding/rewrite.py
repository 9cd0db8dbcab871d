"""The one kind of change that folding makes: some operators are computed in another way, and that is proved."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from refold.algebra import Convolution
from refold.errors import NotFoldable, first_line
from refold.folding.comparing import distance, require_proved
from refold.folding.layers import require_fit
from refold.folding.report import FoldedRegion
from refold.recording.constants import Constants, apply
from refold.recording.precision import in_float64

MODULE, FUNCTION, METHOD = "call_module", "call_function", "call_method"


@dataclass
class Memory:
    """How many bytes of float64 layers may be kept until the network is proved; the others are built again."""

    left: int = 0


@dataclass(eq=False)
class NewLayer:
    """A layer that takes the place of others: how to build it in float64 on the CPU, and where it will live."""

    build: Callable[[], nn.Module]
    kind: tuple[torch.dtype, torch.device]
    copy_of: str | None = None
    """The layer, by path, of which it is a copy that does not work in place."""
    rounded: nn.Module | None = None
    kept: nn.Module | None = None

    def settle(self, made: nn.Module, memory: Memory) -> None:
        """Keep `made`, which `build` gave, rounded to the model's dtype. Raises NotFoldable where it does not fit."""
        dtype, device = self.kind
        require_fit(made, dtype)
        size = sum(value.numel() * 8 for value in made.parameters())
        if size <= memory.left:
            memory.left -= size
            self.kept, made = made, copy.deepcopy(made)
        self.rounded = made.to(device, dtype).eval()

    @property
    def module(self) -> nn.Module:
        """The rounded layer."""
        assert self.rounded is not None
        return self.rounded

    def exact(self) -> dict[int, Callable[[], Tensor]]:
        """What each rounded parameter is in float64: built when it is read, unless it was kept."""
        biases: dict[str, Tensor] = {}

        def compute(name: str) -> Tensor:
            if name in biases:
                return biases[name]
            made = self.build() if self.kept is None else self.kept
            parameters = {key: value.detach().to(self.kind[1]) for key, value in made.named_parameters()}
            biases.update((key, value) for key, value in parameters.items() if value.dim() == 1)
            return parameters[name]

        return {id(value): partial(compute, name) for name, value in self.module.named_parameters()}


@dataclass(eq=False)
class Applied:
    """A new layer applied to a value."""

    layer: NewLayer
    source: Value
    name: str = "conv"


@dataclass(eq=False)
class Operation:
    """An operator (as torch.fx names its kind) applied to values, as those of a recording are."""

    kind: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


Value = fx.Node | Applied | Operation
"""How a value is computed: as it was, by a new layer, or by an operator."""


@dataclass(eq=False)
class Rewrite:
    """Some values of a recording are computed in another way. A value in `steps` is what stands there instead; nodes
    in it are read as they are after the rewrite."""

    steps: dict[fx.Node, Value]
    nodes: frozenset[fx.Node]
    """Every operator that goes or is wired anew."""
    outputs: tuple[fx.Node, ...]
    """The values that must stay what they were."""
    operators: list[fx.Node]
    """The operators that go, for the account."""
    folded: list[FoldedRegion]
    convolutions: tuple[Convolution, ...] = ()
    """The structure of what is applied one after the other, from which the inputs of the proof are chosen."""
    check: Callable[[], None] = lambda: None
    """Raises NotFoldable where it is not exact, beyond what the composition of its layers finds."""
    interior: frozenset[fx.Node] = frozenset()
    """What is computed again to prove it, where that is more than `nodes`."""
    joint: bool = False
    """Whether its steps share values, so that one module holds them all."""
    on_one_pixel: bool = False
    """Whether what it reads is a map of one pixel, whatever the size of the image."""
    key: Any = None
    """What was chosen, so that the next best is planned where it is refused."""

    @property
    def layers(self) -> list[NewLayer]:
        """All new layers, each once."""
        found = [value.layer for value in values_in(self.steps.values()) if isinstance(value, Applied)]
        return list(dict.fromkeys(found))

    def inputs(self, varying: set[fx.Node]) -> list[fx.Node]:
        """The values that it reads and does not compute."""
        interior = self.nodes | self.interior | set(self.steps)
        read = dict.fromkeys(v for node in interior for v in node.all_input_nodes)
        read |= dict.fromkeys(v for v in values_in(self.steps.values()) if isinstance(v, fx.Node))
        return [node for node in read if node not in interior and node in varying]


def values_in(values: Iterable[Any]) -> Iterator[Value]:
    """All values that these are computed from, themselves first, each once."""
    waiting, seen = list(values), set[int]()
    while waiting:
        value = waiting.pop()
        if isinstance(value, (list, tuple)):
            waiting += value
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, (fx.Node, Applied, Operation)) and id(value) not in seen:
            seen.add(id(value))
            yield value
            if isinstance(value, Applied):
                waiting.append(value.source)
            elif isinstance(value, Operation):
                waiting += [value.args, value.kwargs]


def mapped(value: Any, of: Callable[[Any], Any]) -> Any:
    """A structure of arguments with `of` applied to every value in it."""
    if isinstance(value, (fx.Node, Applied, Operation)):
        return of(value)
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(item, of) for item in value)
    if isinstance(value, dict):
        return {key: mapped(item, of) for key, item in value.items()}
    return fx.node.map_aggregate(value, lambda v: of(v) if isinstance(v, fx.Node) else v)


class Evaluation:
    """Computes values of a recording in float64 from given ones, with or without the steps of a rewrite."""

    def __init__(
        self,
        constants: Constants,
        given: dict[fx.Node, Any],
        rewrite: Rewrite | None = None,
        made: dict[int, Any] | None = None,
    ) -> None:
        self._constants, self._made = constants, made if made is not None else {}
        self._values: dict[Any, Any] = dict(given)
        self._steps = rewrite.steps if rewrite is not None else {}

    def value(self, wanted: fx.Node) -> Any:
        """The value of one node. Raises whatever its operators raise."""
        with in_float64(), torch.no_grad():
            for node in self._needed(wanted):
                self._values[node] = self._compute(node)
        return self._values[wanted]

    def _needed(self, wanted: fx.Node) -> list[fx.Node]:
        varying, found, waiting = self._constants.recording.varying, set[fx.Node](), [wanted]
        while waiting:
            node = waiting.pop()
            if node in self._values or node in found or node not in varying:
                continue
            found.add(node)
            step = self._steps.get(node)
            read = (
                node.all_input_nodes
                if step is None
                else [v for v in values_in([step]) if isinstance(v, fx.Node)]
            )
            waiting += read
        return sorted(found, key=self._constants.order.__getitem__)

    def _compute(self, value: Any) -> Any:
        if value in self._values:
            return self._values[value]
        recording = self._constants.recording
        if isinstance(value, fx.Node) and value not in recording.varying:
            return self._constants.evaluate(value)
        if isinstance(value, fx.Node) and value in self._steps:
            return self._compute(self._steps[value])
        if isinstance(value, fx.Node):
            args, kwargs = mapped((value.args, value.kwargs), self._compute)
            return apply(recording, value, args, kwargs)
        if isinstance(value, Applied):
            source = self._compute(value.source)
            found = self._layer(value.layer)(source.to(value.layer.kind[1]))
        else:
            args, kwargs = mapped((value.args, value.kwargs), self._compute)
            run = recording.attribute(value.target) if value.kind == MODULE else value.target
            found = (
                getattr(args[0], run)(*args[1:], **kwargs) if value.kind == METHOD else run(*args, **kwargs)
            )
        self._values[value] = found
        return found

    def _layer(self, layer: NewLayer) -> nn.Module:
        if id(layer) not in self._made:
            self._made[id(layer)] = layer.build()
        return self._made[id(layer)].to(layer.kind[1])  # type: ignore[no-any-return]  # a dictionary of layers


def make(
    rewrite: Rewrite, constants: Constants, tolerance: float | None, memory: Memory | None = None
) -> float | None:
    """Build the new layers of a rewrite, prove it unless `tolerance` is None, and round them.

    The largest distance of any output, in float64 on random inputs of two sizes, borders included. Raises
    NotFoldable where it is more than the tolerance, the operators run on no random input, or a layer does not fit.
    """
    rewrite.check()
    made = {id(layer): layer.build() for layer in rewrite.layers}
    worst = None if tolerance is None else _prove(rewrite, constants, tolerance, made)
    for layer in rewrite.layers:
        layer.settle(made[id(layer)], memory or Memory())
    return worst


def _prove(rewrite: Rewrite, constants: Constants, tolerance: float, made: dict[int, Any]) -> float:
    worst, proved, failure = 0.0, 0, "it reads nothing"
    for given in _probes(rewrite, constants):
        try:
            before, after = (
                Evaluation(constants, copied(given)),
                Evaluation(constants, copied(given), rewrite, made),
            )
            pairs = [(before.value(node), after.value(node)) for node in rewrite.outputs]
        except NotFoldable:
            raise
        except (
            Exception
        ) as error:  # strided branches may agree in size, and pooling may run, for some inputs only
            failure = f"its operators do not run on a random input ({first_line(error)})"
            continue
        worst = max([worst, *(distance(e, f) for e, f in pairs if isinstance(e, Tensor))])
        proved += 1
        if proved == 2:
            break
    if not proved:
        raise NotFoldable(failure)
    require_proved(worst, tolerance)
    return worst


def copied(given: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
    """The same values, the tensors copied, since an operator may change them in place."""
    return {node: value.clone() if isinstance(value, Tensor) else value for node, value in given.items()}


def _probes(rewrite: Rewrite, constants: Constants) -> Iterator[dict[fx.Node, Any]]:
    """Random inputs of two sizes and more: small ones, not square and of odd and even sides, in which every tap meets
    the border, and those of the recorded run."""
    recording = constants.recording
    inputs = rewrite.inputs(recording.varying)
    numbers = {node: node.meta["number"] for node in inputs if "number" in node.meta}
    tensors = [node for node in inputs if node not in numbers]
    if not inputs or any(not recording.kinds.get(n, (torch.int64,))[0].is_floating_point for n in tensors):
        raise NotFoldable("what it reads is not made of real numbers")
    generator = torch.Generator().manual_seed(0)
    shapes = [recording.shapes[node] for node in tensors]
    for own in [
        *(() if numbers or rewrite.on_one_pixel else _small(shapes, rewrite.convolutions)),
        shapes,
        [(3, *s[1:]) for s in shapes],
    ]:
        drawn = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in own]
        yield {**numbers, **{n: x.to(recording.kinds[n][1]) for n, x in zip(tensors, drawn, strict=True)}}


def _small(
    shapes: Sequence[tuple[int, ...]], convolutions: Sequence[Convolution]
) -> Iterator[list[tuple[int, ...]]]:
    if len({shape[2:] for shape in shapes}) > 1:
        return
    if convolutions and convolutions[0].spatial_axes == 0:
        if len({shape[:-1] for shape in shapes}) == 1:
            yield [(*(min(size, 3 + i) for i, size in enumerate(shape[:-1])), shape[-1]) for shape in shapes]
            yield [(*(1,) * (len(shape) - 1), shape[-1]) for shape in shapes]
        return
    axes = len(shapes[0]) - 2
    if not 0 < axes < 4:
        return
    alike = [c for c in convolutions if c.spatial_axes == axes]
    spans = [[d * (k - 1) for d, k in zip(c.dilation, c.kernel_size, strict=True)] for c in alike]
    reach = [1 + sum(along) for along in zip(*spans, strict=True)] or [1] * axes
    stride = max((step for c in alike for step in c.stride), default=1)
    for extra in range(2 * stride):
        for batch, sides in (
            (2, [extent + 4 + extra + 3 * i for i, extent in enumerate(reach)]),
            (1, [extent + 7 + extra - 2 * i for i, extent in enumerate(reach)]),
        ):
            yield [(batch, shape[1], *sides) for shape in shapes]
    for larger in ((12, 9, 8), (23, 38, 21)):
        yield [(2, shape[1], *larger[:axes]) for shape in shapes]
