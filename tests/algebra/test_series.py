"""Two convolutions in series: exact where claimed, and every refusal shown to be necessary at the border."""

import pytest
import torch
import torch.nn.functional as F
from drawing import (
    assert_equal,
    convolutions,
    distance,
    for_random,
    inputs,
    new_convolution,
    normal,
    reference,
    seeds,
    spatial_axes,
)
from hypothesis import assume
from hypothesis import strategies as st

from refold.algebra import (
    Convolution,
    affine,
    average_pool,
    batch_norm,
    fold_batch_norm,
    identity,
    pointwise,
    series,
    zero_padding,
)
from refold.errors import NotFoldable


def sizes_that_work(first: Convolution, second: Convolution, seed: int = 0) -> list[torch.Tensor]:
    """Inputs of several sizes for which both convolutions have an output."""
    axes = first.spatial_axes
    smallest = []
    for axis in range(axes):
        reach = second.dilation[axis] * (second.kernel_size[axis] - 1) - sum(second.padding[axis])
        span = first.dilation[axis] * (first.kernel_size[axis] - 1) + 1
        needed = span + max(0, reach) * first.stride[axis] - sum(first.padding[axis])
        smallest.append(max(1, needed))
    return [
        normal(
            2, first.in_channels, *(s + (step + 2 * axis) % 6 for axis, s in enumerate(smallest)), seed=seed
        )
        for step in range(6 if axes else 1)
    ]


@st.composite
def chained(draw, *, axes=None, first_options=None, second_options=None):
    """Two convolutions of which the second reads what the first writes; groups of both are drawn."""
    if axes is None:
        axes = draw(spatial_axes)
    first = draw(convolutions(axes, **(first_options or {})))
    second = draw(convolutions(axes, in_channels=first.out_channels, **(second_options or {})))
    return first, second


def assert_series(first: Convolution, second: Convolution) -> None:
    folded = series(first, second)
    assert (folded.in_channels, folded.out_channels) == (first.in_channels, second.out_channels)
    for x in sizes_that_work(first, second):
        assert_equal(folded(x), reference(second, reference(first, x)))


@for_random(chained(second_options={"pads": False}), examples=400)
def test_an_unpadded_second_convolution_is_exact(pair):
    """Any kernels, strides, dilations, groups and biases; the first may pad as it likes."""
    assert_series(*pair)


@st.composite
def one_tap(draw, axes):
    """A bias-free convolution with one tap, which may stride and pad."""
    in_channels, out_channels, groups = draw(st.sampled_from([(2, 4, 1), (4, 4, 4), (4, 4, 2), (3, 6, 3)]))
    return new_convolution(
        in_channels,
        out_channels,
        (1,) * axes,
        stride=[draw(st.integers(1, 3)) for _ in range(axes)],
        padding=[(draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in range(axes)],
        groups=groups,
        bias=False,
        seed=draw(seeds),
    )


@for_random(spatial_axes, st.data(), examples=300)
def test_one_tap_without_bias_before_any_padded_convolution_is_exact(axes, data):
    first = data.draw(one_tap(axes))
    assert_series(first, data.draw(convolutions(axes, in_channels=first.out_channels)))


@for_random(chained(), examples=400)
def test_series_is_exact_or_refused(pair):
    try:
        series(*pair)
    except NotFoldable:
        first, second = pair
        assert any(any(padding) for padding in second.padding)
        assert first.bias is not None or any(k > 1 for k in first.kernel_size)
        return
    assert_series(*pair)


def in_one_anyway(first: Convolution, second: Convolution) -> Convolution:
    """The only candidate for both in one: fold without the second padding, then pad the input."""
    unpadded = Convolution(
        second.weight,
        second.bias,
        second.stride,
        ((0, 0),) * second.spatial_axes,
        second.dilation,
        second.groups,
    )
    folded = series(first, unpadded)
    padding = tuple(
        (b + s * before, a + s * after)
        for (b, a), (before, after), s in zip(folded.padding, second.padding, first.stride, strict=True)
    )
    return Convolution(folded.weight, folded.bias, folded.stride, padding, folded.dilation, folded.groups)


@for_random(
    chained(
        axes=1, first_options={"stride": [1]}, second_options={"stride": [1], "margin": [0], "bias": False}
    ),
    examples=400,
)
def test_refusals_are_necessary(pair):
    """A refused pair, folded all the same, is right inside the map and wrong at its border."""
    first, second = pair
    try:
        series(first, second)
    except NotFoldable as refusal:
        reason = str(refusal)
    else:
        return
    wrong = in_one_anyway(first, second)
    before, after = second.padding[0]
    # A dilated kernel may step over the few rows where a bias-free first convolution still sees the image.
    assume(second.dilation == (1,) or "adds a shift" in reason)
    x = normal(2, first.in_channels, 40, seed=0)
    expected, result = reference(second, reference(first, x)), wrong(x)
    assert_equal(
        result[..., before : result.shape[2] - after], expected[..., before : expected.shape[2] - after]
    )
    assert distance(result, expected) > 1e-6


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("kernel", [2, 3, 5])
def test_one_by_one_then_wide_kernel(kernel, has_bias):
    """The border trap of DBB's 1x1-KxK branch: with a bias between, padding is no longer what follows."""
    padding = (((kernel - 1) // 2, kernel // 2),) * 2
    first = new_convolution(3, 6, (1, 1), bias=has_bias)
    second = new_convolution(6, 4, (kernel, kernel), padding=padding, groups=2)
    x = normal(2, 3, 6, 9, seed=5)
    expected = reference(second, reference(first, x))
    if not has_bias:
        assert_equal(series(first, second)(x), expected)
        return
    with pytest.raises(NotFoldable, match="the first adds a shift"):
        series(first, second)
    wrong = in_one_anyway(first, second)(x)
    (top, bottom), (left, right) = padding
    inside = (..., slice(top, 6 - bottom), slice(left, 9 - right))
    assert_equal(wrong[inside], expected[inside])
    assert distance(wrong, expected) > 0.01


@for_random(st.integers(0, 3), st.data())
def test_batch_norm_before_an_unpadded_convolution(axes, data):
    second = data.draw(convolutions(axes, pads=False))
    mean, variance, weight, bias = normal(4, second.in_channels, seed=data.draw(seeds))
    variance = variance.square()
    folded = series(batch_norm(mean, variance, weight, bias, 1e-5, axes), second)
    assert folded.groups == second.groups
    for x in inputs([second], second.in_channels, count=2):
        assert_equal(folded(x), reference(second, F.batch_norm(x, mean, variance, weight, bias, eps=1e-5)))


@for_random(st.integers(1, 3), st.data())
def test_batch_norm_before_a_padded_convolution_is_refused(axes, data):
    """Its shift must not leak into the zeros of the padding: the fold would be wrong there and only there."""
    stride = [1] * axes
    second = data.draw(convolutions(axes, stride=stride, margin=[0] * axes, bias=False))
    assume(any(any(padding) for padding in second.padding))
    mean, variance, weight, bias = normal(4, second.in_channels, seed=data.draw(seeds))
    norm = batch_norm(mean, variance.square(), weight, bias, 1e-5, axes)
    with pytest.raises(NotFoldable, match="the first adds a shift"):
        series(norm, second)
    x = normal(1, second.in_channels, *(14, 15, 13)[:axes], seed=0)
    expected = reference(second, F.batch_norm(x, mean, variance.square(), weight, bias, eps=1e-5))
    result = in_one_anyway(norm, second)(x)
    inside = tuple(
        slice(before, size - after)
        for (before, after), size in zip(second.padding, expected.shape[2:], strict=True)
    )
    assert_equal(result[(..., *inside)], expected[(..., *inside)])
    assert distance(result, expected) > 1e-6


def test_padding_along_one_axis_leaves_the_other_free():
    """3x1 then a convolution that pads only along the width, and the other way round."""
    tall, wide = new_convolution(3, 4, (3, 1), bias=False), new_convolution(3, 4, (1, 3), bias=False)
    padded = new_convolution(4, 5, (3, 3), padding=((0, 0), (1, 1)))
    assert_series(tall, padded)
    with pytest.raises(NotFoldable, match="still sees the image"):
        series(wide, padded)


def test_padding_of_an_output_that_already_ends_in_zeros_is_exact():
    """Where a first convolution pads so far that only zeros could follow, more padding adds nothing else."""
    full = new_convolution(3, 4, (3, 2), padding=((2, 2), (1, 1)), bias=False)
    assert_series(full, new_convolution(4, 5, (3, 3), padding=((1, 1), (2, 1))))
    patches = new_convolution(3, 4, (2, 2), stride=(2, 2), bias=False)
    assert_series(patches, new_convolution(4, 5, (3, 3), padding=((1, 0), (1, 0))))
    after = new_convolution(4, 5, (3, 3), padding=((1, 1), (1, 1)))
    with pytest.raises(NotFoldable, match="still sees the image"):
        series(patches, after)
    x = normal(1, 3, 7, 7, seed=0)
    assert distance(in_one_anyway(patches, after)(x), reference(after, reference(patches, x))) > 0.01


@pytest.mark.parametrize(
    ("first_groups", "second_groups", "groups"), [(1, 1, 1), (12, 12, 12), (12, 1, 1), (4, 6, 2), (3, 12, 3)]
)
def test_groups_in_series(first_groups, second_groups, groups):
    first = new_convolution(12, 12, (3,), groups=first_groups)
    second = new_convolution(12, 24, (2,), groups=second_groups)
    assert series(first, second).groups == groups
    assert_series(first, second)


@pytest.mark.parametrize(
    ("first", "second", "taps", "dilation"),
    [
        ((3, 2), (1, 1), 3, 2),
        ((1, 1), (3, 2), 3, 2),
        ((1, 3), (3, 2), 3, 2),
        ((3, 2), (2, 4), 5, 2),
        ((1, 2), (1, 3), 1, 1),
    ],
)
def test_series_writes_no_more_taps_than_it_needs(first, second, taps, dilation):
    """Kernels given as (taps, dilation): a common spacing of the taps stays a dilation."""
    pair = [new_convolution(4, 4, (k,), dilation=(d,)) for k, d in (first, second)]
    folded = series(*pair)
    assert (folded.kernel_size, folded.dilation) == ((taps,), (dilation,))
    assert_series(*pair)


@for_random(convolutions(), st.booleans())
def test_identity_is_neutral(convolution, is_first):
    ones = (
        identity(convolution.in_channels, convolution.spatial_axes, convolution.weight),
        identity(convolution.out_channels, convolution.spatial_axes, convolution.weight),
    )
    folded = series(ones[0], convolution) if is_first else series(convolution, ones[1])
    assert folded.groups == convolution.groups
    for x in inputs([convolution], convolution.in_channels, count=2):
        assert_equal(folded(x), reference(convolution, x))


@for_random(convolutions(axes=2, bias=False), st.tuples(*[st.integers(0, 2)] * 4))
def test_zero_padding_before_a_convolution(convolution, ends):
    """TensorFlow's lopsided padding: a pad and a convolution are one convolution, whatever each pads."""
    padding = (ends[:2], ends[2:])
    folded = series(zero_padding(convolution.in_channels, padding, convolution.weight), convolution)
    for x in inputs([convolution], convolution.in_channels):
        padded = F.pad(x, [*ends[2:], *ends[:2]])
        assert_equal(folded(x), reference(convolution, padded))


def test_one_by_one_then_average_pool():
    """DBB's pooling branch: exact without padding, and without a bias wherever the pool pads."""
    x = normal(2, 3, 8, 9, seed=0)
    for bias, padding in ((True, 0), (False, 0), (False, 1)):
        first = new_convolution(3, 4, (1, 1), bias=bias)
        pool = average_pool(4, (3, 3), (2, 2), (padding, padding), x)
        assert_equal(series(first, pool)(x), F.avg_pool2d(reference(first, x), 3, 2, padding))


def test_pool_before_a_linear_classifier_with_batch_norm():
    """Three linear layers, batch norm in the middle, become one."""
    first, last = new_convolution(6, 5, ()), new_convolution(5, 3, (), seed=3)
    mean, variance, weight, bias = normal(4, 5, seed=8)
    folded = series(fold_batch_norm(first, mean, variance.square(), weight, bias, 1e-5), last)
    x = normal(4, 6, seed=9)
    middle = F.batch_norm(F.linear(x, first.weight, first.bias), mean, variance.square(), weight, bias)
    assert_equal(folded(x), F.linear(middle, last.weight, last.bias))


@for_random(st.integers(0, 2), st.data(), examples=100)
def test_long_chains_do_not_depend_on_the_order(axes, data):
    chain = [data.draw(convolutions(axes, pads=False))]
    for _ in range(2):
        chain.append(data.draw(convolutions(axes, in_channels=chain[-1].out_channels, pads=False)))
    left = series(series(chain[0], chain[1]), chain[2])
    right = series(chain[0], series(chain[1], chain[2]))
    x = inputs([left, right], left.in_channels, count=1)[0]
    expected = x
    for convolution in chain:
        expected = reference(convolution, expected)
    assert_equal(left(x), expected)
    assert_equal(right(x), expected)


def test_what_does_not_fit_together_is_refused():
    with pytest.raises(NotFoldable, match="4 channels are passed on, 5 are expected"):
        series(new_convolution(3, 4, (1,)), new_convolution(5, 4, (1,)))
    with pytest.raises(NotFoldable, match="different numbers of spatial axes"):
        series(new_convolution(3, 4, (1, 1)), pointwise(normal(2, 4, seed=0), None, 0))


def test_a_scale_without_shift_may_stand_before_padding():
    """Layer scale before a padded convolution has no shift to leak."""
    second = new_convolution(4, 6, (3, 3), padding=((1, 1), (1, 1)), groups=2)
    assert_series(affine(normal(4, seed=3), None, 2), second)


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("shifted", [False, True])
def test_scaled_inputs_of_any_groups(groups: int, shifted: bool) -> None:
    """A scale and shift before a convolution, against the two run one after the other."""
    weight, bias = normal(2 * groups, 2, 3, 2, seed=0), normal(2 * groups, seed=1)
    second = Convolution(weight, bias, (2, 1), ((0, 0), (0, 0)), (1, 2), groups)
    shift = normal(2 * groups, seed=2) if shifted else None
    scale = affine(normal(2 * groups, seed=3), shift, 2)
    composed = series(scale, second)
    assert composed.groups == groups
    x = normal(2, 2 * groups, 9, 8, seed=4)
    assert_equal(reference(composed, x), reference(second, reference(scale, x)))
