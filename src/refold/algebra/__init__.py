"""A convolution as a value and the exact operations on it: pure functions of tensors, without modules."""

from refold.algebra.convolution import (
    Convolution,
    affine,
    average_pool,
    batch_norm,
    batch_norm_affine,
    identity,
    pointwise,
    with_groups,
    zero_padding,
)
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
    "affine",
    "align",
    "average_pool",
    "batch_norm",
    "batch_norm_affine",
    "concatenate",
    "fold_batch_norm",
    "fold_shortcut",
    "identity",
    "is_channelwise",
    "pointwise",
    "scale_outputs",
    "series",
    "side_by_side",
    "slice_outputs",
    "sum_branches",
    "widen_inputs",
    "with_groups",
    "zero_padding",
]
