"""Parallel branches: every way in which their kernels can differ."""

import pytest
import torch.nn.functional as F
from checking import Net, Parallel, check_fold, conv_bn, images
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import refold


def both_axes(*numbers: int) -> list[tuple[int, int]]:
    return [(a, b) for a in numbers for b in numbers]


def test_kernels_of_different_sizes_become_the_largest() -> None:
    model = Parallel(*(conv_bn(4, 4, k) for k in (5, 1, 3)), nn.BatchNorm2d(4), nn.Identity())
    plain = check_fold(model, images(4), convolutions=1)
    assert plain.conv.kernel_size == (5, 5)
    assert plain.conv.padding == (2, 2)


def test_images_smaller_than_the_kernels() -> None:
    """USERS: non-square, small and odd inputs fail. Down to one pixel, where everything is border."""
    sizes = [(12, 12), (1, 1), (1, 7), (2, 1), (3, 2)]
    check_fold(
        Parallel(*(conv_bn(4, 4, k) for k in (7, 3, 1)), nn.AvgPool2d(3, 1, 1)),
        images(4, sizes),
        convolutions=1,
    )
    strided = Parallel(*(conv_bn(4, 4, k, stride=2) for k in (5, 1)))
    check_fold(strided, images(4, sizes), convolutions=1)


@pytest.mark.parametrize("kernel_size", [(3, 1), (1, 5), (1, 3), (5, 3)])
def test_kernels_that_are_not_square(kernel_size: tuple[int, int]) -> None:
    model = Parallel(conv_bn(4, 4, 5), conv_bn(4, 4, kernel_size), conv_bn(4, 4, 1))
    check_fold(model, images(4), convolutions=1)


def test_a_cross_of_two_thin_kernels_is_declined_by_cost() -> None:
    """3x1 and 1x3 take six products; the 3x3 kernel that holds both takes nine."""
    check_fold(Parallel(conv_bn(4, 4, (3, 1)), conv_bn(4, 4, (1, 3))), images(4), convolutions=2)


def test_even_kernels() -> None:
    """2x2 at the top left of each pixel, in the middle of a 4x4 kernel with more room before than after."""
    model = Net(
        lambda net, x: (net.a(x) + net.b(F.pad(x, (0, 1, 0, 1)))).relu(),
        a=nn.Sequential(nn.ZeroPad2d((1, 2, 1, 2)), *conv_bn(4, 4, 4, padding=0)),
        b=conv_bn(4, 4, 2, padding=0),
    )
    check_fold(model, images(4), convolutions=1)
    same = Parallel(conv_bn(4, 4, 4, padding="same"), conv_bn(4, 4, 2, padding="same"), conv_bn(4, 4, 1))
    check_fold(same, images(4), convolutions=1)


def test_padding_that_does_not_centre_the_kernels() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        return (net.a(F.pad(x, (2, 0, 0, 2))) + net.b(x) + net.c(F.pad(x, (0, 2, 1, 1)))).relu()

    model = Net(
        forward, a=conv_bn(4, 4, 3, padding=0), b=conv_bn(4, 4, 5, padding=2), c=conv_bn(4, 4, 3, padding=0)
    )
    plain = check_fold(model, images(4), convolutions=1)
    assert "padding" not in plain.fold_report.after.operators


def test_a_branch_that_reads_beyond_the_others_keeps_its_border() -> None:
    """A 1x1 kernel with padding 1 and a 3x3 kernel with padding 2 both write a map that is larger than its input."""
    check_fold(Parallel(conv_bn(4, 4, 1, padding=1), conv_bn(4, 4, 3, padding=2)), images(4), convolutions=1)


def test_a_crop_by_a_smaller_padding() -> None:
    """An unpadded 3x3 kernel and a 5x5 kernel with padding 1 write maps of equal, smaller size."""
    check_fold(Parallel(conv_bn(4, 4, 3, padding=0), conv_bn(4, 4, 5, padding=1)), images(4), convolutions=1)


@pytest.mark.parametrize("stride", [2, 3, (1, 2)])
def test_equal_strides(stride: int | tuple[int, int]) -> None:
    model = Parallel(*(conv_bn(4, 6, k, stride=stride) for k in (3, 1, 5)))
    check_fold(model, images(4), convolutions=1)


def test_strides_that_differ_are_left() -> None:
    """A 1x1 kernel of stride 2 and a 3x3 kernel of stride 1 behind a pool of stride 2: no common convolution."""

    def forward(net: Net, x: Tensor) -> Tensor:
        return (net.a(x) + F.max_pool2d(net.b(x), 2, 2)).relu()

    model = Net(forward, a=conv_bn(4, 4, 2, stride=2, padding=0), b=conv_bn(4, 4, 3))
    check_fold(model, images(4, [(12, 12), (8, 14)]), convolutions=2)


def test_strides_whose_maps_agree_by_chance_are_left() -> None:
    """On a 1-pixel-high map strides 1 and 2 write equal sizes; the branches are not one convolution."""
    model = Parallel(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, stride=(2, 1)))
    check_fold(model, images(4, [(1, 8), (1, 5)]), convolutions=2)


def test_branches_that_agree_for_even_sizes_only() -> None:
    """A 3x3 kernel and a 2x2 pool, both of stride 2: equal maps for even sizes (the shortcut of ResNet-D)."""
    shortcut = nn.Sequential(nn.AvgPool2d(2, 2), conv_bn(4, 4, 1))
    model = Parallel(conv_bn(4, 4, 5, stride=2), shortcut)
    check_fold(model, images(4, [(12, 12), (8, 14)]), convolutions=1)


def test_dilation() -> None:
    """Branches of UniRepLKNet: dilated small kernels inside a large one."""
    branches = [conv_bn(6, 6, 7, groups=6)]
    branches += [conv_bn(6, 6, 3, groups=6, dilation=d, padding=d) for d in (1, 2, 3)]
    branches += [conv_bn(6, 6, 2, groups=6, dilation=2, padding=1)]
    check_fold(Parallel(*branches), images(6), convolutions=1)


def test_dilated_branches_of_one_spacing_stay_dilated() -> None:
    model = Parallel(*(conv_bn(4, 4, k, dilation=2, padding=k - 1) for k in (3, 5)), conv_bn(4, 4, 1))
    plain = check_fold(model, images(4), convolutions=1)
    assert plain.conv.dilation == (2, 2)
    assert plain.conv.kernel_size == (5, 5)


@pytest.mark.parametrize("groups", [(1, 1), (4, 4), (8, 8), (2, 4), (8, 4)])
def test_groups_of_branches_compose_exactly_or_stay(groups: tuple[int, int]) -> None:
    model = Parallel(conv_bn(8, 8, 3, groups=groups[0]), conv_bn(8, 8, 1, groups=groups[1]))
    check_fold(model, images(8), convolutions=None)
    if groups[0] <= groups[1]:
        assert check_fold(model, images(8)).conv.groups == groups[0]


def test_channel_multipliers() -> None:
    """Depthwise with two outputs a channel, in two kernel sizes."""
    model = Parallel(*(conv_bn(4, 8, k, groups=4) for k in (3, 1)))
    assert check_fold(model, images(4), convolutions=1).conv.groups == 4


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_other_padding_modes_take_up_the_batch_norm_after_them(mode: str) -> None:
    model = nn.Sequential(*conv_bn(4, 6, 3, padding_mode=mode), nn.ReLU())
    plain = check_fold(model, images(4), convolutions=1)
    assert plain[0].padding_mode == mode


def test_branches_with_another_padding_mode_stay_branches() -> None:
    model = Parallel(conv_bn(4, 4, 3), conv_bn(4, 4, 1), conv_bn(4, 4, 3, padding_mode="reflect"))
    check_fold(model, images(4), convolutions=2)


def test_two_batch_norms_of_one_reflecting_convolution() -> None:
    """USERS: batch norms stay after folding. Two scales of one layer add up to one scale."""

    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.conv(x)
        return (net.one(y) + net.two(y) + y).relu()

    conv = nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")
    model = Net(forward, conv=conv, one=nn.BatchNorm2d(6), two=nn.BatchNorm2d(6))
    check_fold(model, images(4), convolutions=1)


def test_a_pool_without_its_padding_is_left() -> None:
    """The average over fewer pixels at the border is no convolution."""
    pool = nn.AvgPool2d(3, 1, padding=1, count_include_pad=False)
    plain = check_fold(
        Parallel(conv_bn(4, 4, 3), nn.Sequential(*conv_bn(4, 4, 1), pool)), images(4), convolutions=2
    )
    assert plain.fold_report.after.operators["pooling"] == 1


def test_a_pool_with_its_padding_merges() -> None:
    pool = nn.AvgPool2d(3, 1, padding=1)
    plain = check_fold(Parallel(conv_bn(4, 4, 3), pool), images(4), convolutions=1)
    assert "pooling" not in plain.fold_report.after.operators


def test_a_pool_without_its_padding_merges_where_it_has_none() -> None:
    pool = nn.AvgPool2d(3, 1, count_include_pad=False)
    check_fold(Parallel(conv_bn(4, 4, 3, padding=0), pool), images(4), convolutions=1)


def test_a_pool_that_hangs_over_the_end_is_left() -> None:
    pool = nn.AvgPool2d(2, 2, ceil_mode=True)
    model = Parallel(conv_bn(4, 4, 3, stride=2), nn.Sequential(pool, conv_bn(4, 4, 1)))
    check_fold(model, images(4, [(12, 12), (9, 7)]), convolutions=2)


def test_a_pool_with_a_divisor_of_its_own() -> None:
    check_fold(
        Parallel(conv_bn(4, 4, 3), nn.AvgPool2d(3, 1, 1, divisor_override=5)), images(4), convolutions=1
    )


@st.composite
def branch_sets(draw: st.DrawFn) -> tuple[int, list[nn.Module], list[tuple[int, int]]]:
    """Branches whose maps have equal size: kernels, dilation, groups and the place of the padding vary."""
    groups = draw(st.sampled_from([1, 2, 4]))
    stride = draw(st.sampled_from(both_axes(1, 2)))
    margin = draw(st.sampled_from(both_axes(-1, 0, 1)))
    branches = []
    for _ in range(draw(st.integers(2, 4))):
        kernel, dilation, ends = [], [], []
        for axis in range(2):
            k = draw(st.integers(1, 5))
            d = draw(st.integers(1, 2)) if k < 4 else 1
            total = max(0, d * (k - 1) + margin[axis])
            before = draw(st.integers(0, total))
            kernel.append(k + (0 if d * (k - 1) + margin[axis] >= 0 else 1))
            dilation.append(d)
            total = max(0, d * (kernel[-1] - 1) + margin[axis])
            before = min(before, total)
            ends.append((before, total - before))
        pad = nn.ZeroPad2d((*ends[1], *ends[0]))
        own = draw(st.sampled_from([g for g in (1, 2, 4) if g % groups == 0]))
        conv = nn.Conv2d(4, 4, kernel, stride, 0, dilation, own, bias=draw(st.booleans()))
        branches.append(nn.Sequential(pad, conv, nn.BatchNorm2d(4) if draw(st.booleans()) else nn.Dropout()))
    return groups, branches, [(10, 9), (12, 7)]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(branch_sets())
def test_random_branches_are_exact(drawn: tuple[int, list[nn.Module], list[tuple[int, int]]]) -> None:
    _, branches, sizes = drawn
    examples = images(4, sizes)
    model = Parallel(*branches)
    plain = check_fold(model, examples)
    unproved = refold.fold(model, examples[0], prove=False)
    assert unproved.fold_report.after == plain.fold_report.after
