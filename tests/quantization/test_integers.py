import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refold.quantization.integers import PAIR_LIMIT, Pairs, nearest, rounded_together, scales_of


def saturating_sums(rows, activations, partner):
    """Sums of neighbouring products as the processor makes them, and without its limit: both ``[rows, pairs]``."""
    products = rows.double()[:, None, :] * activations.double()[None]
    own = torch.arange(rows.shape[1])
    first = own[own < partner]
    sums = products[..., first] + products[..., partner[first]]
    return sums.clamp(-(2**15), 2**15 - 1), sums


def worst_activations(rows):
    """For each sign of a weight the bytes that drive its sums furthest: 255 where it has that sign."""
    return torch.cat([(rows > 0) * 255, (rows < 0) * 255])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6), st.integers(1, 9), st.sampled_from([1, 9]), st.integers(2, 8), st.integers(0, 10**6)
)
def test_no_activations_saturate_pairs_of_rounded_weights(count, channels, taps, bits, seed):
    generator = torch.Generator().manual_seed(seed)
    columns = channels * taps
    rows = torch.randn(count, columns, generator=generator) ** 3
    pairs = Pairs.of(columns, channels)
    scale = scales_of(rows, pairs, bits, per_channel=True)
    inputs = torch.randn(columns, 4 * columns + 8, generator=generator).relu()
    products = (inputs @ inputs.T / inputs.shape[1])[None]
    for integers in (
        nearest(rows, scale, bits),
        rounded_together(rows[None], scale[None], products, pairs, bits)[0],
    ):
        assert integers.abs().max() <= 2 ** (bits - 1) - 1
        assert torch.equal(integers, integers.round())
        assert pairs.largest(integers).max() <= PAIR_LIMIT
        for partner in pairs.partners:
            limited, free = saturating_sums(integers, worst_activations(integers), partner)
            assert torch.equal(limited, free)


def test_scales_by_the_largest_weight_do_saturate():
    rows = torch.tensor([[1.0, 0.9, -1.0, -0.8]])
    integers = nearest(rows, scales_of(rows, None, 8, per_channel=True), 8)
    partner = Pairs.of(4, 4).partners[0]
    limited, free = saturating_sums(integers, worst_activations(integers), partner)
    assert not torch.equal(limited, free)
    assert Pairs.of(4, 4).largest(integers).tolist() == [241]


@pytest.mark.parametrize(
    ("columns", "channels", "expected"),
    [
        (4, 4, [[1, 0, 3, 2]]),
        # Three channels at two positions: along the row, and along the channels of a position.
        (6, 3, [[1, 0, 3, 2, 5, 4], [1, 0, 2, 4, 3, 5]]),
        (3, 3, [[1, 0, 2]]),
    ],
)
def test_pairs_are_those_of_both_kernels(columns, channels, expected):
    assert [partner.tolist() for partner in Pairs.of(columns, channels).partners] == expected


def test_the_largest_pair_is_of_one_sign():
    rows = torch.tensor([[100.0, -100.0, 60.0, 67.0], [-70.0, -58.0, 5.0, 0.0]])
    assert Pairs.of(4, 4).largest(rows).tolist() == [127, 128]


def test_rounding_together_is_nearer_than_one_by_one():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(32, 8, generator=generator)
    inputs = mixing @ torch.randn(8, 2000, generator=generator)
    inputs += 0.1 * torch.randn(32, 2000, generator=generator)
    rows = torch.randn(8, 32, generator=generator)
    scale = scales_of(rows, None, 4, per_channel=True)
    products = (inputs @ inputs.T / 2000)[None]

    def missed(integers):
        return float((((integers * scale[:, None]) - rows).float() @ inputs).square().sum())

    together = rounded_together(rows[None], scale[None], products, None, 4)[0].float()
    assert missed(together) < 0.5 * missed(nearest(rows, scale, 4))


def test_one_scale_for_the_tensor_is_the_largest():
    rows = torch.tensor([[1.0, -2.0], [127.0, 1.0]])
    assert scales_of(rows, None, 8, per_channel=False).tolist() == [1.0, 1.0]
