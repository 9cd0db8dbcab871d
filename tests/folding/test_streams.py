import pytest
import torch
from torch import nn

import refold
from refold.algebra import Convolution, mix_outputs, rotation, unmix_inputs
from refold.errors import NotFoldable
from refold.folding.fold import apply_passes
from refold.folding.identities import identities_out, split_identity
from refold.folding.streams import rotated_streams


class Residual(nn.Module):
    """A stream that three layers write and two read, across two sums, between activations."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Sequential(nn.ReLU(), nn.Conv2d(3, 8, 3, 2, 1))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 20, 1), nn.ReLU6(), nn.Conv2d(20, 8, 1)) for _ in range(2)
        )
        self.leave = nn.Sequential(nn.Conv2d(8, 6, 3, padding=1), nn.ReLU())

    def forward(self, image):
        x = self.enter(image)
        for block in self.blocks:
            x = x + block(x)
        return self.leave(x)


def drawn(channels_in, channels_out, kernel=(1, 1), padding=((0, 0), (0, 0)), groups=1):
    weight = torch.randn(channels_out, channels_in // groups, *kernel, dtype=torch.float64)
    bias = torch.randn(channels_out, dtype=torch.float64)
    return Convolution(weight, bias, (1, 1), padding, (1, 1), groups)


@pytest.mark.parametrize(("kernel", "padding"), [((1, 1), ((0, 0), (0, 0))), ((3, 3), ((1, 1), (1, 1)))])
def test_a_matrix_between_two_layers_is_undone(kernel, padding):
    first, second = drawn(4, 7), drawn(7, 5, kernel, padding)
    matrix = torch.randn(7, 7, dtype=torch.float64)
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    middle = mix_outputs(first, matrix)(x)
    torch.testing.assert_close(middle, torch.einsum("ij,bjhw->bihw", matrix, first(x)))
    torch.testing.assert_close(unmix_inputs(second, matrix)(middle), second(first(x)))


def test_weights_keep_the_usual_strides():
    # Those of channels last would change the layout of every image behind them, and with it what is exported.
    second = drawn(7, 5)
    found = unmix_inputs(second, rotation(7, second.weight))
    assert found.weight.stride() == second.weight.stride()


def test_a_shift_between_two_layers_is_undone_where_nothing_is_padded():
    first, second, shift = drawn(4, 7), drawn(7, 5, (3, 3)), torch.randn(7, dtype=torch.float64)
    turn = rotation(7, shift)
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    middle = mix_outputs(first, turn, shift)(x)
    torch.testing.assert_close(unmix_inputs(second, turn, shift)(middle), second(first(x)))
    with pytest.raises(NotFoldable, match="padding"):
        unmix_inputs(drawn(7, 5, (3, 3), ((1, 1), (1, 1))), turn, shift)


def test_groups_are_not_mixed():
    with pytest.raises(NotFoldable, match="4 groups"):
        mix_outputs(drawn(4, 4, groups=4), torch.eye(4, dtype=torch.float64))


def test_a_rotation_keeps_lengths():
    turn = rotation(9, torch.empty(0, dtype=torch.float64), seed=3)
    torch.testing.assert_close(turn @ turn.T, torch.eye(9, dtype=torch.float64))


def test_a_stream_is_rotated_and_the_function_stays():
    net, image = Residual().eval(), torch.randn(2, 3, 16, 16)
    turned = apply_passes(net, image, [rotated_streams])
    (region,) = turned.fold_report.regions
    assert region.layer == "8 channels rotated"
    assert region.operators == {"convolution": 6}
    assert turned.fold_report.proof.distance_float64 < 1e-12
    # What runs inside is something else.
    assert not torch.allclose(net.enter(image), turned.enter(image), atol=0.1)


def test_a_stream_that_something_else_reads_is_left():
    class Read(Residual):
        def forward(self, image):
            x = self.enter(image)
            return self.leave(x + self.blocks[0](x)) + torch.sigmoid(x).mean()

    assert not apply_passes(Read().eval(), torch.randn(1, 3, 16, 16), [rotated_streams]).fold_report.regions


def test_streams_of_a_real_network():
    net = refold.fold(refold.create_model("mobilenetv2_035"), torch.randn(1, 3, 64, 64))
    turned = apply_passes(net, torch.randn(1, 3, 64, 64), [rotated_streams])
    assert len(turned.fold_report.regions) == 7
    assert turned.fold_report.proof.distance_float64 < 1e-9


def test_an_identity_leaves_the_kernel_it_was_folded_into():
    convolution = drawn(5, 5, (3, 3), ((1, 1), (1, 1)))
    rest, diagonal = split_identity(convolution)
    x = torch.randn(2, 5, 6, 7, dtype=torch.float64)
    torch.testing.assert_close(rest(x) + diagonal(x), convolution(x))
    assert not rest.weight[:, :, 1, 1].diagonal().any()
    assert diagonal.groups == 5


def test_identities_of_a_network_come_out_and_the_function_stays():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1)
    ).eval()
    with torch.no_grad():
        net[2].weight[:, :, 1, 1] += 2 * torch.eye(8)
    image = torch.randn(1, 3, 16, 16)
    split = apply_passes(net, image, [identities_out], may_cost=True)
    # The last kernel has no outliers on its diagonal, the first none at all.
    assert [region.path for region in split.fold_report.regions] == ["2"]
    assert split.fold_report.proof.distance_float64 < 1e-12
    convolutions = [module for module in split.modules() if isinstance(module, nn.Conv2d)]
    assert sorted(module.groups for module in convolutions) == [1, 1, 1, 8]
