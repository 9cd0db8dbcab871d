"""Borders and cost: what is exact without padding is not with it, and an exact fold that costs more is declined."""

import pytest
import torch
import torch.nn.functional as F
from checking import Net, Parallel, check_fold, conv_bn, images
from torch import Tensor, nn

import refold

PADS = "pads with zeros"


def test_a_batch_norm_before_an_unpadded_convolution_folds() -> None:
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, stride=2), nn.ReLU())
    plain = check_fold(model, images(4), convolutions=1)
    assert plain.fold_report.after.operator_count == 3


def test_a_batch_norm_before_a_padded_convolution_is_left_with_the_reason() -> None:
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU())
    plain = check_fold(model, images(4), convolutions=1, batch_norms=1, left=[PADS])
    assert [name for name, _ in plain.fold_report.left] == ["1"]


@pytest.mark.parametrize("padding", [(1, 0), (0, 1), "same"])
def test_padding_of_one_axis_or_by_name_is_padding(padding: str | tuple[int, int]) -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=padding), nn.ReLU())
    check_fold(model, images(4), batch_norms=1, left=[PADS])


def test_a_batch_norm_without_any_shift_passes_the_padding() -> None:
    """A scale alone keeps the zeros of the border, so nothing forbids to fold it."""

    def scaled(net: Net, x: Tensor) -> Tensor:
        return net.act(net.conv(x * net.scale))

    model = Net(
        scaled, scale=nn.Parameter(torch.randn(1, 4, 1, 1)), conv=nn.Conv2d(4, 4, 3, padding=1), act=nn.ReLU()
    )
    plain = check_fold(model, images(4), convolutions=1)
    assert plain.fold_report.after.operators == {"convolution": 1, "activation": 1}


def test_a_zero_pad_layer_between_batch_norm_and_convolution_is_padding() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ZeroPad2d((1, 0, 2, 1)), nn.Conv2d(4, 4, 3), nn.ReLU())
    check_fold(model, images(4), batch_norms=1, left=[PADS])


def test_a_batch_norm_after_the_convolution_folds_whatever_the_padding() -> None:
    for padding in (0, 1, 3, "same", (2, 0)):
        model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=padding), nn.BatchNorm2d(6), nn.ReLU())
        check_fold(model, images(4), convolutions=1)


def test_between_two_convolutions_the_batch_norm_goes_to_the_one_before() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3, padding=1), nn.ReLU())
    check_fold(model, images(4), convolutions=2)


def test_a_pre_activation_block_keeps_only_the_norm_that_a_padded_convolution_follows() -> None:
    """ResNet-v2 and DenseNet: norm, activation, convolution; the norm after a convolution folds, the first cannot."""
    model = nn.Sequential(
        nn.ReLU(),
        *(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 1, bias=False)),
        *(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1, bias=False)),
    )
    plain = check_fold(model, images(4), convolutions=2, batch_norms=1, left=["not next to a convolution"])
    assert [name for name, _ in plain.fold_report.left] == ["1"]


class Series(nn.Sequential):
    """A 1x1 and a kxk convolution in series."""

    def __init__(
        self, channels: tuple[int, int, int], bias: bool, padding: int, kernel_size: int = 3
    ) -> None:
        super().__init__(
            nn.Conv2d(channels[0], channels[1], 1, bias=bias),
            nn.Conv2d(channels[1], channels[2], kernel_size, padding=padding),
            nn.ReLU(),
        )


@pytest.mark.parametrize(("bias", "padding"), [(False, 0), (False, 1), (True, 0)])
def test_a_series_that_gets_cheaper_becomes_one_convolution(bias: bool, padding: int) -> None:
    plain = check_fold(Series((4, 8, 6), bias, padding), images(4), convolutions=1)
    assert plain.fold_report.after.macs < plain.fold_report.before.macs


def test_a_series_with_a_bias_before_the_padding_is_left() -> None:
    check_fold(Series((4, 8, 6), bias=True, padding=1), images(4), convolutions=2)


def test_a_series_with_a_batch_norm_before_the_padding_keeps_two_convolutions() -> None:
    model = nn.Sequential(*conv_bn(4, 8, 1), *conv_bn(8, 6, 3), nn.ReLU())
    check_fold(model, images(4), convolutions=2)


def test_two_padded_kernels_in_series_are_left_even_without_a_bias() -> None:
    """Beyond the border of the middle map the first kernel would still see the image, where the second reads zeros."""
    padded = nn.Sequential(
        nn.Conv2d(2, 16, 3, padding=1, bias=False), nn.Conv2d(16, 2, 3, padding=1, bias=False), nn.ReLU()
    )
    plain = check_fold(padded, images(2), convolutions=2)
    assert plain.fold_report.regions == []
    unpadded = nn.Sequential(
        nn.Conv2d(2, 16, 3, padding=1, bias=False), nn.Conv2d(16, 2, 3, bias=False), nn.ReLU()
    )
    assert check_fold(unpadded, images(2), convolutions=1).fold_report.regions


def test_a_narrow_middle_is_declined_by_cost() -> None:
    """8 to 2 to 8 channels costs 16 + 144 products a pixel; as one convolution 576."""
    check_fold(Series((8, 2, 8), bias=False, padding=0), images(8), convolutions=2)


def test_a_wide_middle_of_two_large_kernels_is_declined_by_cost() -> None:
    """Two 3x3 kernels cost 18 products where one 5x5 kernel costs 25."""
    model = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.Conv2d(4, 4, 3, bias=False), nn.ReLU())
    check_fold(model, images(4), convolutions=2)


def test_a_depthwise_separable_convolution_is_declined_by_cost() -> None:
    """USERS: folding blew up parameters. Depthwise and pointwise would become one dense convolution."""
    model = nn.Sequential(*conv_bn(8, 8, 3, groups=8, padding=0), *conv_bn(8, 8, 1), nn.ReLU())
    plain = check_fold(model, images(8), convolutions=2)
    assert plain.fold_report.after.parameters <= plain.fold_report.before.parameters


def test_a_branch_that_would_make_a_cheap_layer_dense_is_declined_by_cost() -> None:
    """Depthwise 5x5 beside dense 1x1: merged they would be one dense 5x5 convolution, five times the products."""
    model = Parallel(conv_bn(8, 8, 5, groups=8), conv_bn(8, 8, 1))
    plain = check_fold(model, images(8), convolutions=2)
    assert plain.fold_report.after.macs == plain.fold_report.before.macs


def test_a_convolution_and_an_average_pool_merge_only_without_more_weights() -> None:
    """A transition of DenseNet: equal products, one operator less, but four times the weights."""
    model = nn.Sequential(nn.ReLU(), *conv_bn(8, 4, 1), nn.AvgPool2d(2, 2), nn.ReLU())
    plain = check_fold(model, images(8), convolutions=1)
    assert plain.fold_report.after.parameters <= plain.fold_report.before.parameters


def test_costs_count_every_consumer() -> None:
    """The 1x1 convolution runs anyway, for its other reader: composing it into the 3x3 one would only add."""

    def forward(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        y = net.first(x)
        return net.second(y).relu(), y.relu()

    model = Net(forward, first=nn.Conv2d(4, 8, 1, bias=False), second=nn.Conv2d(8, 6, 3, bias=False))
    check_fold(model, images(4), convolutions=2)


def test_what_is_needed_anyway_costs_nothing() -> None:
    """`scaled` is an output, and needs the convolution: computing the difference with another one would add to it."""

    def forward(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        y = net.conv(x)
        scaled = y * 2
        return scaled.sigmoid(), (scaled - y).relu()

    check_fold(Net(forward, conv=nn.Conv2d(4, 4, 3)), images(4), convolutions=1)

    def with_unused(net: Net, x: Tensor) -> Tensor:
        y = net.conv(x)
        scaled = y * 2
        scaled.mul(3)
        return (scaled - y).relu()

    check_fold(Net(with_unused, conv=nn.Conv2d(4, 4, 3)), images(4), convolutions=1)


def test_a_value_that_nobody_reads_does_not_add_cost() -> None:
    """Left over from debugging, say: neither it nor what only it reads may run beside the folded layer."""

    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.body(x)
        unused = y * 2
        (unused + 1).neg()
        return (y + x).relu()

    body = nn.Sequential(nn.Conv2d(4, 8, 1, bias=False), *conv_bn(8, 4, 3))
    check_fold(Net(forward, body=body), images(4), convolutions=1)


def test_a_long_linear_chain() -> None:
    """One layer after one fold, so that a second one has nothing to do."""
    model = nn.Sequential(*(layer for _ in range(30) for layer in conv_bn(4, 4, 1)), nn.ReLU())
    plain = check_fold(model, images(4), convolutions=1)
    assert refold.fold(plain, images(4)[0]).fold_report.regions == []


def test_a_series_of_linear_layers() -> None:
    """1x1 convolutions and linear layers have no borders: a wide middle folds, a narrow one does not."""
    wide = nn.Sequential(nn.Linear(4, 16), nn.Dropout(), nn.Linear(16, 3))
    plain = check_fold(wide, images(4, [()]))
    assert plain.fold_report.after.operators == {"linear": 1}
    narrow = nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 8))
    assert check_fold(narrow, images(8, [()])).fold_report.after.operators == {"linear": 2}


def test_a_constant_border_is_not_a_zero_border() -> None:
    """Padding with another value than zero is left where it stands."""
    model = nn.Sequential(nn.ConstantPad2d(1, 0.5), *conv_bn(4, 4, 3, padding=0), nn.ReLU())
    plain = check_fold(model, images(4), convolutions=1)
    assert plain.fold_report.after.operators["padding"] == 1
    functional = Net(
        lambda net, x: net.body(F.pad(x, (1, 1, 1, 1), value=-1.0)), body=conv_bn(4, 4, 3, padding=0)
    )
    assert check_fold(functional, images(4)).fold_report.after.operators["padding"] == 1


def test_a_crop_is_left() -> None:
    model = nn.Sequential(nn.ZeroPad2d(-1), *conv_bn(4, 4, 3), nn.ReLU())
    check_fold(model, images(4), convolutions=1)


@pytest.mark.parametrize("prove", [True, False])
def test_what_is_left_is_left_without_a_proof_too(prove: bool) -> None:
    """The border trap is refused by the algebra, not only caught by the proof."""
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)).double().eval()
    assert model[0].running_mean is not None
    model[0].running_mean += 1
    (x,) = images(4, [(7, 6)])
    plain = refold.fold(model, x, prove=prove)
    assert torch.equal(plain(x), model(x))
    assert PADS in plain.fold_report.left[0][1]
