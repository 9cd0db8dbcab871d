"""A pass: what a dense kernel does to each channel by itself is taken out of it and added beside it.

The identity branch of a re-parameterized block stands on the diagonal of its kernel, many times larger than the weights
around it. Beside the kernel, as one weight a channel, it costs no precision where weights become integers.
"""

from __future__ import annotations

import operator
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from refold.algebra import Convolution, affine
from refold.folding.layers import layer
from refold.folding.planning import Planner
from refold.folding.report import FoldedRegion
from refold.folding.rewrite import FUNCTION, Applied, NewLayer, Operation, Rewrite
from refold.recording.linear import Map, inputs_of

_CPU = torch.device("cpu")
# How much larger than the rest of its row the diagonal is, in half of the rows at least, where it is an outlier.
_OUTLIER = 1.5


def identities_out(planner: Planner) -> list[Rewrite]:
    """Every dense convolution with a diagonal of outliers as one without, and a depthwise one beside it."""
    found = []
    for node, meaning in planner.operators.items():
        barred = node in planner.recording.barriers or (node, "identity") in planner.excluded
        if barred or not isinstance(meaning, Map) or not meaning.multiplies:
            continue
        if _may_hold_identity(meaning.structure) and _is_outlier(meaning.build(_CPU)):
            found.append(_rewrite(planner, node, meaning))
    return found


def split_identity(convolution: Convolution) -> tuple[Convolution, Convolution]:
    """A convolution as the sum of one whose centre has no diagonal, and that diagonal: one weight a channel."""
    diagonal = _diagonal(convolution)
    weight = convolution.weight.clone()
    _at_centre(weight).diagonal().zero_()
    return replace(convolution, weight=weight), affine(diagonal, None, convolution.spatial_axes)


def _may_hold_identity(convolution: Convolution) -> bool:
    """Whether the middle of its kernel stands on the pixel that it writes."""
    return (
        convolution.groups == 1
        and convolution.spatial_axes == 2
        and convolution.in_channels == convolution.out_channels
        and all(step == 1 for step in convolution.stride)
        and all(
            size % 2 and pair == (gap * (size // 2),) * 2
            for size, pair, gap in zip(
                convolution.kernel_size, convolution.padding, convolution.dilation, strict=True
            )
        )
    )


def _is_outlier(convolution: Convolution) -> bool:
    rest, _ = split_identity(convolution)
    around = rest.weight.flatten(1).abs().amax(dim=1)
    return bool((_diagonal(convolution).abs() > _OUTLIER * around).double().mean() >= 0.5)


def _at_centre(weight: Tensor) -> Tensor:
    """The matrix in the middle of a kernel, as a view."""
    for size in weight.shape[2:]:
        weight = weight.select(2, size // 2)
    return weight


def _diagonal(convolution: Convolution) -> Tensor:
    return _at_centre(convolution.weight).diagonal().clone()


def _rewrite(planner: Planner, node: fx.Node, meaning: Map) -> Rewrite:
    (source,) = inputs_of(meaning)

    def applied(part: int) -> Applied:
        def build() -> nn.Module:
            return layer(split_identity(meaning.build(_CPU))[part])

        return Applied(NewLayer(build, planner.recording.kinds[node]), source, ("conv", "identity")[part])

    path = str(node.target) if node.op == "call_module" else node.meta["scope"][-1].path
    return Rewrite(
        steps={node: Operation(FUNCTION, operator.add, (applied(0), applied(1)))},
        nodes=frozenset([node]),
        outputs=(node,),
        operators=[],
        folded=[
            FoldedRegion(path, {"convolution": 1}, "kernel without its diagonal, and the diagonal beside it")
        ],
        convolutions=(meaning.structure,),
        joint=True,
        key=(node, "identity"),
    )
