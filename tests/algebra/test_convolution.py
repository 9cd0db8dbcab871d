"""The value, and the layers that are convolutions in disguise, against torch.nn.functional."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from drawing import (
    assert_equal,
    channels_and_groups,
    convolutions,
    distance,
    divisors,
    for_random,
    inputs,
    new_convolution,
    normal,
    reference,
    seeds,
    spatial_axes,
    structure,
)
from hypothesis import strategies as st

from refold.algebra import (
    Convolution,
    affine,
    average_pool,
    batch_norm,
    identity,
    pointwise,
    with_groups,
    zero_padding,
)
from refold.errors import NotFoldable


@for_random(convolutions())
def test_convolution_applies_as_torch_does(convolution):
    for x in inputs([convolution], convolution.in_channels):
        assert_equal(convolution(x), reference(convolution, x))


def test_linear_layer_reads_the_last_axis():
    linear = pointwise(normal(5, 3, seed=0), normal(5, seed=1), 0)
    x = normal(2, 7, 6, 3, seed=2)
    assert_equal(linear(x), F.linear(x, linear.weight, linear.bias))


@pytest.mark.parametrize(
    "change",
    [
        {"stride": (1,)},
        {"padding": ((0, 0),) * 3},
        {"dilation": ()},
        {"groups": 4},
        {"bias": torch.zeros(5)},
        {"weight": torch.zeros(6)},
        {"weight": torch.zeros(6, 1, 1, 1, 1, 1)},
    ],
    ids=lambda change: "-".join([*change, *(str(tuple(getattr(v, "shape", ()))) for v in change.values())]),
)
def test_contradicting_shapes_are_refused(change):
    fields = {
        "weight": torch.zeros(6, 2, 3, 3),
        "bias": None,
        "stride": (1, 1),
        "padding": ((0, 0),) * 2,
        "dilation": (1, 1),
        "groups": 1,
    }
    Convolution(**fields)
    with pytest.raises(ValueError, match=r"\d"):
        Convolution(**(fields | change))


@for_random(convolutions(), st.data())
def test_fewer_groups_compute_the_same(convolution, data):
    groups = data.draw(st.sampled_from(divisors(convolution.groups)))
    fewer = with_groups(convolution, groups)
    assert fewer.groups == groups
    assert (fewer.in_channels, fewer.out_channels) == (convolution.in_channels, convolution.out_channels)
    for x in inputs([convolution], convolution.in_channels, count=1):
        assert_equal(reference(fewer, x), reference(convolution, x))


@pytest.mark.parametrize(("groups", "wanted"), [(1, 2), (4, 3), (4, 8), (6, 4)])
def test_groups_that_do_not_divide_are_refused(groups, wanted):
    with pytest.raises(NotFoldable, match=f"{groups} groups cannot be written as {wanted}"):
        with_groups(new_convolution(24, 24, (3,), groups=groups), wanted)


@for_random(spatial_axes, channels_and_groups(), st.booleans(), seeds)
def test_pointwise(axes, channels, has_bias, seed):
    in_channels, out_channels, groups = channels
    weight = normal(out_channels, in_channels // groups, seed=seed)
    bias = normal(out_channels, seed=seed + 1) if has_bias else None
    x = normal(2, in_channels, *(4, 3, 2)[:axes], seed=seed + 2)
    expected = F.conv1d(x.flatten(2) if axes else x.unsqueeze(2), weight.unsqueeze(2), bias, groups=groups)
    expected = expected.reshape(2, out_channels, *x.shape[2:])
    assert_equal(pointwise(weight, bias, axes, groups)(x), expected)


@for_random(spatial_axes, st.integers(1, 5), st.booleans(), seeds)
def test_affine_and_identity(axes, channels, shifts, seed):
    x = normal(2, channels, *(4, 3, 2)[:axes], seed=seed)
    scale, shift = normal(channels, seed=seed + 1), normal(channels, seed=seed + 2)
    each = (-1, *(1,) * axes)
    expected = x * scale.reshape(each) + (shift.reshape(each) if shifts else 0)
    assert_equal(affine(scale, shift if shifts else None, axes)(x), expected)
    assert torch.equal(identity(channels, axes, x)(x), x)


@for_random(
    spatial_axes, st.integers(1, 5), st.booleans(), st.booleans(), st.sampled_from([1e-5, 1e-3, 1.0]), seeds
)
def test_batch_norm(axes, channels, has_weight, has_bias, epsilon, seed):
    mean, variance = normal(channels, seed=seed), normal(channels, seed=seed + 1).square()
    weight = normal(channels, seed=seed + 2) if has_weight else None
    bias = normal(channels, seed=seed + 3) if has_bias else None
    x = normal(2, channels, *(4, 3, 2)[:axes], seed=seed + 4)
    norm = batch_norm(mean, variance, weight, bias, epsilon, axes)
    assert norm.groups == channels
    assert_equal(norm(x), F.batch_norm(x, mean, variance, weight, bias, eps=epsilon))


@for_random(st.integers(1, 3), st.data())
def test_zero_padding(axes, data):
    ends = data.draw(st.lists(st.tuples(*[st.integers(0, 3)] * 2), min_size=axes, max_size=axes))
    x = normal(2, 3, *(4, 3, 2)[:axes], seed=0)
    padded = zero_padding(3, tuple(ends), x)
    assert torch.equal(padded(x), F.pad(x, [end for pair in reversed(ends) for end in pair]))


@pytest.mark.parametrize("padding", [((-1, 0),), ((0, 0), (2, -1))])
def test_cropping_is_refused(padding):
    with pytest.raises(NotFoldable, match="crops"):
        zero_padding(3, padding, torch.zeros(1))


def _torch_pool(x, kernel, stride, padding, *, ceil_mode=False, count_include_pad=True, divisor=None):
    axes = len(kernel)
    pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[axes - 1]
    extra = {} if divisor is None else {"divisor_override": divisor}
    return pool(x, kernel, stride, padding, ceil_mode, count_include_pad, **extra)


@st.composite
def pools(draw):
    """(arguments, options) of an average pool over one to three axes."""
    axes = draw(st.integers(1, 3))
    kernel = [draw(st.integers(1, 4)) for _ in range(axes)]
    stride = [draw(st.integers(1, 3)) for _ in range(axes)]
    padding = [draw(st.integers(0, k // 2)) for k in kernel]
    options = {
        "ceil_mode": draw(st.booleans()),
        "count_include_pad": draw(st.booleans()),
        "divisor": draw(st.sampled_from([None, 1, 3])) if axes > 1 else None,
    }
    return (kernel, stride, padding), options


@for_random(pools())
def test_average_pool(pool):
    """An average pool is a convolution wherever it is not refused, and refused only for its border."""
    arguments, options = pool
    kernel, stride, padding = arguments
    x = normal(2, 3, *(k + 3 + axis for axis, k in enumerate(kernel)), seed=0)
    try:
        convolution = average_pool(3, *arguments, x, **options)
    except NotFoldable:
        hangs_over = options["ceil_mode"] and max(stride) > 1
        uncounted = any(padding) and not options["count_include_pad"] and options["divisor"] is None
        assert hangs_over or uncounted
        return
    assert convolution.groups == 3
    for size in product(*([k + 1, k + 2, k + 4] for k in kernel)):
        x = normal(1, 3, *size, seed=sum(size))
        assert_equal(convolution(x), _torch_pool(x, *arguments, **options))


@pytest.mark.parametrize(
    ("arguments", "options", "size"),
    [
        (((2, 2), (2, 2), (0, 0)), {"ceil_mode": True, "count_include_pad": False}, (5, 6)),
        (((3,), (2,), (1,)), {"ceil_mode": True}, (6,)),
        (((3, 3), (1, 1), (1, 1)), {"count_include_pad": False}, (4, 5)),
        (((3, 1), (2, 1), (1, 0)), {"count_include_pad": False}, (4, 5)),
    ],
)
def test_refused_pools_do_differ_at_the_border(arguments, options, size):
    x = torch.rand(1, 2, *size, dtype=torch.float64) + 1
    with pytest.raises(NotFoldable, match=r"border|over"):
        average_pool(2, *arguments, x, **options)
    plain = average_pool(2, *arguments, x)(x)
    pooled = _torch_pool(x, *arguments, **options)
    assert distance(plain, pooled) > 0.01
    inside = tuple(slice(1, p - 1) for p in plain.shape[2:] if p > 2)
    if plain.shape == pooled.shape and len(inside) == len(size):
        assert_equal(plain[(..., *inside)], pooled[(..., *inside)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_layers_take_the_dtype_of_their_tensors(dtype):
    like = torch.ones(4, dtype=dtype)
    made = [
        identity(4, 2, like),
        affine(like, like, 2),
        batch_norm(like, like, None, like, 1e-5, 2),
        zero_padding(4, ((1, 1), (0, 2)), like),
        average_pool(4, (2, 2), (2, 2), (0, 0), like),
        with_groups(identity(4, 2, like), 2),
    ]
    assert {c.weight.dtype for c in made} == {dtype}


def test_layers_work_without_data():
    real, meta = torch.ones(4), torch.ones(4, device="meta")

    def make(like):
        return [
            identity(4, 2, like),
            affine(like, like, 1),
            batch_norm(like, like, None, like, 1e-5, 0),
            zero_padding(4, ((1, 1), (0, 2)), like),
            average_pool(4, (2, 2, 1), (2, 2, 1), (1, 0, 0), like),
            with_groups(identity(4, 2, like), 2),
        ]

    for without_data, with_data in zip(make(meta), make(real), strict=True):
        assert without_data.weight.device.type == "meta"
        assert structure(without_data) == structure(with_data)
