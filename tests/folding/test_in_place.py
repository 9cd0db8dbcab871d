"""Tensors that are changed in place: whoever reads them afterwards reads the change, folded or not."""

import torch
from checking import Net, Parallel, check_fold, conv_bn, images, trained
from torch import Tensor, nn

import refold


def test_activations_in_place() -> None:
    """ReLU(inplace=True) after every addition, as most networks have it."""

    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.act(net.stem(x))
        y = net.a(x)
        y += net.b(x)
        y += x
        return net.act(y)

    model = Net(
        forward, stem=conv_bn(4, 4, 1), a=conv_bn(4, 4, 3), b=conv_bn(4, 4, 1), act=nn.ReLU(inplace=True)
    )
    plain = check_fold(model, images(4), convolutions=2)
    assert plain.fold_report.after.operators == {"convolution": 2, "activation": 2}


def test_an_activation_in_place_at_the_start_of_a_network() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), Parallel(conv_bn(4, 4, 3), conv_bn(4, 4, 1)))
    check_fold(model, images(4), convolutions=1)


def test_a_residual_that_an_activation_has_changed_in_place() -> None:
    """The shortcut reads a value after it was rectified in place: the sum is linear in the rectified value only."""

    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.a(x)
        z = torch.relu_(y)
        return (net.b(z) + y).sigmoid()

    model = Net(forward, a=conv_bn(4, 4, 3), b=conv_bn(4, 4, 1))
    plain = check_fold(model, images(4), convolutions=2)
    assert "add" not in plain.fold_report.after.operators


def test_a_value_read_before_and_after_a_change_in_place() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.a(x)
        before = net.b(y)
        y.mul_(2.0).add_(1.0)
        return (before + net.b(y) + y).sigmoid()

    check_fold(
        Net(forward, a=conv_bn(4, 4, 3), b=nn.Conv2d(4, 4, 1)),
        images(4),
        convolutions=1,
    )


def test_a_branch_added_in_place_to_its_own_input() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.stem(x).relu()
        y += net.branch(y)
        return y.sigmoid()

    model = Net(forward, stem=conv_bn(4, 4, 1), branch=conv_bn(4, 4, 3))
    check_fold(model, images(4), convolutions=2)


def test_a_view_that_is_changed_in_place() -> None:
    """Two channels of a map are overwritten through a view, and the map is read afterwards."""

    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.a(x)
        y[:, :2].mul_(3.0)
        return (y + net.b(x)).relu()

    model = Net(forward, a=conv_bn(4, 4, 3), b=conv_bn(4, 4, 1))
    check_fold(model, images(4), batch_norms=None, left=["changed in place"])


def test_a_value_changed_in_place_by_its_only_reader() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = x.relu()
        y *= 2.0
        y.add_(net.shift)
        return net.conv(y).relu_()

    model = Net(forward, shift=nn.Parameter(torch.randn(1, 4, 1, 1)), conv=nn.Conv2d(4, 4, 3))
    plain = check_fold(model, images(4), convolutions=1)
    assert plain.fold_report.after.operators == {"activation": 2, "convolution": 1}


class InPlaceStart(nn.Module):
    """Scales its own input in place, which whoever passed it can see."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.mul_(2.0)).relu()


class ReadsAfterwards(nn.Module):
    """Reads a value after a child has changed it in place, in code that decides by values."""

    def __init__(self) -> None:
        super().__init__()
        self.child = InPlaceStart()

    def forward(self, x: Tensor) -> Tensor:
        x = x.sigmoid()
        return self.child(x) + x if float(x.sum()) >= 0 else x


def test_an_input_changed_in_place_by_a_child_of_deciding_code() -> None:
    check_fold(ReadsAfterwards(), images(4), left=["looks at the values"])


def test_the_callers_tensor_is_not_changed_by_folding() -> None:
    model = trained(nn.Sequential(nn.ReLU(inplace=True), *conv_bn(4, 4))).double()
    (x, *_) = images(4)
    before = x.clone()
    plain = refold.fold(model, x)
    refold.verify(model, plain, x)
    assert torch.equal(x, before)
