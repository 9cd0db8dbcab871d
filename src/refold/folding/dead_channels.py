"""A pass: channels that say nothing are left out. What is constant goes into the bias of what reads it.

A channel is dead where every value of its stream has one number in it, whatever the image is: its weights are zero, or
an activation cuts off all that they can give. Or nobody reads it: all weights on it are zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from refold.algebra import Convolution, largest_of_inputs
from refold.errors import NotFoldable
from refold.folding.balancing import is_layer
from refold.folding.layers import layer
from refold.folding.planning import Planner
from refold.folding.rewrite import Applied, NewLayer, Rewrite, Value
from refold.folding.streams import Stream, built, sources_of, stream_rewrite, streams
from refold.recording.constants import apply
from refold.recording.linear import Map, Same, Sum
from refold.recording.operators import operator_of


def live_channels(planner: Planner) -> list[Rewrite]:
    """Every stream without its dead channels; of neighbouring streams the first, so that the pass is applied again."""
    found: list[Rewrite] = []
    used: set[fx.Node] = set()
    for stream in streams(planner, _mixes, _keeps_apart):
        own = {*stream.writers, *stream.between, *stream.readers}
        if own & used or (stream.writers[0], "dead") in planner.excluded:
            continue
        constant = _constants(planner, stream)
        live = _live(planner, stream, constant)
        if 0 < len(live) < stream.channels:
            found.append(_rewrite(planner, stream, constant, live))
            used |= own
    return found


def _mixes(planner: Planner, node: fx.Node) -> bool:
    """Whether a node is a layer that computes each channel from all."""
    if not is_layer(planner, node):
        return False
    operator = planner.operators[node]
    assert isinstance(operator, Map)
    return operator.structure.groups == 1


def _keeps_apart(planner: Planner, node: fx.Node) -> bool:
    """Whether an operator treats every channel for itself and without numbers of its own for it, or is depthwise."""
    operator = planner.operators.get(node)
    if isinstance(operator, (Sum, Same)) or _is_depthwise(planner, node):
        return True
    entry = operator_of(planner.use(node))
    return entry is not None and (entry.elementwise or entry.word == "pooling") and entry.channels is not None


def _is_depthwise(planner: Planner, node: fx.Node) -> bool:
    operator = planner.operators.get(node)
    if not isinstance(operator, Map) or not operator.multiplies:
        return False
    found = operator.structure
    return found.spatial_axes == 2 and found.groups == found.in_channels == found.out_channels > 1


def _constants(planner: Planner, stream: Stream) -> dict[fx.Node, Tensor]:
    """The number that each channel of each value always has, NaN where it depends on the image."""
    found: dict[fx.Node, Tensor] = {}
    for node in (*stream.writers, *sorted(stream.between, key=planner.order.__getitem__)):
        if _mixes(planner, node):
            found[node] = _of_dense(built(planner, node))
        elif _is_depthwise(planner, node):
            found[node] = _of_depthwise(built(planner, node), found[sources_of(planner, node)[0]])
        else:
            found[node] = _of_operator(planner, node, [found[each] for each in sources_of(planner, node)])
    return found


def _of_dense(convolution: Convolution) -> Tensor:
    written = convolution.weight.flatten(1).abs().amax(1)
    return _bias(convolution).where(written == 0, torch.nan)


def _of_depthwise(convolution: Convolution, given: Tensor) -> Tensor:
    bias, total = _bias(convolution), convolution.weight.flatten(1).sum(1)
    through = bias + total * given
    if any(map(any, convolution.padding)):  # at the border some taps read zeros
        through = bias.where(given == 0, torch.nan)
    return torch.where(convolution.weight.flatten(1).abs().amax(1) == 0, bias, through)


def _of_operator(planner: Planner, node: fx.Node, given: Sequence[Tensor]) -> Tensor:
    """What an operator makes of numbers: of an activation or a sum what it computes, of pooling the number itself."""
    operator, entry = planner.operators.get(node), operator_of(planner.use(node))
    if isinstance(operator, Same):
        return given[0]
    if isinstance(operator, Sum):
        pairs = zip(given, operator.factors, strict=True)
        return torch.stack([value * factor for value, factor in pairs]).sum(0)
    if entry is not None and entry.word == "pooling":
        # Zeros around a map change the mean of anything else.
        padded = entry.names[0].startswith("avg")
        return given[0].where(given[0] == 0, torch.nan) if padded else given[0]
    known = given[0].nan_to_num(0.0)
    shape = (1, -1, *(1,) * (len(planner.shapes[node]) - 2))
    args, kwargs = fx.node.map_aggregate(
        (node.args, node.kwargs),
        lambda value: known.view(shape) if value is sources_of(planner, node)[0] else value,
    )
    if any(isinstance(value, fx.Node) for value in (*args, *kwargs.values())):
        return torch.full_like(known, torch.nan)
    made = apply(planner.recording, node, args, kwargs)
    return made.flatten().where(~given[0].isnan(), torch.nan)  # type: ignore[no-any-return]  # a tensor


def _live(planner: Planner, stream: Stream, constant: dict[fx.Node, Tensor]) -> list[int]:
    """The channels that stay."""
    readers = [built(planner, node) for node in stream.readers]
    read = torch.stack([largest_of_inputs(own) for own in readers]).amax(0)
    dead = torch.stack([~value.isnan() for value in constant.values()]).all(0)
    for node, own in zip(stream.readers, readers, strict=True):
        if any(map(any, own.padding)):  # a constant other than zero ends at the border
            dead &= constant[sources_of(planner, node)[0]] == 0
    gone = dead | (read == 0)
    if gone.all():
        gone[0] = False  # a layer has a channel at least
    return [int(place) for place in (~gone).nonzero()]


def _rewrite(planner: Planner, stream: Stream, constant: dict[fx.Node, Tensor], live: list[int]) -> Rewrite:
    filters = [node for node in stream.between if _is_depthwise(planner, node)]
    gone = [place for place in range(stream.channels) if place not in set(live)]

    def applied(node: fx.Node) -> Applied:
        source = sources_of(planner, node)[0]

        def build() -> nn.Module:
            own = built(planner, node)
            if node in stream.readers:
                return layer(_without_inputs(own, live, gone, constant[source]))
            return layer(_without_outputs(own, live))

        return Applied(NewLayer(build, planner.recording.kinds[node]), source)

    steps: dict[fx.Node, Value] = {
        node: applied(node) for node in (*stream.writers, *filters, *stream.readers)
    }
    return stream_rewrite(
        planner, stream, steps, f"{len(gone)} of {stream.channels} channels left out", "dead"
    )


def _without_outputs(convolution: Convolution, live: list[int]) -> Convolution:
    bias = None if convolution.bias is None else convolution.bias[live]
    groups = 1 if convolution.groups == 1 else len(live)
    return replace(convolution, weight=convolution.weight[live], bias=bias, groups=groups)


def _without_inputs(
    convolution: Convolution, live: list[int], gone: list[int], constant: Tensor
) -> Convolution:
    """The convolution without some inputs, whose constants it adds; what nobody reads may be anything."""
    given = constant[gone].nan_to_num(0.0)
    columns = (
        convolution.weight[:, gone].flatten(2).sum(2)
        if convolution.spatial_axes
        else convolution.weight[:, gone]
    )
    added = columns @ given
    if not given.isfinite().all():
        raise NotFoldable("a channel that is left out is not finite")
    bias = added if convolution.bias is None else convolution.bias + added
    return replace(convolution, weight=convolution.weight[:, live], bias=bias)


def _bias(convolution: Convolution) -> Tensor:
    found = convolution.bias
    return convolution.weight.new_zeros(convolution.out_channels) if found is None else found
