"""Scales, shifts, sums, concatenations and parts of the channels, as functions and as methods of tensors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checking import LARGEST, Net, Parallel, call, check_fold, conv_bn, distance, images, normal, trained
from torch import Tensor, nn

import refold

ONE_CONVOLUTION = {"convolution": 1, "activation": 1}


SCALED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "x * 0.5": lambda net, x: x * 0.5,
    "0.5 * x": lambda net, x: 0.5 * x,
    "x / 3": lambda net, x: x / 3,
    "-x": lambda net, x: -x,
    "+x": lambda net, x: +x,
    "torch.neg": lambda net, x: torch.neg(x),
    "x - 1": lambda net, x: x - 1.0,
    "1 - x": lambda net, x: 1.0 - x,
    "x + 1": lambda net, x: 1 + x,
    "x.mul": lambda net, x: x.mul(net.scale),
    "x.mul_": lambda net, x: x.mul_(net.scale).add_(net.shift),
    "torch.mul": lambda net, x: torch.mul(net.scale, x),
    "layer scale": lambda net, x: x * net.vector.reshape(1, -1, 1, 1),
    "layer scale by view": lambda net, x: net.vector[:, None, None] * x,
    "x / scale": lambda net, x: x / (net.scale.square() + 1),
    "shift": lambda net, x: x + net.shift,
    "minus": lambda net, x: torch.sub(net.shift, x, alpha=3),
    "alpha": lambda net, x: torch.add(x, net.shift, alpha=-2.0),
    "x.sub": lambda net, x: x.sub(net.shift, alpha=0.5),
    "in place": lambda net, x: x.sub_(net.shift).div_(7.0),
    "number in a buffer": lambda net, x: x * net.number + net.number,
    "computed": lambda net, x: x * torch.sigmoid(net.scale) * net.number.exp(),
    "contiguous": lambda net, x: x.contiguous() * 2,
}


@pytest.mark.parametrize("name", SCALED)
def test_scales_and_shifts_behind_a_convolution(name: str) -> None:
    model = Net(
        lambda net, x: SCALED[name](net, net.body(x)).relu(),
        body=conv_bn(4, 5),
        scale=nn.Parameter(torch.randn(1, 5, 1, 1)),
        shift=nn.Parameter(torch.randn(5, 1, 1)),
        vector=nn.Parameter(torch.randn(5)),
    )
    model.register_buffer("number", torch.tensor(1.7))
    plain = check_fold(model, images(4), convolutions=1)
    assert plain.fold_report.after.operators == ONE_CONVOLUTION


NOT_BY_CHANNEL: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "width": lambda net, x: x * net.vector,
    "position": lambda net, x: x + net.position,
    "batch": lambda net, x: x * net.vector[:2, None, None, None],
    "gate": lambda net, x: x * x.mean((2, 3), keepdim=True),
    "rounded": lambda net, x: torch.div(x, 2.0, rounding_mode="floor"),
    "divided by": lambda net, x: 2.0 / (x.square() + 1),
    "itself": lambda net, x: x * x,
    "broadcast": lambda net, x: x + x[:, :1],
    "power": lambda net, x: x**2,
}


@pytest.mark.parametrize("name", NOT_BY_CHANNEL)
def test_what_is_not_one_number_a_channel_is_left(name: str) -> None:
    """Width, height and channels are equal, so that nothing but the place of the axis tells them apart."""
    model = Net(
        lambda net, x: NOT_BY_CHANNEL[name](net, net.body(x)).relu(),
        body=conv_bn(4, 6),
        vector=nn.Parameter(torch.randn(6)),
        position=nn.Parameter(torch.randn(1, 6, 6, 6)),
    )
    check_fold(model, images(4, [(6, 6)]), convolutions=1)


SUMS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "+": lambda net, x: net.a(x) + net.b(x) + x,
    "-": lambda net, x: net.a(x) - net.b(x) - x,
    "sum": lambda net, x: sum([net.a(x), net.b(x), x]),
    "sum of layers": lambda net, x: sum(branch(x) for branch in (net.a, net.b)),
    "torch.add": lambda net, x: torch.add(net.a(x), net.b(x), alpha=2),
    "torch.sub": lambda net, x: torch.sub(net.a(x), other=net.b(x), alpha=0.5),
    "x.add": lambda net, x: net.a(x).add(net.b(x)).sub(x),
    "x.add_": lambda net, x: net.a(x).add_(net.b(x), alpha=3.0).sub_(x),
    "weighted": lambda net, x: 0.25 * net.a(x) + net.b(x) / 4 - (x - 2 * x),
    "mean": lambda net, x: (net.a(x) + net.b(x)) / 2,
}


@pytest.mark.parametrize("name", SUMS)
def test_sums_and_differences(name: str) -> None:
    model = Net(lambda net, x: SUMS[name](net, x).relu(), a=conv_bn(4, 4, 3), b=conv_bn(4, 4, 1))
    plain = check_fold(model, images(4), convolutions=1)
    assert plain.fold_report.after.operators == ONE_CONVOLUTION


CATS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "cat": lambda net, x: torch.cat([net.a(x), net.b(x)], 1),
    "cat by name": lambda net, x: torch.cat((net.a(x), net.b(x)), dim=-3),
    "concat": lambda net, x: torch.concat(tensors=[net.a(x), net.b(x)], dim=1),
    "concatenate": lambda net, x: torch.concatenate([net.a(x), net.b(x)], axis=1),
    "nested": lambda net, x: torch.cat([torch.cat([net.a(x), net.c(x)], 1), net.b(x)], 1),
    "then norm": lambda net, x: net.bn(torch.cat([net.a(x), net.b(x)], 1)),
}


@pytest.mark.parametrize("name", CATS)
def test_concatenated_branches(name: str) -> None:
    model = Net(
        lambda net, x: CATS[name](net, x).relu(),
        a=conv_bn(4, 4, 3),
        b=conv_bn(4, 6, 3),
        c=conv_bn(4, 2, 3),
        bn=nn.BatchNorm2d(10),
    )
    plain = check_fold(model, images(4), convolutions=1, left=["does not run"])
    assert plain.fold_report.after.operators == ONE_CONVOLUTION


def test_branches_of_different_cost_stay_concatenated() -> None:
    """Inception: a 1x1 branch beside a 3x3 one would take nine times its products."""
    model = Net(
        lambda net, x: torch.cat([net.a(x), net.b(x)], 1).relu(), a=conv_bn(4, 4, 3), b=conv_bn(4, 4, 1)
    )
    check_fold(model, images(4), convolutions=2)


def test_the_ghost_module_keeps_its_concatenation() -> None:
    """cat(y, depthwise(y)) after an activation: nothing to merge, only the norms go."""

    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.primary(x).relu()
        return torch.cat([y, net.cheap(y).relu()], 1)

    plain = check_fold(Net(forward, primary=conv_bn(4, 6, 1), cheap=conv_bn(6, 6, 3, groups=6)), images(4))
    assert plain.fold_report.after.operators == {"convolution": 2, "activation": 2, "concatenation": 1}


def test_concatenation_along_another_axis_is_left() -> None:
    for axis in (0, 2, 3):
        model = Net(
            lambda net, x, axis=axis: torch.cat([net.a(x), net.b(x)], axis).relu(), a=conv_bn(4, 4, 3)
        )
        model.b = conv_bn(4, 4, 3)
        plain = check_fold(model, images(4, [(4, 4)]), convolutions=2)
        assert plain.fold_report.after.operators["concatenation"] == 1


PARTS: dict[str, Callable[[Tensor], Any]] = {
    "chunk": lambda x: x.chunk(2, 1),
    "chunk by name": lambda x: torch.chunk(input=x, chunks=2, dim=1),
    "split": lambda x: torch.split(x, 4, dim=1),
    "split by name": lambda x: x.split(dim=1, split_size=4),
    "split sizes": lambda x: torch.split(x, [5, 3], 1),
    "split into unequal": lambda x: x.split(5, 1),
    "tensor_split": lambda x: torch.tensor_split(x, 2, dim=-3),
    "narrow": lambda x: (x.narrow(1, 0, 5), torch.narrow(x, dim=1, start=5, length=3)),
    "slices": lambda x: (x[:, :5], x[:, 5:, ...]),
    "slices with ellipsis": lambda x: (x[..., :5, :, :], x[:, -3:]),
}
"""Eight channels in two parts of five and three, or of four, in every way that torch has."""


@pytest.mark.parametrize("name", PARTS)
def test_depthwise_branches_on_parts_of_the_channels(name: str) -> None:
    """The RepUnit: split, depthwise kernels of different sizes, concatenate; one depthwise convolution."""
    first, second = PARTS[name](torch.empty(1, 8, 1, 1))
    widths = first.shape[1], second.shape[1]

    def forward(net: Net, x: Tensor) -> Tensor:
        pieces = PARTS[name](x.relu())
        return torch.cat([net.a(pieces[0]), net.b(pieces[1])], 1).relu()

    model = Net(
        forward,
        a=conv_bn(widths[0], widths[0], 5, groups=widths[0]),
        b=conv_bn(widths[1], widths[1], 5, groups=widths[1]),
    )
    plain = check_fold(model, images(8), convolutions=1)
    assert plain.fold_report.after.operators == {"convolution": 1, "activation": 2}


def test_chunks_by_keyword() -> None:
    """Names instead of positions, in another order."""

    def forward(net: Net, x: Tensor) -> Tensor:
        pieces = torch.split(dim=1, split_size_or_sections=[3, 5], tensor=x)
        halves = torch.chunk(dim=1, input=x, chunks=2)
        return (net.a(pieces[0]) + net.b(halves[1])).relu()

    check_fold(Net(forward, a=conv_bn(3, 4, 3), b=conv_bn(4, 4, 1)), images(8), batch_norms=0)


def test_channels_that_nobody_reads_are_not_computed() -> None:
    model = Net(lambda net, x: net.body(x)[:, 2:5].relu(), body=conv_bn(4, 8))
    plain = check_fold(model, images(4), convolutions=1)
    assert plain.conv.out_channels == 3


def test_slices_that_are_no_parts_of_the_channels_are_left() -> None:
    cases: list[Callable[[Any, Tensor], Tensor]] = [
        lambda net, x: net.body(x)[:1].relu(),
        lambda net, x: net.body(x)[:, :, 1:].relu(),
        lambda net, x: net.body(x)[..., 1:].relu(),
        lambda net, x: net.body(x)[:, ::2].relu(),
        lambda net, x: net.body(x)[:, 1].relu(),
        lambda net, x: net.body(x)[:, [3, 1]].relu(),
        lambda net, x: net.body(x)[:, None].relu(),
        lambda net, x: net.body(x).narrow(1, -3, 2).relu(),
        lambda net, x: net.body(x).chunk(2, 2)[1].relu(),
    ]
    for case in cases:
        check_fold(Net(case, body=conv_bn(4, 6)), images(4, [(6, 6)]), convolutions=1)


def test_a_norm_behind_branches_that_stay_apart() -> None:
    """Each branch takes its part of the scale and the shift; the branches themselves would cost more as one."""
    together = Net(
        lambda net, x: net.bn(torch.cat([net.a(x), net.b(x)], 1)).relu(),
        a=nn.Conv2d(4, 4, 3, padding=1),
        b=nn.Conv2d(4, 6, 1),
        bn=nn.BatchNorm2d(10),
    )
    check_fold(together, images(4), convolutions=2)
    added = Net(
        lambda net, x: net.bn(net.a(x.relu()) + net.b(x.sigmoid())).relu(),
        a=nn.Conv2d(4, 6, 3, padding=1, bias=False),
        b=nn.Conv2d(4, 6, 1, bias=False),
        bn=nn.BatchNorm2d(6),
    )
    check_fold(added, images(4), convolutions=2)


def test_a_norm_behind_a_concatenation_with_something_else_is_left() -> None:
    """DenseNet: one part of what the norm reads is no convolution."""
    model = Net(
        lambda net, x: net.bn(torch.cat([net.a(x), x.relu()], 1)).relu(),
        a=nn.Conv2d(4, 4, 3, padding=1),
        bn=nn.BatchNorm2d(8),
    )
    check_fold(model, images(4), convolutions=1, batch_norms=1, left=["concatenation"])


def test_settings_computed_from_shapes() -> None:
    """Groups read from the shape of a tensor: at worst that call stays, and everything else folds."""
    model = Net(
        lambda net, x: F.conv2d(net.a(x), net.weight, groups=x.shape[1], padding=x.size(1) // 4).relu(),
        a=conv_bn(4, 4),
        weight=nn.Parameter(torch.randn(4, 1, 3, 3)),
    )
    check_fold(model, images(4))


def test_strange_calls_of_known_functions_do_not_stop_the_rest() -> None:
    """Arguments that no recogniser expects."""
    cases: list[Callable[[Any, Tensor], Tensor]] = [
        lambda net, x: torch.cat(net.a(x).chunk(2, 1), 1),
        lambda net, x: torch.cat(net.a(x).unbind(1), -1),
        lambda net, x: F.pad(net.a(x), (1, 1, 0, 0), mode="circular"),
        lambda net, x: F.pad(net.a(x), (x.shape[1], 0)),
        lambda net, x: net.a(x)[:, : x.shape[1] // 2],
        lambda net, x: net.a(x).split([1, x.shape[1] - 1], 1)[1],
        lambda net, x: torch.chunk(net.a(x), x.shape[1], 1)[-1],
        lambda net, x: F.avg_pool2d(net.a(x), x.shape[-1] // 4),
        lambda net, x: torch.narrow(net.a(x), 1, x.shape[1] - 2, 2),
        lambda net, x: net.a(x) * x.shape[1] + x.shape[2],
        lambda net, x: net.a(x) + True,
        lambda net, x: net.a(x).mul(torch.tensor([1, 2, 3, 4]).reshape(4, 1, 1)),
        lambda net, x: net.a(x) / torch.arange(1, 5)[:, None, None],
        lambda net, x: sum([], net.a(x)),
    ]
    for case in cases:
        check_fold(
            Net(lambda net, x, case=case: case(net, x).relu(), a=conv_bn(4, 4)), images(4, [(12, 12), (8, 8)])
        )


class TokenNorm(nn.Module):
    """A linear layer on `[batch, length, channels]` and a norm over flattened tokens, as LeViT has it."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels, out_channels, bias=False)
        self.bn = nn.BatchNorm1d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return self.bn(y.flatten(0, 1)).reshape_as(y)


def test_norms_over_flattened_tokens() -> None:
    """Also where the shape is taken from another value than the one that was flattened."""
    tokens = [normal(2, 5, 4), normal(3, 7, 4)]
    model = nn.Sequential(TokenNorm(4, 6), nn.ReLU(), Parallel(TokenNorm(6, 6), TokenNorm(6, 6)))
    plain = check_fold(model, tokens)
    assert plain.fold_report.after.operators == {"linear": 2, "activation": 2}

    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.first(x).relu()
        return net.bn(net.second(y).flatten(0, 1)).view_as(x).relu()

    other = Net(forward, first=nn.Linear(4, 4), second=nn.Linear(4, 4), bn=nn.BatchNorm1d(4))
    check_fold(other, tokens, batch_norms=1, left=["reshaped in another way"])


def test_flattening_another_way_is_no_identity() -> None:
    """Equal numbers of elements: only the axes before the channels may merge, and come back as they were."""
    cases: list[Callable[[Any, Tensor], Tensor]] = [
        lambda net, x: net.bn(net.a(x).flatten(0, 1)).view(x.shape[1], x.shape[0], -1).relu(),
        lambda net, x: net.bn(net.a(x).flatten(0, 1)).reshape_as(x.transpose(0, 1)).relu(),
        lambda net, x: net.bn(net.a(x).transpose(1, 2).flatten(0, 1)).relu(),
        lambda net, x: net.a(x).flatten(1).relu(),
    ]
    for case in cases:
        model = Net(case, a=nn.Linear(4, 4), bn=nn.BatchNorm1d(4))
        plain = trained(model.double())
        x = normal(3, 4, 4)
        assert distance(call(model, x), call(refold.fold(plain, x), x)) <= LARGEST


def test_branches_over_tokens_and_over_sequences() -> None:
    """Channels last for linear layers, channels first for the norm: they take it up across the transposition."""

    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.a(x) + net.b(x) * net.scale
        return net.bn(y.transpose(1, 2)).relu()

    model = Net(
        forward,
        a=nn.Linear(4, 6),
        b=nn.Linear(4, 6),
        scale=nn.Parameter(torch.randn(6)),
        bn=nn.BatchNorm1d(6),
    )
    plain = check_fold(model, [normal(2, 6, 4), normal(3, 5, 4)])
    assert plain.fold_report.after.operators["linear"] == 1


def test_a_branch_that_is_multiplied_by_zero() -> None:
    """Its norm's shift cannot be divided by nothing: the branch that is left takes it."""
    model = Net(
        lambda net, x: net.bn(0.0 * net.a(x.relu()) + net.b(x.sigmoid())).relu(),
        a=nn.Conv2d(4, 4, 3, padding=1),
        b=nn.Conv2d(4, 4, 1),
        bn=nn.BatchNorm2d(4),
    )
    plain = check_fold(model, images(4), convolutions=2)
    assert all(torch.isfinite(parameter).all() for parameter in plain.parameters())


def test_products_with_constant_matrices() -> None:
    """`x @ W`, `torch.addmm` and what is added are linear layers."""

    def forward(net: Net, x: Tensor) -> Tensor:
        return net.norm(torch.addmm(net.bias, x @ net.first, net.second, beta=0.5, alpha=2.0))

    weights = {"first": nn.Parameter(torch.randn(5, 4)), "second": nn.Parameter(torch.randn(4, 3))}
    model = Net(forward, **weights, bias=nn.Parameter(torch.randn(3)), norm=nn.BatchNorm1d(3)).eval()
    plain = refold.fold(model, torch.randn(2, 5))
    assert plain.fold_report.after.operators == {"linear": 1}


def test_a_scalar_among_the_inputs() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = conv_bn(3, 4)

        def forward(self, x: Tensor, times: Tensor) -> Tensor:
            return self.body(x) * times

    plain = refold.fold(Scaled().eval(), (torch.randn(1, 3, 9, 9), torch.tensor(3)))
    assert plain.fold_report.after.batch_norms == 0
