"""The blocks of the papers, written by hand in their training form, fold as the papers say."""

import torch
import torch.nn.functional as F
from checking import Net, Parallel, check_fold, conv_bn, images
from torch import Tensor, nn

ONE_CONVOLUTION = {"convolution": 1, "activation": 1}


def depthwise(channels: int, kernel_size: int, **settings: int) -> nn.Sequential:
    return conv_bn(channels, channels, kernel_size, groups=channels, **settings)


def test_repvgg() -> None:
    """USERS: compilers leave every parallel branch. 3x3, 1x1 and, where the channels are equal, identity."""
    model = nn.Sequential(
        Parallel(conv_bn(3, 8, 3, stride=2), conv_bn(3, 8, 1, stride=2)),
        Parallel(conv_bn(8, 8, 3), conv_bn(8, 8, 1), nn.BatchNorm2d(8)),
        Parallel(conv_bn(8, 8, 3, groups=4), conv_bn(8, 8, 1, groups=4), nn.BatchNorm2d(8)),
    )
    plain = check_fold(model, images(3), convolutions=3)
    assert plain.fold_report.after.operators == {"convolution": 3, "activation": 3}


def test_repvgg_with_a_norm_behind_the_sum() -> None:
    """QARepVGG and RepViT's depthwise block: branches with and without norms, one more norm behind them."""

    def forward(net: Net, x: Tensor) -> Tensor:
        return net.bn(net.conv(x) + net.small(x) + x).relu()

    model = Net(forward, conv=depthwise(6, 3), small=nn.Conv2d(6, 6, 1, groups=6), bn=nn.BatchNorm2d(6))
    plain = check_fold(model, images(6), convolutions=1)
    assert [layer.groups for layer in plain.modules() if isinstance(layer, nn.Conv2d)] == [6]


def test_acnet() -> None:
    """A square, a horizontal and a vertical kernel."""
    check_fold(Parallel(*(conv_bn(4, 6, k) for k in (3, (1, 3), (3, 1)))), images(4), convolutions=1)
    check_fold(
        Parallel(*(conv_bn(4, 6, k, stride=2) for k in (3, (1, 3), (3, 1)))), images(4), convolutions=1
    )


class DiverseBranch(nn.Module):
    """The diverse branch block: 3x3, 1x1, 1x1 before 3x3, 1x1 before an average, all with norms.

    The two in series pad the image before their first kernel, which is what makes them exact.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.origin = conv_bn(in_channels, out_channels, 3, stride=stride)
        self.pointwise = conv_bn(in_channels, out_channels, 1, stride=stride)
        self.series = nn.Sequential(
            nn.ZeroPad2d(1),
            *conv_bn(in_channels, in_channels, 1),
            *conv_bn(in_channels, out_channels, 3, stride=stride, padding=0),
        )
        self.average = nn.Sequential(
            nn.ZeroPad2d(1),
            *conv_bn(in_channels, out_channels, 1),
            nn.AvgPool2d(3, stride),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.origin(x) + self.pointwise(x) + self.series(x) + self.average(x))


def test_the_diverse_branch_block() -> None:
    model = nn.Sequential(DiverseBranch(4, 6), DiverseBranch(6, 6, stride=2))
    plain = check_fold(model, images(4), convolutions=2)
    assert plain.fold_report.after.operators == {"convolution": 2, "activation": 2}


def test_a_series_that_pads_between_its_kernels_keeps_its_own_layers() -> None:
    """The same block as often written: the shift of the first norm would leak into the border."""
    series = nn.Sequential(*conv_bn(4, 4, 1), *conv_bn(4, 4, 3))
    model = Parallel(conv_bn(4, 4, 3), conv_bn(4, 4, 1), series)
    plain = check_fold(model, images(4), convolutions=3)
    assert plain.fold_report.after.operators == {"convolution": 3, "activation": 1, "add": 1}


def test_a_series_with_an_average_inside_its_border() -> None:
    """A 1x1 convolution without bias before a padded average: the border is exact without any shift."""
    series = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.AvgPool2d(3, 1, 1), nn.BatchNorm2d(4))
    check_fold(Parallel(conv_bn(4, 4, 3), series), images(4), convolutions=1)


def test_mobileone() -> None:
    """Four equal depthwise branches, a 1x1 one and a norm; then four pointwise branches and a norm."""
    model = nn.Sequential(
        Parallel(*(depthwise(6, 3) for _ in range(4)), depthwise(6, 1), nn.BatchNorm2d(6)),
        Parallel(*(conv_bn(6, 6, 1) for _ in range(4)), nn.BatchNorm2d(6)),
        Parallel(*(depthwise(6, 3, stride=2) for _ in range(2)), depthwise(6, 1, stride=2)),
    )
    plain = check_fold(model, images(6), convolutions=3)
    assert [layer.groups for layer in plain.modules() if isinstance(layer, nn.Conv2d)] == [6, 1, 6]


class RepGhost(nn.Module):
    """The RepGhost module: a depthwise kernel beside norms of the same value, added before the activation."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.primary = nn.Sequential(*conv_bn(in_channels, channels, 1), nn.ReLU(inplace=True))
        self.fusion_conv = nn.ModuleList([nn.Identity()])
        self.fusion_bn = nn.ModuleList([nn.BatchNorm2d(channels)])
        self.cheap = nn.Sequential(*depthwise(channels, 3))
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.primary(x)
        x2 = self.cheap(x1)
        for conv, bn in zip(self.fusion_conv, self.fusion_bn, strict=True):
            x2 = x2 + bn(conv(x1))
        return self.act(x2)


def test_repghost() -> None:
    """Two modules with a strided depthwise convolution between them and a shortcut of its own around them."""

    def forward(net: Net, x: Tensor) -> Tensor:
        return net.second(net.down(net.first(x))) + net.shortcut(x)

    model = Net(
        forward,
        first=RepGhost(4, 6),
        down=depthwise(6, 3, stride=2),
        second=nn.Sequential(RepGhost(6, 8), *conv_bn(8, 8, 1)),
        shortcut=nn.Sequential(*depthwise(4, 3, stride=2), *conv_bn(4, 8, 1)),
    )
    plain = check_fold(model, images(4), convolutions=8)
    assert plain.fold_report.after.operators == {"convolution": 8, "activation": 4, "add": 1}


class GhostV3(nn.Module):
    """The ghost module of GhostNetV3: both halves with several branches, the second with a 1x1 and a norm too."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.primary = Parallel(
            *(conv_bn(in_channels, channels, 1) for _ in range(3)), nn.BatchNorm2d(channels)
        )
        self.cheap = Parallel(
            *(depthwise(channels, 3) for _ in range(3)), depthwise(channels, 1), nn.BatchNorm2d(channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.primary(x)
        return torch.cat([x1, self.cheap(x1)], dim=1)


class ShortcutGate(nn.Module):
    """The DFC attention of GhostNetV2 and V3: linear layers on a smaller map, whose sigmoid scales the output."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *conv_bn(channels, 2 * channels, 1),
            *conv_bn(2 * channels, 2 * channels, (1, 5), groups=2 * channels),
            *conv_bn(2 * channels, 2 * channels, (5, 1), groups=2 * channels),
        )
        self.ghost = GhostV3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.body(F.avg_pool2d(x, 2, 2)))
        return self.ghost(x) * F.interpolate(gate, size=x.shape[-2:], mode="nearest")


def test_ghostnetv3() -> None:
    """USERS: 54 batch norms stay in the official fold of GhostNetV3."""
    model = nn.Sequential(GhostV3(4, 4), ShortcutGate(8), *conv_bn(16, 4, 1))
    plain = check_fold(model, images(4, [(12, 12), (8, 14)]), convolutions=8)
    assert plain.fold_report.after.operators["concatenation"] == 2


class RepUnit(nn.Module):
    """The RepUnit1 of RepNeXt: parts of the channels through kernels of their own, concatenated, and one norm."""

    def __init__(self, channels: int, kernel_sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.widths = [channels // len(kernel_sizes)] * len(kernel_sizes)
        self.branches = nn.ModuleList(
            nn.Conv2d(w, w, k, padding=k // 2, groups=w, bias=False)
            for w, k in zip(self.widths, kernel_sizes, strict=True)
        )
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        pieces = torch.split(x, self.widths, dim=1)
        return self.norm(torch.cat([branch(pieces[i]) for i, branch in enumerate(self.branches)], dim=1))


def test_repunit_of_equal_kernels() -> None:
    plain = check_fold(nn.Sequential(nn.ReLU(), RepUnit(8, (5, 5)), nn.ReLU()), images(8), convolutions=1)
    assert type(plain[1]) is nn.Conv2d
    assert plain[1].groups == 8


def test_repunit_of_different_kernels_never_costs_more() -> None:
    """3, 5 and 7 in one 7x7 kernel would compute more products: the norm goes into each branch instead."""
    plain = check_fold(nn.Sequential(nn.ReLU(), RepUnit(9, (3, 5, 7)), nn.ReLU()), images(9), convolutions=3)
    assert plain.fold_report.after.macs == plain.fold_report.before.macs


def test_repunit_with_a_shortcut_around_it() -> None:
    """RepUnit3 and the token mixer's shortcut: a large kernel, two thin ones and the identity."""
    unit = Parallel(
        depthwise(6, 7), conv_bn(6, 6, (1, 5), groups=6), conv_bn(6, 6, (3, 1), groups=6), nn.Identity()
    )
    plain = check_fold(unit, images(6), convolutions=1)
    assert plain.conv.kernel_size == (7, 7)


def test_large_kernels() -> None:
    """RepLKNet and SLaK: a large depthwise kernel with small and thin ones beside it."""
    model = Parallel(depthwise(4, 13), depthwise(4, 5), conv_bn(4, 4, (13, 3), groups=4), nn.Identity())
    plain = check_fold(model, images(4, [(16, 16), (14, 19)]), convolutions=1)
    assert plain.conv.kernel_size == (13, 13)


def test_repmixer() -> None:
    """FastViT's token mixer: x + scale * (mixer(x) - norm(x)), one depthwise convolution altogether."""

    def forward(net: Net, x: Tensor) -> Tensor:
        return torch.relu(x + net.scale * (net.mixer(x) - net.norm(x)))

    mixer = Net(
        lambda net, x: net.a(x) + net.b(x) + net.c(x),
        a=depthwise(6, 3),
        b=depthwise(6, 1),
        c=nn.BatchNorm2d(6),
    )
    model = Net(forward, mixer=mixer, norm=nn.BatchNorm2d(6), scale=nn.Parameter(torch.randn(6, 1, 1)))
    plain = check_fold(model, images(6), convolutions=1)
    assert plain.fold_report.after.operators == ONE_CONVOLUTION


class EdgeBranch(nn.Module):
    """A branch of the edge-oriented block: a 1x1 convolution, then a fixed Sobel mask scaled for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)
        self.scale = nn.Parameter(torch.randn(channels, 1, 1, 1))
        self.bias = nn.Parameter(torch.randn(channels))
        mask = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
        self.register_buffer("mask", mask.expand(channels, 1, 3, 3).clone())

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(F.pad(x, (1, 1, 1, 1)))
        return F.conv2d(y, self.scale * self.mask, self.bias, groups=self.conv.out_channels)


def test_fixed_masks_with_learned_scales() -> None:
    model = Parallel(conv_bn(4, 4, 3), EdgeBranch(4), nn.Conv2d(4, 4, 1), act=nn.PReLU(4))
    plain = check_fold(model, images(4), batch_norms=0)
    assert plain.fold_report.after.macs < plain.fold_report.before.macs


def test_an_over_parametrised_linear_stack() -> None:
    """ExpandNets and OREPA: a wide chain of linear convolutions, trained as one and run as one."""
    stack = nn.Sequential(
        nn.Conv2d(4, 16, 1, bias=False),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.Conv2d(16, 6, 1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
    )
    plain = check_fold(stack, images(4), convolutions=1)
    assert plain.fold_report.after.parameters == 6 * 4 * 9 + 6
