"""A convolution as a value and the exact operations on it: pure functions of tensors, without modules."""

from refold.algebra.convolution import (
    Convolution,
    Padding,
    affine,
    average_pool,
    batch_norm,
    batch_norm_affine,
    constant_padding,
    identity,
    pointwise,
    with_groups,
    with_spatial_axes,
    zero_padding,
)
from refold.algebra.gauges import mix_outputs, rotation, unmix_inputs
from refold.algebra.operations import (
    align,
    concatenate,
    fold_batch_norm,
    is_channelwise,
    scale_outputs,
    series,
    side_by_side,
    slice_outputs,
    sum_branches,
    widen_inputs,
)
from refold.algebra.shortcut import fold_shortcut

__all__ = [
    "Convolution",
    "Padding",
    "affine",
    "align",
    "average_pool",
    "batch_norm",
    "batch_norm_affine",
    "concatenate",
    "constant_padding",
    "fold_batch_norm",
    "fold_shortcut",
    "identity",
    "is_channelwise",
    "mix_outputs",
    "pointwise",
    "rotation",
    "scale_outputs",
    "series",
    "side_by_side",
    "slice_outputs",
    "sum_branches",
    "unmix_inputs",
    "widen_inputs",
    "with_groups",
    "with_spatial_axes",
    "zero_padding",
]
