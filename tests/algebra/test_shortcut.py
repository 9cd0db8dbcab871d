"""Dirac extension: plain chains against chains with a shortcut around them, with activations in between."""

from collections.abc import Callable, Sequence
from functools import partial

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
)
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from refold.algebra import Convolution, fold_batch_norm, fold_shortcut, sum_branches
from refold.errors import NotFoldable

Activation = Callable[[Tensor], Tensor]

# Some keep zero and some do not: behind these the zeros of padding are not what the map would continue with.
ACTIVATIONS: list[Activation] = [
    F.relu,
    F.gelu,
    F.silu,
    torch.tanh,
    torch.sigmoid,
    torch.cos,
    partial(F.leaky_relu, negative_slope=0.25),
    lambda x: x,
]


def run(chain: Sequence[Convolution], activations: Sequence[Activation], x: Tensor) -> Tensor:
    """The convolutions of a chain with the activations between them."""
    for convolution, activation in zip(chain[:-1], activations, strict=True):
        x = activation(reference(convolution, x))
    return reference(chain[-1], x)


def run_with_shortcut(
    chain: Sequence[Convolution], activations: Sequence[Activation], x: Tensor, shortcut: Convolution | None
) -> Tensor:
    """The chain, plus a shortcut with the same activations on it (RepNeXt, figure 3a)."""
    skipped = x
    for activation in activations:
        skipped = activation(skipped)
    return run(chain, activations, x) + (skipped if shortcut is None else reference(shortcut, skipped))


@st.composite
def chains(draw, *, identity_shortcut):
    """(chain, shortcut): two to four convolutions, all but the last keeping the size of the map."""
    axes = draw(st.sampled_from([0, 1, 2, 2]))
    keeps_size = {"stride": [1] * axes, "margin": [0] * axes}
    chain = [draw(convolutions(axes, **keeps_size))]
    assume(chain[0].in_channels <= 8)
    carried = chain[0].in_channels
    for _ in range(draw(st.integers(0, 2))):
        chain.append(draw(convolutions(axes, in_channels=chain[-1].out_channels, **keeps_size)))
        assume(chain[-1].out_channels <= 18)
    if identity_shortcut:
        return [*chain, draw(convolutions(axes, chain[-1].out_channels, carried, **keeps_size))], None
    ends = {
        "stride": [draw(st.integers(1, 2)) for _ in range(axes)],
        "margin": [draw(st.integers(-2, 1)) for _ in range(axes)],
    }
    last = draw(convolutions(axes, in_channels=chain[-1].out_channels, **ends))
    return [*chain, last], draw(convolutions(axes, carried, last.out_channels, **ends))


@for_random(chains(identity_shortcut=True), st.lists(st.sampled_from(ACTIVATIONS), min_size=3, max_size=3))
def test_identity_shortcut(case, activations):
    chain, _ = case
    activations = activations[: len(chain) - 1]
    plain = fold_shortcut(chain)
    assert len(plain) == len(chain)
    for x in inputs(chain, chain[0].in_channels, count=2):
        assert_equal(run(plain, activations, x), run_with_shortcut(chain, activations, x, None))


@for_random(chains(identity_shortcut=False), st.lists(st.sampled_from(ACTIVATIONS), min_size=3, max_size=3))
def test_shortcut_through_a_convolution(case, activations):
    """Unequal channels and strided last convolutions: the shortcut is a convolution too."""
    chain, shortcut = case
    activations = activations[: len(chain) - 1]
    plain = fold_shortcut(chain, shortcut)
    for x in inputs([*chain, shortcut], chain[0].in_channels, count=2):
        assert_equal(run(plain, activations, x), run_with_shortcut(chain, activations, x, shortcut))


def carried_channels(convolution: Convolution, carried: int) -> Tensor:
    """The output channels that hold the carried map: in each group, those after the group's own."""
    rows = torch.arange(convolution.out_channels).reshape(convolution.groups, -1)
    return rows[:, -(carried // convolution.groups) :].flatten()


@for_random(chains(identity_shortcut=True))
def test_carried_channels_hold_the_input(case):
    """Before any activation, the extended map is the main map and, untouched, the input (eq. 6)."""
    chain, _ = case
    carried = chain[0].in_channels
    plain = fold_shortcut(chain)
    for x in inputs(chain, carried, count=1):
        main = extended = x
        for before, after in zip(chain[:-1], plain[:-1], strict=True):
            main, extended = reference(before, main), reference(after, extended)
            kept = carried_channels(after, carried)
            assert torch.equal(extended[:, kept], x)
            others = [c for c in range(after.out_channels) if c not in kept.tolist()]
            assert_equal(extended[:, others], main)


@for_random(chains(identity_shortcut=True))
def test_prelu_with_slope_one_carries_a_shortcut_without_activation(case):
    """An ordinary residual block, by a PReLU that is the identity on the carried channels."""
    chain, _ = case
    carried = chain[0].in_channels
    plain = fold_shortcut(chain)
    for x in inputs(chain, carried, count=1):
        extended = x
        for convolution in plain[:-1]:
            slopes = torch.full((convolution.out_channels,), 0.25, dtype=torch.float64)
            slopes[carried_channels(convolution, carried)] = 1
            extended = F.prelu(reference(convolution, extended), slopes)
        expected = run(chain, [ACTIVATIONS[6]] * (len(chain) - 1), x) + x
        assert_equal(reference(plain[-1], extended), expected)


@for_random(chains(identity_shortcut=True))
def test_relu_leaves_a_non_negative_shortcut_bare(case):
    """The older form of the extension needs inputs that ReLU does not change."""
    chain, _ = case
    activations = [F.relu] * (len(chain) - 1)
    for x in inputs(chain, chain[0].in_channels, count=1):
        positive = x.abs()
        expected = run(chain, activations, positive) + positive
        assert_equal(run(fold_shortcut(chain), activations, positive), expected)


@pytest.mark.parametrize("activation", [F.gelu, F.relu, torch.sigmoid])
def test_repnext_block(activation):
    """RepNeXt, eq. 6 to 8: depthwise 7x7, 1x1 up by four, activation, 1x1 down; its plain sizes."""
    c = 6
    depthwise = sum_branches(
        [
            new_convolution(c, c, (k, k), padding=((k // 2,) * 2,) * 2, groups=c, bias=False, seed=k)
            for k in (3, 5, 7)
        ]
    )
    mean, variance, weight, bias = normal(4, c, seed=1)
    depthwise = fold_batch_norm(depthwise, mean, variance.square(), weight, bias, 1e-5)
    chain = [depthwise, new_convolution(c, 4 * c, (1, 1), seed=2), new_convolution(4 * c, c, (1, 1), seed=3)]
    plain = fold_shortcut(chain)
    assert [tuple(r.weight.shape) for r in plain] == [
        (2 * c, 1, 7, 7),
        (5 * c, 2 * c, 1, 1),
        (c, 5 * c, 1, 1),
    ]
    assert [r.groups for r in plain] == [c, 1, 1]
    x = normal(2, c, 9, 8, seed=4)
    expected = run(chain, [lambda y: y, activation], x) + activation(x)
    assert_equal(run(plain, [lambda y: y, activation], x), expected)


@for_random(st.integers(1, 3), st.integers(1, 3), st.data())
def test_grouped_convolutions_keep_their_groups(carried_each, width_each, data):
    """Instruction 1 of the paper: the carried channels of a group follow its own."""
    groups = data.draw(st.integers(1, 6))
    fewer = data.draw(st.sampled_from(divisors(groups)))
    carried, width = groups * carried_each, groups * width_each
    chain = [
        new_convolution(carried, width, (3,), padding=((1, 1),), groups=groups),
        new_convolution(width, width, (3,), padding=((0, 2),), groups=fewer),
        new_convolution(width, carried, (1,), groups=groups),
    ]
    plain = fold_shortcut(chain)
    assert [c.groups for c in plain] == [groups, fewer, 1]
    assert [c.out_channels for c in plain] == [carried + width, carried + width, carried]


def test_extension_costs_no_bias():
    """A chain without biases stays without, and carried channels get a bias of zero where there is one."""
    first, second = new_convolution(4, 6, (1,), bias=False), new_convolution(6, 4, (1,), bias=False)
    assert [c.bias for c in fold_shortcut([first, second])] == [None, None]
    biased = fold_shortcut([new_convolution(4, 6, (1,)), second])[0]
    assert biased.bias is not None
    assert torch.equal(biased.bias[6:], torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        ({"stride": (2, 2), "padding": ((1, 1), (1, 1))}, r"cannot pass a convolution with stride \(2, 2\)"),
        ({"stride": (1, 2), "padding": ((1, 1), (1, 1))}, r"cannot pass a convolution with stride \(1, 2\)"),
        ({"padding": ((1, 1), (0, 0))}, "different sizes along spatial axis 1"),
        ({"padding": ((1, 2), (1, 1))}, "different sizes along spatial axis 0"),
    ],
)
def test_convolutions_that_change_the_size_are_refused(first, reason):
    last = new_convolution(6, 4, (1, 1))
    with pytest.raises(NotFoldable, match=reason):
        fold_shortcut([new_convolution(4, 6, (3, 3), **first), last])


def test_what_does_not_fit_together_is_refused():
    first, last = new_convolution(4, 6, (1, 1)), new_convolution(6, 8, (1, 1))
    with pytest.raises(NotFoldable, match="sum_branches"):
        fold_shortcut([first])
    with pytest.raises(NotFoldable, match="6 channels are passed on, 4 are expected"):
        fold_shortcut([first, first])
    with pytest.raises(NotFoldable, match="takes 4 channels to 4, the chain 4 to 8"):
        fold_shortcut([first, last])
    with pytest.raises(NotFoldable, match="takes 6 channels to 8, the chain 4 to 8"):
        fold_shortcut([first, last], last)
    strided = new_convolution(6, 4, (1, 1), stride=(2, 2))
    with pytest.raises(NotFoldable, match="strides of the branches differ"):
        fold_shortcut([first, strided])
    fold_shortcut([first, strided], new_convolution(4, 4, (1, 1), stride=(2, 2)))
