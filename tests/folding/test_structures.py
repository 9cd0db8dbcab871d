"""Models of every build: containers, several inputs and outputs, code that decides by values, odd modules inside."""

from typing import Any, NamedTuple

import pytest
import timm
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
from timm.layers import BatchNormAct2d, DropPath
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

import refold
from refold.errors import InputError

LOOKED_AT = "its code looks at the values"


def branches(in_channels: int = 4, out_channels: int = 4) -> Parallel:
    return Parallel(conv_bn(in_channels, out_channels, 3), conv_bn(in_channels, out_channels, 1))


def test_a_folded_block_inside_a_bigger_model() -> None:
    """USERS: blocks cannot be put into one's own net. A plain block is an ordinary module of another one."""
    block: Any = refold.fold(trained(branches().double()), images(4)[0])
    bigger = nn.Sequential(nn.Conv2d(3, 4, 3), block, branches(), nn.Sigmoid())
    plain = check_fold(bigger, images(3), convolutions=3)
    assert "1.fold_report" not in plain.state_dict()


def test_a_folded_part_is_put_back_into_the_model_it_came_from() -> None:
    model = trained(nn.Sequential(branches(), branches()).double())
    (x, *_) = images(4)
    expected = call(model, x)
    model[0] = refold.fold(model[0], x)
    assert distance(expected, call(model, x)) <= LARGEST
    check_fold(model, images(4), convolutions=2)


class Containers(nn.Module):
    """Blocks in lists and dictionaries, one of them inside the other."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.ModuleList([branches(), branches()]), nn.ModuleList([branches()])])
        self.heads = nn.ModuleDict(
            {"boxes": conv_bn(4, 2, 1), "scores": nn.Sequential(branches(), conv_bn(4, 3, 1))}
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return {name: head(x) for name, head in self.heads.items()}


def test_lists_and_dictionaries_of_modules() -> None:
    plain = check_fold(Containers(), images(4), convolutions=6)
    assert isinstance(plain.stages[0], nn.ModuleList)
    assert list(plain.heads) == ["boxes", "scores"]
    assert list(call(plain, images(4)[0])) == ["boxes", "scores"]


def test_lists_and_dictionaries_of_modules_in_deciding_code() -> None:
    check_fold(Deciding(Deciding(Containers())), images(4), convolutions=6, left=[LOOKED_AT])


class Chooses(nn.Module):
    """Data-dependent control flow around blocks, some of which do not run on the example."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(4, 4, 1)
        self.often, self.never = branches(), branches()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if float(x.abs().max()) > 1e6:
            return self.never(x)
        for _ in range(int(x.abs().mean() > 0) + 1):
            x = self.often(x)
        return x


def test_the_children_of_data_dependent_code_fold() -> None:
    """USERS: models that do not trace as a whole. Each part that does is folded, the rest named with the reason."""
    plain = check_fold(Chooses(), images(4), convolutions=3, left=[LOOKED_AT, "does not run"])
    assert {"the whole model", "never.branches.0.1", "never.branches.1.1"} == {
        n for n, _ in plain.fold_report.left
    }


def test_a_part_that_does_not_run_on_the_example_still_works() -> None:
    model = trained(Chooses().double())
    large = images(4)[1] * 1e9
    plain = refold.fold(model, images(4)[0])
    assert distance(call(model, large), call(plain, large)) <= LARGEST


def test_deciding_layers_inside_a_network() -> None:
    model = nn.Sequential(
        branches(), Deciding(branches()), branches(), Deciding(nn.Sigmoid()), *conv_bn(4, 4)
    )
    check_fold(model, images(4), convolutions=4, left=[LOOKED_AT])


def test_code_that_asks_for_the_size_of_the_image() -> None:
    """Sizes may be used, also in branches of the code, as long as the result is right for other sizes."""

    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.block(x)
        if x.shape[-1] > 13:
            y = y * 2
        return nn.functional.adaptive_avg_pool2d(y, (x.shape[-2] // 2, x.size(3) // 2))

    check_fold(Net(forward, block=branches()), images(4), convolutions=1)
    check_fold(
        Net(lambda net, x: net.block(x).view(x.size(0), -1, x.shape[2] * x.shape[3]), block=branches()),
        images(4),
    )


class AsksForType(nn.Module):
    """Runs different layers for a tensor and for a list of them, as torchvision's DenseNet does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = branches(), branches()

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        if isinstance(x, Tensor):
            return self.a(x) + x
        return self.b(torch.cat(x, 1))


def test_a_forward_that_asks_for_the_type_of_its_input() -> None:
    plain = check_fold(AsksForType(), images(4), left=["does not run"])
    assert plain.fold_report.after.convolutions == 1
    pairs = [[x[:, :2], x[:, 2:]] for x in images(4)]
    check_fold(AsksForType(), pairs, convolutions=1, left=["does not run"])

    def forward(net: Net, x: Tensor) -> Tensor:
        return net.a(x) + x if isinstance(x, Tensor) else net.b(x) - x

    check_fold(Net(forward, a=branches(), b=branches()), images(4), left=["does not run"])


class OwnIdentity(nn.Module):
    """Anybody's placeholder."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_modules_that_hand_their_input_on() -> None:
    """An identity of a user's own class, alone, inside a branch and around one."""
    check_fold(Parallel(conv_bn(4, 4, 3), OwnIdentity()), images(4), convolutions=1)
    nested = nn.Sequential(OwnIdentity(), conv_bn(4, 4, 1), OwnIdentity())
    check_fold(
        nn.Sequential(Parallel(conv_bn(4, 4, 3), nested), OwnIdentity(), *conv_bn(4, 4)),
        images(4),
        convolutions=2,
    )

    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.skip(net.skip(x))
        return (net.a(y) + net.b(x) + net.skip(y)).relu()

    model = Net(forward, a=conv_bn(4, 4, 3), b=conv_bn(4, 4, 1), skip=OwnIdentity())
    check_fold(model, images(4), convolutions=1)


def test_empty_sequences_in_several_blocks() -> None:
    """Each block, when it is rewritten, loses modules that ran no operator; the others are rewritten all the same."""
    blocks = [Parallel(nn.Sequential(*conv_bn(4, 4), nn.Sequential()), conv_bn(4, 4, 1)) for _ in range(3)]
    check_fold(nn.Sequential(*blocks), images(4), convolutions=3)


@pytest.mark.parametrize("drop", [DropPath(0.2), StochasticDepth(0.2, "row")], ids=["timm", "torchvision"])
def test_stochastic_depth(drop: nn.Module) -> None:
    """It does nothing in evaluation mode, on either side of a sum."""

    def forward(net: Net, x: Tensor) -> Tensor:
        y = (x + net.drop(net.a(x)) + net.drop(net.b(x))).relu()
        return y + net.drop(net.c(y).relu())

    model = Net(forward, a=conv_bn(4, 4, 3), b=conv_bn(4, 4, 1), c=conv_bn(4, 4), drop=drop)
    check_fold(model, images(4), convolutions=2)


class SeveralInputs(nn.Module):
    """A model with two images, an optional mask, and its parameters given by name inside."""

    def __init__(self) -> None:
        super().__init__()
        self.left_block, self.right_block = branches(), branches(3, 4)

    def forward(self, left: Tensor, right: Tensor, mask: Tensor | None = None, scale: float = 2.0) -> Tensor:
        y = self.left_block(x=left) + scale * self.right_block(right)
        return y if mask is None else y * mask


@pytest.mark.parametrize("masked", [False, True])
def test_several_inputs(masked: bool) -> None:
    examples = []
    for size in ((8, 9), (5, 12)):
        pair = (normal(2, 4, *size), normal(2, 3, *size, seed=1))
        examples.append((*pair, normal(2, 1, *size, seed=2)) if masked else pair)
    check_fold(SeveralInputs(), examples, convolutions=2)


def test_an_optional_argument_is_not_ignored() -> None:
    """What was not in the example either works or is refused, but never silently dropped."""
    for wrap in (nn.Identity(), Deciding(nn.Identity())):
        model = trained(Optional(wrap).double())
        (x, *_) = images(4)
        plain: Any = refold.fold(model, x)
        assert plain.fold_report.after.batch_norms == 0
        assert distance(call(model, x), call(plain, x)) <= LARGEST
        assert distance(call(model, (x, False)), call(plain, (x, False))) <= LARGEST
        try:
            found = call(plain, (x, True))
        except InputError as error:
            refused = str(error)
        else:
            refused = "act=False" if distance(call(model, (x, True)), found) <= LARGEST else "ignored"
        assert "act=False" in refused
        assert distance(call(model, (x, True)), call(refold.fold(model, (x, True)), (x, True))) <= LARGEST


class Optional(nn.Module):
    """A root with branches and a flag."""

    def __init__(self, wrap: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.wrap = conv_bn(4, 4, 3), conv_bn(4, 4, 1), wrap

    def forward(self, x: Tensor, act: bool = False) -> Tensor:
        y = self.wrap(self.a(x) + self.b(x))
        return y.relu() if act else y.sigmoid()


class Maps(NamedTuple):
    """What a backbone returns."""

    fine: Tensor
    coarse: Tensor


class Structured(nn.Module):
    """Takes a dictionary or a list and returns a nested structure."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = branches(), branches()

    def forward(self, batch: dict[str, Any]) -> Any:
        fine = self.first(batch["image"])
        coarse = self.second(nn.functional.max_pool2d(fine, 2))
        return {"maps": Maps(fine, coarse), "list": [fine * 2, (coarse,)], "name": batch["name"], "size": 3}


def test_dictionaries_lists_and_named_tuples() -> None:
    examples = [{"image": x, "name": "an image"} for x in images(4)]
    plain = check_fold(Structured(), examples, convolutions=2)
    found = call(plain, examples[1])
    assert isinstance(found["maps"], Maps)
    assert (found["name"], found["size"]) == ("an image", 3)


def test_a_list_of_maps_as_input() -> None:
    """A feature pyramid: the example is one list, not several arguments."""

    def forward(net: Net, maps: list[Tensor]) -> list[Tensor]:
        top = net.top(maps[1])
        return [net.out(net.side(maps[0]) + nn.functional.interpolate(top, scale_factor=2)), top.relu()]

    examples = [[normal(2, 3, h, w), normal(2, 4, h // 2, w // 2)] for h, w in ((8, 12), (4, 6))]
    model = Net(forward, top=conv_bn(4, 4, 1), side=conv_bn(3, 4, 1), out=branches())
    check_fold(model, examples, batch_norms=0, convolutions=3)


class Variadic(nn.Module):
    """Any number of maps, by position and by name."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([branches(), branches()])

    def forward(self, *maps: Tensor, **options: Any) -> tuple[Tensor, ...]:
        return tuple(block(x) for block, x in zip(self.blocks, maps, strict=True))


def test_any_number_of_arguments() -> None:
    examples = [(normal(2, 4, 8, 9), normal(1, 4, 5, 6)), (normal(1, 4, 7, 6), normal(3, 4, 3, 8))]
    check_fold(Variadic(), examples, convolutions=2)


def test_a_wrapper_for_several_devices() -> None:
    """DataParallel, which adds `module.` to every name, and a wrapper of a user."""
    plain = check_fold(nn.DataParallel(branches()), images(4), convolutions=1)
    assert isinstance(plain, nn.DataParallel)
    assert all(name.startswith("module.") for name in plain.state_dict())

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *inputs: Any, **options: Any) -> Any:
            return self.module(*inputs, **options)

    check_fold(Wrapper(branches()), images(4), convolutions=1)


def test_a_model_without_a_batch_axis() -> None:
    plain = check_fold(nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 2, 1), nn.ReLU()), [normal(4, 8, 9)])
    assert plain.fold_report.after.convolutions == 2


@pytest.mark.parametrize(
    "example", [torch.randn(2, 7, 8, 8), torch.randn(4), "an image", (torch.randn(2, 4, 8, 8), 1, 2)]
)
def test_an_example_that_does_not_fit_is_one_sentence(example: Any) -> None:
    model = trained(branches())
    with pytest.raises(InputError, match="Parallel cannot run on the example input") as caught:
        refold.fold(model, example)
    assert "\n" not in str(caught.value)


def test_a_network_with_norms_of_which_only_the_activation_is_left_can_be_printed() -> None:
    plain = refold.fold(timm.create_model("mixnet_s").eval(), torch.randn(1, 3, 64, 64), prove=False)
    left = [m for m in plain.modules() if isinstance(m, BatchNormAct2d)]
    assert left
    assert all(m.weight is None and m.act is not None for m in left)
    assert repr(plain).count("BatchNormAct2d") == len(left)
