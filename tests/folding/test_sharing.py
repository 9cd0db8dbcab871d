"""Values with several readers, modules called several times, tied weights and hooks."""

import pytest
import torch
from checking import (
    LARGEST,
    Deciding,
    Net,
    Parallel,
    call,
    check_fold,
    conv_bn,
    distance,
    images,
    normal,
    trained,
)
from torch import Tensor, nn

import refold


def test_a_value_with_two_readers_is_computed_once() -> None:
    """The convolution is read by a norm and by the output: the norm cannot move into it."""

    def forward(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        y = net.conv(x)
        return net.bn(y).relu(), y.sigmoid()

    model = Net(forward, conv=nn.Conv2d(4, 4, 3, padding=1), bn=nn.BatchNorm2d(4))
    check_fold(model, images(4), convolutions=1, batch_norms=1, left=["used by 2 operators"])


def test_a_norm_read_twice_folds_into_the_convolution_before_it() -> None:
    def forward(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        y = net.body(x)
        return y.relu(), y.sigmoid()

    check_fold(Net(forward, body=conv_bn(4, 4)), images(4), convolutions=1)


def test_a_value_added_to_itself() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.body(x)
        return (y + y + x).relu()

    plain = check_fold(Net(forward, body=conv_bn(4, 4)), images(4), convolutions=1)
    assert plain.fold_report.after.operators == {"convolution": 1, "activation": 1}


def test_a_residual_over_an_activation_stays() -> None:
    """The shortcut goes around something non-linear: both of its ends are real values."""

    def forward(net: Net, x: Tensor) -> Tensor:
        return (x + net.second(net.first(x).relu())).relu()

    plain = check_fold(Net(forward, first=conv_bn(4, 8), second=conv_bn(8, 4)), images(4), convolutions=2)
    assert plain.fold_report.after.operators["add"] == 1


class TwoInputs(nn.Module):
    """Detection heads are like this: the same layers run on several feature maps."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(x), self.head(y)


def test_a_block_called_on_two_inputs_folds_once() -> None:
    """USERS: a shared convolution is fused wrongly elsewhere."""
    examples = [(normal(2, 4, 8, 9), normal(1, 4, 5, 4)), (normal(1, 4, 3, 3), normal(1, 4, 6, 7))]
    plain = check_fold(TwoInputs(Parallel(conv_bn(4, 4, 3), conv_bn(4, 4, 1))), examples, convolutions=2)
    assert plain.fold_report.before.convolutions == 4
    assert plain.fold_report.after.parameters == 4 * 4 * 9 + 4


def test_a_chain_called_on_two_inputs_folds_once() -> None:
    examples = [(normal(2, 4, 8, 9), normal(1, 4, 5, 4)), (normal(1, 4, 3, 3), normal(1, 4, 6, 7))]
    check_fold(TwoInputs(nn.Sequential(*conv_bn(4, 4), nn.ReLU())), examples, convolutions=2)


def test_a_block_called_in_a_loop() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        for _ in range(3):
            x = net.block(x)
        return x

    check_fold(Net(forward, block=Parallel(conv_bn(4, 4, 3), conv_bn(4, 4, 1))), images(4), convolutions=3)


def test_a_block_shared_by_calls_in_different_surroundings() -> None:
    """One call is scaled, the other is not: what is inside the block folds, what is around it stays around it."""

    def forward(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        return net.bn(net.block(x)).relu(), net.block(2.0 * x).sigmoid()

    block = Parallel(conv_bn(4, 4, 3), conv_bn(4, 4, 1), act=nn.Identity())
    for shared in (block, conv_bn(4, 4, 3)):
        model = Net(forward, block=shared, bn=nn.BatchNorm2d(4))
        check_fold(model, images(4), convolutions=2, batch_norms=1, left=["not next to a convolution"])


def test_a_convolution_with_norms_of_its_own_for_each_input_is_left() -> None:
    """USERS: a shared convolution is fused wrongly (pytorch #104593). Folding either norm would change the other."""

    def forward(net: Net, x: Tensor) -> Tensor:
        return net.one(net.conv(x)).relu() + net.two(net.conv(x.flip(-1))).relu()

    model = Net(forward, conv=nn.Conv2d(4, 4, 3), one=nn.BatchNorm2d(4), two=nn.BatchNorm2d(4))
    check_fold(model, images(4), convolutions=2, batch_norms=2, left=["conv is called 2 times"])


def test_a_norm_shared_by_two_convolutions_is_exact() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.bn(net.one(x)).relu() + net.bn(net.two(x)).relu()

    model = Net(forward, bn=nn.BatchNorm2d(4), one=nn.Conv2d(4, 4, 3), two=nn.Conv2d(4, 4, 3))
    check_fold(model, images(4), convolutions=2, batch_norms=None, left=["is called 2 times"])


def test_a_convolution_used_with_and_without_its_norm_is_left() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.bn(net.conv(x)).relu() + net.conv(x.flip(-1)).relu()

    model = Net(forward, conv=nn.Conv2d(4, 4, 3), bn=nn.BatchNorm2d(4))
    check_fold(model, images(4), convolutions=2, batch_norms=1, left=["is called 2 times"])


def test_a_convolution_applied_to_its_own_output() -> None:
    model = Net(
        lambda net, x: net.bn(net.conv(net.conv(x))).relu(), conv=nn.Conv2d(4, 4, 1), bn=nn.BatchNorm2d(4)
    )
    check_fold(model, images(4), batch_norms=None, left=["is called 2 times"])


def test_a_block_shared_by_two_parents_under_two_names() -> None:
    """The same module is registered twice and nested in another: edits must reach every name."""
    shared = Parallel(conv_bn(4, 4, 3), conv_bn(4, 4, 1))
    model = nn.Sequential(shared, nn.Sequential(nn.Identity(), shared), nn.Sigmoid())
    plain = check_fold(model, images(4), convolutions=2)
    assert plain[0] is plain[1][1]


def test_a_block_shared_with_code_that_looks_at_values() -> None:
    """One user of the block decides by values, the other does not: inside of the block both see the same chain."""
    shared = conv_bn(4, 4)
    model = nn.Sequential(Deciding(shared), nn.ReLU(), shared, nn.ReLU())
    check_fold(model, images(4), convolutions=2, left=["looks at the values"])


def test_a_layer_shared_with_code_that_looks_at_values() -> None:
    """A bare convolution, called by code that decides by values, and elsewhere with a norm behind it."""
    conv = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(Deciding(conv), nn.ReLU(), conv, nn.BatchNorm2d(4))
    check_fold(
        model, images(4), convolutions=2, batch_norms=None, left=["looks at the values", "is called 2 times"]
    )
    scaled = nn.Sequential(Deciding(conv), conv, Net(lambda net, x: x.mul_(0.5)))
    check_fold(scaled, images(4), convolutions=2, left=["looks at the values"])


def test_a_block_shared_by_two_parents_that_look_at_values() -> None:
    shared = Parallel(conv_bn(4, 4, 3), conv_bn(4, 4, 1))
    model = nn.Sequential(Deciding(shared), nn.Sigmoid(), Deciding(shared))
    check_fold(model, images(4), convolutions=2, left=["looks at the values"])


class Switched(nn.Module):
    """A block with branches and a flag."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_bn(4, 4, 3), conv_bn(4, 4, 1)

    def forward(self, x: Tensor, act: bool = False) -> Tensor:
        y = self.a(x) + self.b(x)
        return y.relu() if act else y.sigmoid()


class DecidingTwice(nn.Module):
    """Calls a block with and without its flag from code that decides by values."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Switched()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(x), True) if float(x.abs().sum()) >= 0 else x


@pytest.mark.parametrize(
    "model",
    [Net(lambda net, x: net.block(net.block(x), True), block=Switched()), DecidingTwice()],
    ids=["plain", "deciding"],
)
def test_a_block_called_with_two_values_of_a_flag(model: nn.Module) -> None:
    """The two calls run different code; a block rewritten for one must not stand for the other."""
    model = trained(model.double())
    plain = refold.fold(model, images(4)[0])
    for x in images(4):
        assert distance(call(model, x), call(plain, x)) <= LARGEST


def test_tied_weights_fold_each_with_its_own_norm() -> None:
    """Two convolutions with one weight: each becomes a layer of its own."""
    model = nn.Sequential(*conv_bn(4, 4), nn.ReLU(), *conv_bn(4, 4), nn.ReLU())
    model[3].weight = model[0].weight
    plain = check_fold(model, images(4), convolutions=2)
    assert not torch.equal(plain[0].weight, plain[3].weight)


def test_tied_weights_of_layers_that_stay_are_still_tied() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), *conv_bn(4, 4))
    model[2].weight = model[0].weight
    plain = check_fold(model, images(4), convolutions=3)
    assert plain[0].weight is plain[2].weight
    assert plain[0].weight is not model[0].weight


def test_a_weight_read_by_other_code_too_is_left() -> None:
    """A penalty computed from the weight in the forward pass: the weight must stay what it was."""

    def forward(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        return net.bn(net.conv(x)).relu(), net.conv.weight.square().sum()

    model = Net(forward, conv=nn.Conv2d(4, 4, 3), bn=nn.BatchNorm2d(4))
    check_fold(model, images(4), batch_norms=1, left=["the weights of conv are read by other code too"])


def test_forward_hooks_fire_after_folding_with_the_same_values() -> None:
    """timm's feature hooks: what a hook sees on a block, input and output, does not change."""
    seen: list[Tensor] = []
    model = nn.Sequential(
        nn.Conv2d(4, 4, 1), nn.ReLU(), Parallel(conv_bn(4, 4, 3), conv_bn(4, 4, 1)), nn.Sigmoid()
    )
    model[2].register_forward_hook(lambda _, given, result: seen.extend([*given, result]))
    plain = check_fold(model, images(4), convolutions=2, left=["hooks"])
    (x, *_) = images(4)
    seen.clear()
    call(model, x)
    call(plain, x)
    assert len(seen) == 4
    assert distance(seen[:2], seen[2:]) <= LARGEST


def test_a_pre_hook_and_a_hook_that_change_values() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), Parallel(conv_bn(4, 4, 3), conv_bn(4, 4, 1)), *conv_bn(4, 4, 1))
    model[1].register_forward_pre_hook(lambda _, given: (given[0] * 2 + 1,))
    model[1].register_forward_hook(lambda _, given, result: result.square())
    check_fold(model, images(4), convolutions=3, left=["hooks"])


def test_hooks_on_the_model_itself() -> None:
    """A root that reduces to one layer keeps its place, its class and its hooks."""
    model = nn.Sequential(*conv_bn(4, 4, 1), *conv_bn(4, 4, 1))
    model.register_forward_hook(lambda _, given, result: result.relu())
    check_fold(model, images(4), convolutions=1)
    branches = Net(lambda net, x: net.a(x) + net.b(x), a=conv_bn(4, 4, 3), b=conv_bn(4, 4, 1))
    branches.register_forward_pre_hook(lambda _, given: (given[0].sigmoid(),))
    check_fold(branches, images(4), convolutions=1)


def test_a_hook_on_a_convolution() -> None:
    """What the hook sees would change if the norm moved in, so it stays, and the reason says so."""
    model = nn.Sequential(*conv_bn(4, 4), nn.ReLU())
    model[0].register_forward_hook(lambda _, given, result: result.sigmoid())
    plain = check_fold(model, images(4), batch_norms=None, left=["hooks"])
    assert plain.fold_report.after.batch_norms == 1


def test_a_hook_on_a_batch_norm() -> None:
    model = nn.Sequential(*conv_bn(4, 4), nn.ReLU())
    model[1].register_forward_pre_hook(lambda _, given: (given[0].sigmoid(),))
    check_fold(model, images(4), batch_norms=1, left=["hooks"])
