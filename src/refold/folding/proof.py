"""Prove that two ways to compute a value agree: one region on random inputs, and whole networks."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from refold.algebra import Convolution
from refold.errors import NotEquivalent, NotFoldable, first_line
from refold.folding.constants import Constants, apply
from refold.folding.layers import rescaled
from refold.folding.planning import Region
from refold.folding.precision import Exact, in_float64, to_float64
from refold.folding.tracing import Arguments, copy_tensors, plain_mode

LARGEST_DISTANCE = 1e-9
"""In float64, the largest difference relative to the largest output that counts as rounding."""
LARGEST_RATIO = 4.0
"""In the model's own dtype: how much further from the float64 result than the original the folded model may be."""


@dataclass(frozen=True)
class Proof:
    """How far a network is from its reference.

    `distance_float64` is the largest difference of any output, relative to the largest output, both networks
    computed in float64; `inputs` are the shapes they were run on. `original_distance` and `folded_distance` are the
    distances (relative, root mean square) of both, run in their own dtype, from the float64 result of the reference;
    None where that dtype is float64. `regions` is how many parts were proved one by one, `worst_region` their largest
    distance. `sensitivity`, measured where `distance_float64` is more than rounding, is how far the reference moves
    when the last bit of its input changes.
    """

    distance_float64: float
    inputs: tuple[str, ...]
    original_distance: float | None = None
    folded_distance: float | None = None
    regions: int = 0
    worst_region: float = 0.0
    sensitivity: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The same numbers as plain JSON-able values; None for those that are not finite."""
        numbers = {k: v for k, v in asdict(self).items() if not isinstance(v, float) or math.isfinite(v)}
        return {**dict.fromkeys(asdict(self)), **numbers, "inputs": list(self.inputs)}


def prove_region(region: Region, convolution: Convolution, constants: Constants) -> float:
    """How far `convolution` is from a region: in float64, on random inputs of two sizes, borders included.

    Raises NotFoldable where it is more than rounding, or the original operators do not run on such inputs.
    """
    generator = torch.Generator().manual_seed(0)
    device = constants.unit.kinds[region.root][1]
    worst, proved, failure = 0.0, 0, ""
    own, structure = constants.unit.shapes[region.source], region.structure
    for shape in _probe_shapes(own, [structure], max(structure.stride, default=1)):
        x = torch.randn(shape, dtype=torch.float64, generator=generator)
        try:
            result = run(region.nodes, region.source, region.root, constants, x.clone().to(device))
            expected = _with_tail(region, result.cpu())
        except Exception as error:  # strided branches may agree in size for some inputs only
            failure = f"its operators do not run on a {shape} input ({first_line(error)})"
            continue
        worst, proved = max(worst, distance(expected, convolution(x))), proved + 1
        if proved == 2:
            break
    if proved < 2:
        raise NotFoldable(failure)
    if region.rescales:
        worst = max(worst, _rescaling_distance(region, convolution, constants, generator))
    require_proved(worst)
    return worst


def prove_chain(
    nodes: Set[fx.Node],
    source: fx.Node,
    root: fx.Node,
    last: fx.Node,
    folded: Mapping[fx.Node, Convolution],
    constants: Constants,
) -> float:
    """How far `last`, with `folded` for the convolutions before it, is from `root`: in float64, on two random inputs.

    Raises NotFoldable where it is more than rounding.
    """
    generator = torch.Generator().manual_seed(0)
    worst, convolutions = 0.0, list(folded.values())
    stride = max(convolutions[-1].stride, default=1)
    for _, shape in zip(
        range(2), _probe_shapes(constants.unit.shapes[source], convolutions, stride), strict=False
    ):
        x = torch.randn(shape, dtype=torch.float64, generator=generator).to(constants.unit.kinds[root][1])
        expected = run(nodes, source, root, constants, x.clone())
        worst = max(worst, distance(expected, run(nodes, source, last, constants, x.clone(), folded)))
    require_proved(worst)
    return worst


def prove_layer(convolution: Convolution, made: nn.Module, shapes: Sequence[tuple[int, ...]]) -> float:
    """How far a float64 layer is from `convolution` on random inputs of these shapes.

    Raises NotFoldable where it is more than rounding.
    """
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for shape in shapes:
        x = torch.randn(shape, dtype=torch.float64, generator=generator)
        worst = max(worst, distance(convolution(x), made(x)))
    require_proved(worst)
    return worst


def require_proved(worst: float) -> None:
    """Raise NotFoldable where a distance in float64 is more than rounding."""
    if not worst <= LARGEST_DISTANCE:
        raise NotFoldable(f"the proof failed: the results differ by {worst:.1e}")


def distance(expected: Tensor, found: Tensor) -> float:
    """The largest difference relative to the largest expected value; infinite where shapes or infinities differ."""
    if expected.shape != found.shape:
        return float("inf")
    expected, found = expected.detach().double(), found.detach().double()
    finite = torch.isfinite(expected)
    if not torch.allclose(expected[~finite], found[~finite], equal_nan=True):
        return float("inf")
    expected, found = expected[finite], found[finite]
    if expected.numel() == 0:
        return 0.0
    difference, scale = float((expected - found).abs().max()), float(expected.abs().max())
    if difference != difference:
        return float("inf")
    return difference / scale if scale else difference


def prove_float64(
    reference: nn.Module, candidate: nn.Module, inputs: list[Arguments], exact: Exact | None = None
) -> float:
    """The largest relative difference of any output of two networks, both computed in float64.

    `exact` are the float64 values of those parameters of the candidate that are already rounded.
    """
    worst = 0.0
    for arguments in inputs:
        expected = outputs(reference, arguments, float64=True)
        found = outputs(candidate, arguments, float64=True, exact=exact)
        if len(expected) != len(found):
            return float("inf")
        worst = max([worst, *(distance(e, f) for e, f in zip(expected, found, strict=True))])
    return worst


def own_distances(
    reference: nn.Module, candidate: nn.Module, arguments: Arguments
) -> tuple[float, float] | None:
    """How far both networks, run in their own dtype, are from the reference run in float64; None for float64.

    Relative, root mean square over all outputs.
    """
    own = outputs(reference, arguments)
    if all(value.dtype == torch.float64 or not value.is_floating_point() for value in own):
        return None
    truth = outputs(reference, arguments, float64=True)
    return _spread(truth, own), _spread(truth, outputs(candidate, arguments))


def sensitivity(reference: nn.Module, inputs: list[Arguments]) -> float:
    """How far the outputs of a network move, in float64, when each input value moves by its last bit.

    No rewriting can come closer: an unstable network turns any rounding into a visible difference.
    """
    generator = torch.Generator().manual_seed(2)

    def nudged(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.device)
        return value.double() * (1 + torch.finfo(torch.float64).eps * noise)

    worst = 0.0
    for arguments in inputs:
        expected = outputs(reference, arguments, float64=True)
        found = outputs(reference, tree_map(nudged, arguments), float64=True)
        worst = max([worst, *(distance(e, f) for e, f in zip(expected, found, strict=True))])
    return worst


def require_same(proof: Proof) -> None:
    """Raise NotEquivalent where two networks differ in float64 by more than rounding explains."""
    allowed = max(LARGEST_DISTANCE, 10 * (proof.sensitivity or 0.0))
    if not proof.distance_float64 <= allowed:
        raise NotEquivalent(
            f"the networks differ by {proof.distance_float64:.1e} of the largest output in float64, "
            f"more than {allowed:.0e}: they do not compute the same function.",
            proof,
        )


def require_stable(proof: Proof) -> None:
    """Raise NotEquivalent where the reference is too unstable in its own dtype for a comparison to mean anything."""
    if proof.original_distance is not None and not proof.original_distance <= 0.5:
        raise NotEquivalent(
            f"the first network in its own dtype is {proof.original_distance:.1e} from its float64 result, so that "
            "nothing can be said about the second; compare them in float64 (model.double()).",
            proof,
        )


def require_close(proof: Proof) -> None:
    """Raise NotEquivalent where the second network, in its own dtype, is much further from the truth than the first."""
    if proof.original_distance is None or proof.folded_distance is None:
        return
    # The floor is for an original that happens to be exact: one rounding step of float32.
    allowed = LARGEST_RATIO * max(proof.original_distance, torch.finfo(torch.float32).eps)
    if not proof.folded_distance <= allowed:
        raise NotEquivalent(
            f"the second network is {proof.folded_distance:.1e} from the float64 result, more than "
            f"{LARGEST_RATIO:g} times the {proof.original_distance:.1e} of the first: "
            "they do not compute the same function.",
            proof,
        )


def outputs(
    model: nn.Module, arguments: Arguments, float64: bool = False, exact: Exact | None = None
) -> list[Tensor]:
    """All tensors that the model returns in evaluation mode; it is run as a copy, for it may keep what it computes."""
    model = shared_copy(model).eval()
    with plain_mode():
        if not float64:
            return _call(model, arguments)
        try:
            with in_float64(exact):
                return _call(model, to_float64(arguments))
        except Exception:  # code that torch functions do not pass through, such as TorchScript
            return _call(_doubled(model, exact or {}), to_float64(arguments))


def _doubled(model: nn.Module, exact: Exact) -> nn.Module:
    doubled = copy.deepcopy(model).double()
    for rounded, parameter in zip(model.parameters(), doubled.parameters(), strict=True):
        if id(rounded) in exact:
            parameter.data = exact[id(rounded)]()
    return doubled


def _call(model: nn.Module, arguments: Arguments) -> list[Tensor]:
    return _tensors(model(*copy_tensors(arguments[0]), **copy_tensors(arguments[1])))


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in a result, those inside of objects too."""
    found: list[Tensor] = []
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, (type, nn.Module)):
            found += _tensors(list(vars(leaf).values()))
    return found


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of all modules and buffers that still holds the same parameters: it needs no second set of weights."""
    known: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and value.grad_fn is not None:  # computed from parameters by a hook
                known[id(value)] = value.detach().clone()
    return copy.deepcopy(model, known)


def _spread(truth: list[Tensor], found: list[Tensor]) -> float:
    if [t.shape for t in truth] != [f.shape for f in found]:
        return float("inf")
    difference = scale = 0.0
    for expected, value in zip(truth, found, strict=True):
        expected, value = expected.double(), value.double()
        finite = torch.isfinite(expected) & torch.isfinite(value)
        if not torch.allclose(expected[~finite], value[~finite], equal_nan=True):
            return float("inf")
        difference += float((expected - value)[finite].square().sum())
        scale += float(expected[finite].square().sum())
    return float((difference / scale) ** 0.5) if scale else float(difference**0.5)


def _probe_shapes(
    own: tuple[int, ...], convolutions: Sequence[Convolution], stride: int
) -> Iterator[tuple[int, ...]]:
    """Small inputs, not square and of odd and even sizes, in which every tap meets the border."""
    if convolutions[0].spatial_axes == 0:
        yield (*(min(size, 3 + i) for i, size in enumerate(own[:-1])), own[-1])
        yield (*(1,) * (len(own) - 1), own[-1])
        return
    spans = [[d * (k - 1) for d, k in zip(c.dilation, c.kernel_size, strict=True)] for c in convolutions]
    reach = [1 + sum(along) for along in zip(*spans, strict=True)]
    for extra in range(2 * stride):
        yield (2, own[1], *(extent + 4 + extra + 3 * i for i, extent in enumerate(reach)))
        yield (1, own[1], *(extent + 7 + extra - 2 * i for i, extent in enumerate(reach)))


def run(
    nodes: Set[fx.Node],
    source: fx.Node,
    root: fx.Node,
    constants: Constants,
    x: Tensor,
    instead: Mapping[fx.Node, Convolution] | None = None,
) -> Tensor:
    """What `nodes` make of `x` in the place of `source`, in float64; some of them convolutions `instead`."""
    values: dict[fx.Node, Any] = {source: x}
    replaced = instead or {}

    def value(node: fx.Node) -> Any:
        return values[node] if node in values else constants.evaluate(node)

    with in_float64(), torch.no_grad():
        for node in constants.unit.graph.nodes:
            if node in nodes:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
                if node in replaced:
                    values[node] = replaced[node](args[0].cpu()).to(args[0].device)
                elif node.op == "call_module":
                    values[node] = constants.unit.attribute(str(node.target))(*args, **kwargs)
                else:
                    values[node] = apply(node, args, kwargs)
            if node is root:
                break
    result = values[root]
    assert isinstance(result, Tensor)
    return result


def _with_tail(region: Region, value: Tensor) -> Tensor:
    if region.tail is None:
        return value
    scale, shift = region.tail
    axes = region.structure.spatial_axes
    by_channel = (-1, *(1,) * axes)
    return value * scale.reshape(by_channel) + (0.0 if shift is None else shift.reshape(by_channel))


def _rescaling_distance(
    region: Region, convolution: Convolution, constants: Constants, generator: torch.Generator
) -> float:
    """How far the rescaled layer is from the original one followed by the scale and shift."""
    original = constants.unit.attribute(str(region.source.target))
    own = constants.unit.shapes[region.source.all_input_nodes[0]]
    x = torch.randn(own, dtype=torch.float64, generator=generator).to(constants.unit.kinds[region.root][1])
    with in_float64(), torch.no_grad():
        expected = convolution(original(x).cpu())
        return distance(expected, rescaled(original, convolution).to(x.device)(x).cpu())
