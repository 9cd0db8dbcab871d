"""Every kind of linear layer, and what computes its weights, folds into the layer beside it."""

import pytest
import torch
import torch.nn.functional as F
from checking import Net, Parallel, check_fold, conv_bn, images, normal
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import parametrize as parametrize_module
from torchvision.ops import FrozenBatchNorm2d

ONE_CONVOLUTION = {"convolution": 1, "activation": 1}


def test_a_linear_layer_and_a_norm() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3), nn.BatchNorm1d(3))
    plain = check_fold(model, images(4, [(), ()]))
    assert plain.fold_report.after.operators == {"linear": 2, "activation": 1}


def test_parallel_linear_layers() -> None:
    """Branches over tokens, `[batch, length, channels]`, and over `[batch, height, width, channels]`."""
    model = Parallel(nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.Identity())
    for shape in ((2, 5, 6), (2, 3, 4, 6), (7, 6)):
        plain = check_fold(model, [normal(*shape)])
        assert plain.fold_report.after.operators == {"linear": 1, "activation": 1}


def test_a_norm_behind_a_classifier_keeps_the_flattened_map_apart() -> None:
    """A norm before flattening is not next to the linear layer that follows."""
    model = nn.Sequential(*conv_bn(4, 4), nn.Flatten(), nn.Linear(4 * 6 * 6, 3), nn.BatchNorm1d(3))
    plain = check_fold(model, images(4, [(6, 6)]), convolutions=1)
    assert plain.fold_report.after.operators == {"convolution": 1, "linear": 1}


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("settings", [{}, {"stride": 2, "output_padding": 1}, {"dilation": 2, "padding": 2}])
def test_a_transposed_convolution_and_a_norm(groups: int, settings: dict[str, int]) -> None:
    conv = nn.ConvTranspose2d(4, 8, 3, groups=groups, **settings)
    plain = check_fold(nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU()), images(4), convolutions=1)
    assert plain.fold_report.after.operators == ONE_CONVOLUTION
    assert type(plain[0]) is nn.ConvTranspose2d


def test_transposed_convolutions_of_other_dimensions() -> None:
    one = nn.Sequential(nn.ConvTranspose1d(4, 6, 4, 2, 1, bias=False), nn.BatchNorm1d(6), nn.ReLU())
    check_fold(one, images(4, [(8,), (5,)]), convolutions=1)
    three = nn.Sequential(nn.ConvTranspose3d(4, 6, 2, 2, groups=2), nn.BatchNorm3d(6), nn.ReLU())
    check_fold(three, images(4, [(3, 4, 5)]), convolutions=1)


def test_functions_with_weights_of_the_module() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        bn = net.bn
        y = F.conv2d(x, net.weight, None, stride=1, padding=1, groups=2)
        y = F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.1, 1e-3)
        y = y + F.conv2d(x, weight=net.small, bias=net.bias, groups=2)
        return F.relu(
            torch.batch_norm(y, None, None, bn.running_mean, bn.running_var, False, 0.1, 1e-3, False)
        )

    model = Net(
        forward,
        weight=nn.Parameter(torch.randn(4, 2, 3, 3)),
        small=nn.Parameter(torch.randn(4, 2, 1, 1)),
        bias=nn.Parameter(torch.randn(4)),
        bn=nn.BatchNorm2d(4),
    )
    plain = check_fold(model, images(4), convolutions=1)
    assert plain.fold_report.after.operators == ONE_CONVOLUTION
    assert set(plain.state_dict()) == {"conv.weight", "conv.bias"}


def test_a_functional_linear_layer() -> None:
    model = Net(lambda net, x: net.bn(F.linear(x, net.weight)).relu(), weight=nn.Parameter(torch.randn(5, 4)))
    model.bn = nn.BatchNorm1d(5)
    check_fold(model, images(4, [()]))


class StandardisedConv2d(nn.Conv2d):
    """Weight standardisation written with a batch norm over the weights, as timm and BiT write it."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-6).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class CentredConv2d(nn.Conv2d):
    """Weight standardisation written out."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        weight = weight / (weight.std(dim=(1, 2, 3), keepdim=True) + 1e-5)
        return self._conv_forward(x, weight, self.bias)


@pytest.mark.parametrize("kind", [StandardisedConv2d, CentredConv2d])
def test_weight_standardisation(kind: type[nn.Conv2d]) -> None:
    model = Parallel(
        nn.Sequential(kind(4, 4, 3, padding=1), nn.BatchNorm2d(4)),
        nn.Sequential(kind(4, 4, 1), nn.BatchNorm2d(4)),
    )
    plain = check_fold(model, images(4), convolutions=1)
    assert plain.fold_report.after.operators == ONE_CONVOLUTION


def test_a_frozen_batch_norm() -> None:
    """torchvision's detection networks compute it from buffers, operator by operator."""

    def branch(kernel_size: int) -> nn.Module:
        conv = nn.Conv2d(4, 4, kernel_size, padding=kernel_size // 2, bias=False)
        return nn.Sequential(conv, FrozenBatchNorm2d(4, eps=1e-3))

    plain = check_fold(Parallel(branch(3), branch(1)), images(4), convolutions=1)
    assert plain.fold_report.after.operators == ONE_CONVOLUTION


class Symmetric(nn.Module):
    """A parametrization of a user: kernels equal to their mirror image."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight + weight.flip(-1)


@pytest.mark.parametrize("kind", ["weight norm", "spectral norm", "own"])
def test_parametrized_layers(kind: str) -> None:
    """The weight that a parametrization computes is folded, and nothing computes it any more."""
    conv = nn.Conv2d(4, 6, 3)
    if kind == "own":
        parametrize_module.register_parametrization(conv, "weight", Symmetric())
    else:
        (parametrizations.weight_norm if kind == "weight norm" else parametrizations.spectral_norm)(conv)
    plain = check_fold(nn.Sequential(conv, nn.BatchNorm2d(6), nn.ReLU()), images(4), convolutions=1)
    assert plain.fold_report.after.operators == ONE_CONVOLUTION
    assert type(plain[0]) is nn.Conv2d
    assert parametrize_module.is_parametrized(conv)


@pytest.mark.parametrize("kind", ["weight norm", "spectral norm", "pruned"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_computed_by_hooks_are_left(kind: str) -> None:
    """The older forms compute the weight in a hook before each call."""
    conv = nn.Conv2d(4, 6, 3)
    if kind == "pruned":
        prune.l1_unstructured(conv, "weight", 0.5)
    else:
        (torch.nn.utils.weight_norm if kind == "weight norm" else torch.nn.utils.spectral_norm)(conv)
    model = nn.Sequential(conv, nn.BatchNorm2d(6), nn.ReLU(), *conv_bn(6, 4))
    check_fold(model, images(4), convolutions=2, batch_norms=1, left=["hooks"])


def test_zero_padding_layers_and_functions_merge_with_the_convolution() -> None:
    for pad in (nn.ZeroPad2d((1, 1, 2, 2)), nn.ConstantPad2d((2, 2, 0, 0), 0.0)):
        plain = check_fold(nn.Sequential(pad, *conv_bn(4, 4, 3, padding=0), nn.ReLU()), images(4))
        assert plain.fold_report.after.operators == ONE_CONVOLUTION
    function = Net(lambda net, x: net.body(F.pad(x, [1, 1, 1, 1])).relu(), body=conv_bn(4, 4, 3, padding=0))
    assert check_fold(function, images(4)).fold_report.after.operators == ONE_CONVOLUTION


def test_unequal_padding_becomes_one_layer_of_padding() -> None:
    """Padding that differs at the two ends has no place in torch's convolution."""
    model = Net(
        lambda net, x: (net.a(F.pad(x, (0, 1, 0, 1))) + net.b(F.pad(x, (0, 1, 0, 1)))).relu(),
        a=conv_bn(4, 4, 2, padding=0),
        b=conv_bn(4, 4, 2, padding=0),
    )
    plain = check_fold(model, images(4), convolutions=1)
    assert plain.fold_report.after.operators == {"convolution": 1, "activation": 1, "padding": 1}


def test_pools_as_functions() -> None:
    model = Net(
        lambda net, x: (
            net.a(x) + F.avg_pool2d(net.b(x), 3, 1, padding=1) + F.avg_pool2d(x, (1, 3), 1, (0, 1))
        ).relu(),
        a=conv_bn(4, 4, 3),
        b=nn.Conv2d(4, 4, 1, bias=False),
    )
    plain = check_fold(model, images(4), convolutions=1)
    assert plain.fold_report.after.operators == ONE_CONVOLUTION


def test_max_pools_and_other_operators_are_opaque() -> None:
    """Whatever is not known to be linear stays where it stands."""
    model = Net(
        lambda net, x: torch.stack([net.a(x), F.max_pool2d(net.b(x), 3, 1, 1), net.b(x).flip(2).abs()]).sum(
            0
        ),
        a=conv_bn(4, 4, 3),
        b=conv_bn(4, 4, 3),
    )
    check_fold(model, images(4), convolutions=3)
