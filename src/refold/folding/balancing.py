"""A pass: channels scaled between layers, so that the weights that write each and those that read it are of one size.

It is exact through what is homogeneous, ReLU, PReLU, pooling and sums, and through nothing else: a cap such as that of
ReLU6 would be another one. Where a tensor has one step for all its weights, small channels then have as many steps as
large ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from refold.algebra import balancing, largest_of_inputs, largest_of_outputs, scale_outputs, unscale_inputs
from refold.folding.layers import layer
from refold.folding.planning import Planner
from refold.folding.rewrite import Applied, NewLayer, Rewrite, Value
from refold.folding.streams import Stream, built, sources_of, stream_rewrite, streams
from refold.recording.linear import Map, Same, Sum
from refold.recording.operators import operator_of


def balanced_channels(planner: Planner) -> list[Rewrite]:
    """A scale for each channel of every stream that convolutions write and read; of neighbouring streams the first.

    What a layer reads and what it writes cannot both change at once: applied again, the pass takes the others.
    """
    found: list[Rewrite] = []
    used: set[fx.Node] = set()
    for stream in streams(planner, is_layer, _keeps_scales):
        own = {*stream.writers, *stream.readers}
        if own & used or set(stream.writers) & set(stream.readers):
            continue
        if (stream.writers[0], "scale") in planner.excluded:
            continue
        scale = _scale(planner, stream)
        if bool((scale != 1).any()):
            found.append(_rewrite(planner, stream, scale))
            used |= own
    return found


def is_layer(planner: Planner, node: fx.Node) -> bool:
    """Whether a node is a convolution or linear layer that may change."""
    operator = planner.operators.get(node)
    if not isinstance(operator, Map) or not operator.multiplies:
        return False
    return operator.structure.spatial_axes in (0, 2) and len(planner.shapes[node]) in (2, 4)


def _keeps_scales(planner: Planner, node: fx.Node) -> bool:
    operator = planner.operators.get(node)
    if isinstance(operator, (Sum, Same)):
        return True
    entry = operator_of(planner.use(node))
    return entry is not None and entry.homogeneous


def _scale(planner: Planner, stream: Stream) -> Tensor:
    written = torch.stack([largest_of_outputs(built(planner, node)) for node in stream.writers])
    read = torch.stack([largest_of_inputs(built(planner, node)) for node in stream.readers])
    return balancing(written.amax(0), read.amax(0))


def _rewrite(planner: Planner, stream: Stream, scale: Tensor) -> Rewrite:
    def applied(node: fx.Node, *, writes: bool) -> Applied:
        def build() -> nn.Module:
            own = built(planner, node)
            return layer(scale_outputs(own, scale, None) if writes else unscale_inputs(own, scale))

        return Applied(NewLayer(build, planner.recording.kinds[node]), sources_of(planner, node)[0])

    steps: dict[fx.Node, Value] = {node: applied(node, writes=True) for node in stream.writers}
    steps |= {node: applied(node, writes=False) for node in stream.readers}
    return stream_rewrite(planner, stream, steps, f"{stream.channels} channels scaled", "scale")
