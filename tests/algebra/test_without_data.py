"""On meta tensors every operation gives the shapes, and the refusals, that it gives on numbers."""

from drawing import convolutions, for_random, spatial_axes, structure, to_meta
from hypothesis import strategies as st

from refold.algebra import (
    Convolution,
    align,
    concatenate,
    fold_batch_norm,
    fold_shortcut,
    scale_outputs,
    series,
    side_by_side,
    slice_outputs,
    sum_branches,
    widen_inputs,
    with_groups,
)
from refold.errors import NotFoldable


def _normalised(convolution):
    numbers = convolution.weight.flatten(1).sum(1)
    return [
        scale_outputs(convolution, numbers, None),
        fold_batch_norm(convolution, numbers, numbers, None, numbers, 1e-5),
    ]


PAIRS = {
    "align": lambda first, second: align([first, second]),
    "sum_branches": lambda first, second: [sum_branches([first, second])],
    "concatenate": lambda first, second: [concatenate([first, second])],
    "side_by_side": lambda first, second: [side_by_side([first, second])],
    "series": lambda first, second: [series(first, second)],
    "fold_shortcut": lambda first, second: fold_shortcut([first, second]),
    "slice_outputs": lambda first, second: [slice_outputs(first, 0, second.out_channels)[0]],
    "widen_inputs": lambda first, second: [widen_inputs(first, 0, first.in_channels + second.in_channels)],
    "with_groups": lambda first, second: [with_groups(first, second.groups)],
    "normalised": lambda first, second: _normalised(first),
}


def outcome(operation, first: Convolution, second: Convolution):
    """The structures that an operation gives, or its refusal in words."""
    try:
        results = operation(first, second)
    except NotFoldable as refusal:
        return str(refusal)
    assert all(c.weight.device == first.weight.device for c in results)
    assert all(c.bias is None or c.bias.device == first.weight.device for c in results)
    return [structure(c) for c in results]


@st.composite
def pairs(draw):
    """Two convolutions with a fair chance to fit each other."""
    axes = draw(spatial_axes)
    first = draw(convolutions(axes, stride=[1] * axes, margin=[0] * axes))
    options = draw(
        st.sampled_from(
            [
                {"in_channels": first.out_channels, "out_channels": first.in_channels},
                {"in_channels": first.in_channels, "out_channels": first.out_channels},
            ]
        )
    )
    return first, draw(convolutions(axes, stride=[1] * axes, margin=[0] * axes, **options))


@for_random(pairs(), examples=300)
def test_structure_does_not_depend_on_the_numbers(pair):
    meta = [to_meta(c) for c in pair]
    for name, operation in PAIRS.items():
        assert outcome(operation, *meta) == outcome(operation, *pair), name


@for_random(convolutions())
def test_applying_without_data_gives_the_size(convolution):
    sizes = [max(1, d * k) for k, d in zip(convolution.kernel_size, convolution.dilation, strict=True)]
    x = convolution.weight.new_zeros(2, convolution.in_channels, *sizes)
    assert to_meta(convolution)(x.to("meta")).shape == convolution(x).shape
