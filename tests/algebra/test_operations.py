"""The six paradigms on random convolutions against torch: equal where claimed exact, else refused."""

import pytest
import torch
import torch.nn.functional as F
from drawing import (
    assert_equal,
    convolutions,
    divisors,
    for_random,
    inputs,
    new_convolution,
    normal,
    reference,
    seeds,
)
from hypothesis import strategies as st

from refold.algebra import (
    align,
    average_pool,
    batch_norm,
    concatenate,
    fold_batch_norm,
    identity,
    scale_outputs,
    side_by_side,
    slice_outputs,
    sum_branches,
    widen_inputs,
    with_groups,
)
from refold.errors import NotFoldable


@st.composite
def branches(draw, *, same_inputs=True, same_outputs=True):
    """Two to four convolutions that write maps of one size: kernels, dilation, padding and groups differ."""
    axes = draw(st.sampled_from([0, 1, 2, 2, 3]))
    stride = [draw(st.integers(1, 3)) for _ in range(axes)]
    margin = [draw(st.integers(-2, 1)) for _ in range(axes)]
    in_channels, out_channels = draw(st.sampled_from([(1, 1), (2, 4), (4, 2), (4, 4), (6, 6), (6, 12)]))
    return [
        draw(
            convolutions(
                axes,
                in_channels if same_inputs else None,
                out_channels if same_outputs else None,
                stride,
                margin,
            )
        )
        for _ in range(draw(st.integers(2, 4)))
    ]


def batch_norm_numbers(channels, seed):
    """Mean, variance, weight and bias of a batch norm that has been trained."""
    mean, variance, weight, bias = normal(4, channels, seed=seed)
    return mean, variance.square(), weight, bias


@for_random(convolutions(), st.booleans(), seeds)
def test_scaled_outputs(convolution, shifts, seed):
    scale, shift = normal(2, convolution.out_channels, seed=seed)
    scaled = scale_outputs(convolution, scale, shift if shifts else None)
    assert scaled.groups == convolution.groups
    each = (-1, *(1,) * convolution.spatial_axes)
    for x in inputs([convolution], convolution.in_channels, count=2):
        expected = reference(convolution, x) * scale.reshape(each) + (shift.reshape(each) if shifts else 0)
        assert_equal(scaled(x), expected)


@for_random(convolutions(), st.booleans(), st.booleans(), st.sampled_from([1e-5, 1e-3]), seeds)
def test_batch_norm_after_a_convolution(convolution, has_weight, has_bias, epsilon, seed):
    mean, variance, weight, bias = batch_norm_numbers(convolution.out_channels, seed)
    weight, bias = weight if has_weight else None, bias if has_bias else None
    folded = fold_batch_norm(convolution, mean, variance, weight, bias, epsilon)
    for x in inputs([convolution], convolution.in_channels, count=2):
        expected = F.batch_norm(reference(convolution, x), mean, variance, weight, bias, eps=epsilon)
        assert_equal(folded(x), expected)


@for_random(branches(same_inputs=False, same_outputs=False))
def test_aligned_convolutions_compute_the_same(convolutions):
    aligned = align(convolutions)
    assert len({(c.kernel_size, c.stride, c.padding, c.dilation) for c in aligned}) == 1
    for before, after in zip(convolutions, aligned, strict=True):
        assert after.groups == before.groups
        for x in inputs([before, after], before.in_channels, count=2):
            assert_equal(after(x), reference(before, x))


@for_random(branches(), examples=300)
def test_sum_of_branches(convolutions):
    summed = sum_branches(convolutions)
    for x in inputs(convolutions, summed.in_channels):
        assert_equal(summed(x), sum(reference(c, x) for c in convolutions))


def test_sum_keeps_what_groups_it_can():
    depthwise = new_convolution(12, 12, (3, 3), groups=12, padding=((1, 1), (1, 1)))
    grouped = new_convolution(12, 12, (1, 1), groups=4)
    assert sum_branches([depthwise, identity(12, 2, depthwise.weight)]).groups == 12
    assert sum_branches([depthwise, grouped]).groups == 4
    assert sum_branches([depthwise, new_convolution(12, 12, (1, 1), groups=3)]).groups == 3
    assert sum_branches([grouped, new_convolution(12, 12, (1, 1), groups=3)]).groups == 1


def test_sum_writes_no_more_taps_than_it_needs():
    """A dilated kernel beside a single tap, or another of its dilation, stays dilated."""
    dilated = new_convolution(4, 4, (3,), padding=((2, 2),), dilation=(2,))
    wider = new_convolution(4, 4, (3,), padding=((4, 4),), dilation=(4,))
    for second, taps in ((identity(4, 1, dilated.weight), 3), (dilated, 3), (wider, 5)):
        summed = sum_branches([dilated, second])
        assert (summed.kernel_size, summed.dilation) == ((taps,), (2,))


@for_random(convolutions(axes=1, in_channels=2), convolutions(axes=1, in_channels=2), examples=300)
def test_branches_that_share_no_size_are_refused(first, second):
    """A sum or concatenation is refused only where the branches differ in size or step."""
    operations = [concatenate]
    if first.out_channels == second.out_channels:
        operations.append(sum_branches)
    xs = [normal(1, 2, size, seed=size) for size in range(20, 26)]
    pairs = [(reference(first, x), reference(second, x)) for x in xs]
    for operation in operations:
        try:
            merged = operation([first, second])
        except NotFoldable:
            assert first.stride != second.stride or all(y.shape[2] != z.shape[2] for y, z in pairs)
            continue
        assert first.stride == second.stride
        assert any(y.shape[2] == z.shape[2] for y, z in pairs)
        for x, (y, z) in zip(xs, pairs, strict=True):
            if y.shape[2] == z.shape[2]:
                assert_equal(merged(x), torch.cat([y, z], 1) if operation is concatenate else y + z)


@pytest.mark.parametrize("operation", [align, sum_branches, concatenate, side_by_side])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"stride": (2, 2)}, "strides of the branches differ"),
        ({"stride": (1, 2)}, "strides of the branches differ"),
        ({"padding": ((1, 1), (1, 0))}, "different sizes along spatial axis 1"),
        ({"padding": ((0, 0), (1, 1))}, "different sizes along spatial axis 0"),
        ({"dilation": (2, 1)}, "different sizes along spatial axis 0"),
        ({"kernel": (3, 2)}, "different sizes along spatial axis 1"),
        ({"kernel": (3,), "padding": ((1, 1),)}, "different numbers of spatial axes"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_branches_of_different_shape_are_refused(operation, change, reason):
    fields = {"kernel": (3, 3), "padding": ((1, 1), (1, 1))}
    first, second = (new_convolution(4, 4, **options) for options in (fields, fields | change))
    with pytest.raises(NotFoldable, match=reason):
        operation([first, second])


def test_branches_of_different_channels_are_refused():
    with pytest.raises(NotFoldable, match=r"different channels .*\(4, 4\), \(4, 6\)"):
        sum_branches([new_convolution(4, 4, (1,)), new_convolution(4, 6, (1,))])
    with pytest.raises(NotFoldable, match=r"different numbers of channels: \[2, 4\]"):
        concatenate([new_convolution(4, 4, (1,)), new_convolution(2, 4, (1,))])


@for_random(branches(same_outputs=False), examples=300)
def test_concatenation_of_branches_of_one_input(convolutions):
    joined = concatenate(convolutions)
    assert joined.groups == 1
    for x in inputs(convolutions, joined.in_channels):
        assert_equal(joined(x), torch.cat([reference(c, x) for c in convolutions], 1))


@for_random(branches(same_inputs=False, same_outputs=False), examples=300)
def test_concatenation_of_branches_side_by_side(convolutions):
    joined = side_by_side(convolutions)
    widths = [c.in_channels for c in convolutions]
    for x in inputs(convolutions, sum(widths)):
        parts = x.split(widths, 1)
        expected = [reference(c, part) for c, part in zip(convolutions, parts, strict=True)]
        assert_equal(joined(x), torch.cat(expected, 1))


@for_random(
    st.lists(st.integers(1, 4), min_size=2, max_size=3), st.integers(1, 3), st.integers(1, 3), st.data()
)
def test_side_by_side_keeps_equal_groups(groups, in_each, out_each, data):
    parts = [data.draw(convolutions(1, g * in_each, g * out_each, [1], [0])) for g in groups]
    joined = side_by_side(parts)
    if all(c.groups == g for c, g in zip(parts, groups, strict=True)):
        assert joined.groups == sum(groups)
    assert side_by_side(parts[:1]).groups == parts[0].groups


@for_random(convolutions(), st.integers(0, 3), st.integers(0, 3))
def test_widened_inputs(convolution, before, after):
    total = before + convolution.in_channels + after
    widened = widen_inputs(convolution, before, total)
    assert widened.in_channels == total
    for x in inputs([convolution], total, count=2):
        assert_equal(widened(x), reference(convolution, x[:, before : total - after]))


@for_random(convolutions(), st.data(), examples=300)
def test_sliced_outputs(convolution, data):
    start = data.draw(st.integers(0, convolution.out_channels - 1))
    stop = data.draw(st.integers(start + 1, convolution.out_channels))
    part, first = slice_outputs(convolution, start, stop)
    out_each = convolution.out_channels // convolution.groups
    needed = {channel // out_each for channel in range(start, stop)}
    assert part.in_channels == len(needed) * convolution.in_channels // convolution.groups
    if start % out_each == stop % out_each == 0:
        assert part.groups == len(needed)
    for x in inputs([convolution], convolution.in_channels, count=2):
        needed_inputs = x[:, first : first + part.in_channels]
        assert_equal(part(needed_inputs), reference(convolution, x)[:, start:stop])


@for_random(convolutions(), st.data())
def test_slices_side_by_side_are_the_whole(convolution, data):
    """Cutting between groups and joining again loses nothing, neither function nor groups."""
    out_each = convolution.out_channels // convolution.groups
    cut = data.draw(st.integers(0, convolution.groups)) * out_each
    ranges = [(a, b) for a, b in ((0, cut), (cut, convolution.out_channels)) if a < b]
    whole = side_by_side([slice_outputs(convolution, a, b)[0] for a, b in ranges])
    assert whole.groups == convolution.groups
    for x in inputs([convolution], convolution.in_channels, count=1):
        assert_equal(whole(x), reference(convolution, x))


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (3, 2), (5, 7), (-1, 2)])
def test_slices_that_are_not_there_are_refused(start, stop):
    with pytest.raises(NotFoldable, match=f"no channels {start}:{stop} in 6"):
        slice_outputs(new_convolution(6, 6, (3,), groups=3), start, stop)


PLANES = {(3, 3): ((1, 1), (1, 1)), (5, 5): ((2, 2), (2, 2)), (7, 7): ((3, 3), (3, 3))}
STRIPES = {(3, 1): ((1, 1), (0, 0)), (1, 5): ((0, 0), (2, 2)), (7, 7): ((3, 3), (3, 3))}


def depthwise_branches(shapes, channels):
    """The branches of a RepUnit: one bias-free depthwise convolution for each kernel size."""
    return [
        new_convolution(channels, channels, k, padding=p, groups=channels, bias=False, seed=i)
        for i, (k, p) in enumerate(shapes.items())
    ]


def test_rep_unit_1():
    """RepNeXt, eq. 1 and 2: thirds of the map through 3x3, 5x5 and 7x7, then one batch norm."""
    parts = depthwise_branches(PLANES, 4)
    norm = batch_norm_numbers(12, seed=9)
    x = normal(2, 12, 6, 9, seed=10)
    outputs = [reference(c, part) for c, part in zip(parts, x.chunk(3, 1), strict=True)]
    folded = fold_batch_norm(side_by_side(parts), *norm, 1e-5)
    assert (folded.kernel_size, folded.groups, folded.weight.shape[1]) == ((7, 7), 12, 1)
    assert_equal(folded(x), F.batch_norm(torch.cat(outputs, 1), *norm, eps=1e-5))


@pytest.mark.parametrize("shapes", [PLANES, STRIPES], ids=["rep_unit_2", "rep_unit_3"])
def test_rep_units_2_and_3(shapes):
    """RepNeXt, eq. 3 and 4: branches with a batch norm each, added; RepUnit3 has kernels 3x1 and 1x5."""
    parts = depthwise_branches(shapes, 6)
    norms = [batch_norm_numbers(6, seed) for seed in (7, 8, 9)]
    x = normal(2, 6, 6, 9, seed=10)
    expected = sum(
        F.batch_norm(reference(c, x), *norm, eps=1e-5) for c, norm in zip(parts, norms, strict=True)
    )
    folded = sum_branches([fold_batch_norm(c, *norm, 1e-5) for c, norm in zip(parts, norms, strict=True)])
    assert (folded.kernel_size, folded.groups, folded.weight.shape[1]) == ((7, 7), 6, 1)
    assert_equal(folded(x), expected)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_repvgg_block(stride, groups):
    """A dense or grouped 3x3 and 1x1 branch and, at stride 1, the identity, a batch norm each."""
    steps = (stride, stride)
    norms = [batch_norm_numbers(8, seed) for seed in (1, 2, 3)]
    three = new_convolution(8, 8, (3, 3), stride=steps, padding=((1, 1),) * 2, groups=groups, bias=False)
    one = new_convolution(8, 8, (1, 1), stride=steps, groups=groups, bias=False, seed=4)
    x = normal(2, 8, 7, 10, seed=5)
    parts = [fold_batch_norm(three, *norms[0], 1e-5), fold_batch_norm(one, *norms[1], 1e-5)]
    expected = F.batch_norm(reference(three, x), *norms[0], eps=1e-5)
    expected = expected + F.batch_norm(reference(one, x), *norms[1], eps=1e-5)
    if stride == 1:
        parts.append(batch_norm(*norms[2], 1e-5, 2))
        expected = expected + F.batch_norm(x, *norms[2], eps=1e-5)
    folded = sum_branches(parts)
    assert (folded.kernel_size, folded.groups) == ((3, 3), groups)
    assert_equal(folded(x), expected)


def test_pool_and_convolution_are_branches_of_one_sum():
    x = normal(2, 4, 8, 6, seed=0)
    convolution = new_convolution(4, 4, (3, 3), stride=(2, 2), padding=((1, 1),) * 2, groups=2)
    pool = average_pool(4, (3, 3), (2, 2), (1, 1), x)
    folded = sum_branches([convolution, pool])
    assert_equal(folded(x), reference(convolution, x) + F.avg_pool2d(x, 3, 2, 1))


def test_even_beside_odd_kernels_hold_where_the_sizes_agree():
    """2x2 and 1x1 with stride 2 write equal maps for even sizes only; there the sum is exact."""
    pair = [new_convolution(3, 3, (k, k), stride=(2, 2), seed=k) for k in (1, 2)]
    folded = sum_branches(pair)
    for size in ((4, 6), (8, 2)):
        x = normal(1, 3, *size, seed=0)
        assert_equal(folded(x), reference(pair[0], x) + reference(pair[1], x))
    odd = normal(1, 3, 5, 7, seed=0)
    assert reference(pair[0], odd).shape != reference(pair[1], odd).shape


@for_random(branches(), st.data(), examples=100)
def test_operations_leave_their_arguments_alone(convolutions, data):
    weights = [c.weight.clone() for c in convolutions]
    biases = [None if c.bias is None else c.bias.clone() for c in convolutions]
    stop = data.draw(st.integers(1, convolutions[0].out_channels))
    groups = data.draw(st.sampled_from(divisors(convolutions[0].groups)))
    align(convolutions)
    sum_branches(convolutions)
    concatenate(convolutions)
    side_by_side(convolutions)
    slice_outputs(convolutions[0], 0, stop)
    with_groups(convolutions[0], groups)
    widen_inputs(convolutions[0], 1, convolutions[0].in_channels + 2)
    scale_outputs(convolutions[0], convolutions[0].weight.flatten(1).sum(1), None)
    for convolution, weight, bias in zip(convolutions, weights, biases, strict=True):
        assert torch.equal(convolution.weight, weight)
        assert convolution.bias is bias is None or torch.equal(convolution.bias, bias)
