"""Any model gets branches, computes what it did, and returns to its own architecture."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from there_and_back import close, images, train
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import refold
from refold.errors import InputError
from refold.unfolding import PLANS, ParallelBranches, Plan, original_state_dict, unfold


class Small(nn.Module):
    """All kinds of layers, with the turns that networks take."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.expand = nn.Conv2d(8, 12, 1, bias=False)
        self.expand_norm = nn.BatchNorm2d(12)
        self.wide = nn.Conv2d(12, 12, 7, 1, 3, groups=12)
        self.deep = nn.Conv2d(12, 12, 3, 1, 1, groups=12, bias=False)
        self.deep_norm = nn.BatchNorm2d(12, affine=False)
        self.grouped = nn.Conv2d(12, 12, 3, 2, 1, groups=3, bias=False)
        self.grouped_norm = nn.BatchNorm2d(12, momentum=None, eps=1e-3)
        self.gate = nn.Conv2d(12, 12, 1)
        self.unnormed = nn.Conv2d(12, 12, 1, bias=False)
        self.head = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(x)).relu()
        x = self.expand_norm(self.expand(x)).relu()
        x = self.wide(x).relu() + self.deep_norm(self.deep(x))
        x = self.grouped_norm(self.grouped(x)).relu()
        x = x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()
        return self.head(self.unnormed(x).relu()).mean((2, 3))


def small() -> nn.Module:
    torch.manual_seed(0)
    model = Small().double()
    with torch.no_grad():
        for _ in range(3):
            model(images())
    return model.eval()


@pytest.mark.parametrize("start", ["preserving", "random"])
@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_there_and_back(plan: str, start: Any) -> None:
    model, x = small(), images()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wide = unfold(model, plan, start=start, example_input=x[:1])
    assert close(model(x), wide(x)) == (start == "preserving")
    train(wide, x)
    sums = [module for module in wide.modules() if isinstance(module, ParallelBranches)]
    grown = [b for s in sums for b in [*s.branches[1:], s.skip] if b is not None]
    assert all(any(bool(p.any()) for p in list(branch.parameters())[-2:]) for branch in grown)
    plain = refold.fold(wide, x[:1])
    assert type(plain) is Small
    assert plain.fold_report.after.batch_norms == 0
    assert close(wide(x), plain(x))
    for source in (wide, plain):
        fresh = Small().double().eval()
        fresh.load_state_dict(original_state_dict(source), strict=True)
        assert close(wide(x), fresh(x))
    assert all(bool((before[name] == tensor).all()) for name, tensor in model.state_dict().items())


def test_preserving_start_holds_in_training_mode_too() -> None:
    model, x = small(), images()
    wide = unfold(model, "ghostnetv3", example_input=x[:1])
    assert close(model.train()(x), wide.train()(x))


@pytest.mark.parametrize(
    ("plan", "branches"),
    [
        ("ghostnetv3", {"expand": 3, "wide": 4, "deep": 4, "head": 3}),
        ("mobileone", {"stem": 5, "expand": 4, "wide": 5, "deep": 5, "grouped": 5, "head": 4}),
        ("repvgg", {"stem": 2, "grouped": 2}),
        ("acb", {"stem": 3, "wide": 3, "deep": 3, "grouped": 3}),
        ("dbb", {"stem": 4, "wide": 3, "deep": 3, "grouped": 4}),
        ("repunit1", {"wide": 2, "deep": 2}),
        ("repunit2", {"wide": 3, "deep": 2}),
        ("repunit3", {"wide": 3, "deep": 2}),
        ("repghost", {"wide": 1, "deep": 1}),
    ],
)
def test_branches_of_each_plan(plan: str, branches: dict[str, int]) -> None:
    wide = unfold(small(), plan, example_input=images())
    found = {layer.path: layer.branches for layer in wide.unfold_report.layers}
    assert found == {name: number for name, number in branches.items() if number > 1 or plan == "repghost"}
    skips = {layer.path for layer in wide.unfold_report.layers if layer.skip}
    assert skips == ({"wide", "deep"} if plan in ("ghostnetv3", "mobileone", "repghost") else set())


def test_kernels_of_repunits() -> None:
    for plan, sizes in (("repunit2", [(7, 7), (5, 5), (3, 3)]), ("repunit3", [(7, 7), (1, 5), (3, 1)])):
        wide = unfold(small(), plan, example_input=images(), layers="wide")
        assert [branch.conv.kernel_size for branch in wide.wide.branches] == sizes
    split = unfold(small(), "repunit1", example_input=images(), layers="wide").wide.branches[1]
    assert [(c.kernel_size, c.groups) for c in split.convs] == [((3, 3), 4), ((5, 5), 4), ((7, 7), 4)]


def test_selection() -> None:
    model, x = small(), images()

    def chosen(plan: Any = "ghostnetv3", **options: Any) -> dict[str, int]:
        wide = unfold(model, plan, example_input=x, **options)
        return {layer.path: layer.branches for layer in wide.unfold_report.layers}

    assert set(chosen(kinds=["depthwise"])) == {"wide", "deep"}
    assert set(chosen(layers=["e*", "wide"])) == {"expand", "wide"}
    assert set(chosen(exclude="e*")) == {"wide", "deep", "head"}
    assert set(chosen(stages=[2])) == {"head"}
    assert chosen(branches=2, kinds=["pointwise"]) == {"expand": 2, "head": 2}
    assert chosen(branches={"head": 5, "*": 2}, kinds=["pointwise"]) == {"expand": 2, "head": 5}
    own = Plan("mine", {"grouped": ("row",), "dense": ("column", "row")})
    assert chosen(own) == {"stem": 3, "grouped": 2}
    # Neither a gate, which sees one pixel, nor what has no place for a shift.
    assert not {"gate", "unnormed"} & set(chosen("mobileone"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"plan": "ghostnet3"}, "Did you mean 'ghostnetv3'"),
        ({"layers": "blocks.*"}, "matches 'blocks.*'; there are: stem, expand"),
        ({"exclude": ["nothing"]}, "matches 'nothing'"),
        ({"stages": [7]}, "stage 7; there are: 1, 2"),
        ({"kinds": ["linear"]}, "choose from pointwise, depthwise"),
        ({"kinds": ["dense"]}, "it has 1 dense, 2 pointwise, 2 depthwise, 1 grouped"),
        ({"branches": 0}, "too few"),
        ({"branches": {"stem": 2}}, "concerns no layer; there are: expand"),
        ({"branches": 2.5}, "branches is 2.5 for '*'"),
        ({"plan": {"dense": ["1x1"]}}, "a file or a Plan"),
        ({"start": "zero"}, "preserving, random"),
        ({"form": "fast"}, "auto, looped"),
        ({"plan": "repghost", "layers": "expand"}, "none of Small that was asked for"),
        (
            {"plan": "repvgg", "example_input": torch.randn(1, 4, 32, 32).double()},
            "cannot run on the example",
        ),
    ],
)
def test_mistakes_are_explained(options: dict[str, Any], words: str) -> None:
    options = {"plan": "ghostnetv3", "example_input": images(), **options}
    with pytest.raises(InputError) as caught:
        unfold(small(), **options)
    assert words in str(caught.value)


class Functional(nn.Module):
    """A convolution without a module."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(nn.functional.conv2d(x, self.weight, padding=1))


def conv_norm(width: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))


def old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(nn.Conv2d(3, 4, 3))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2)),
            "nothing to unfold: it has no convolution,",
        ),
        (lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.BatchNorm2d(4)), "it has 1 ConvTranspose2d,"),
        (lambda: nn.Conv2d(3, 4, 3), "an nn.Conv2d inside a model"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.GroupNorm(2, 4)), "it has 1 Conv2d,"),
        (
            lambda: nn.Sequential(
                nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, track_running_stats=False)
            ),
            "it has 1 Conv2d,",
        ),
        (lambda: nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(3, 4, 3))), "it has 1 Conv2d,"),
        (Functional, "it has no convolution,"),
        (old_weight_norm, "Conv2d cannot be copied: Only Tensors created explicitly"),
        (lambda: torch.compile(conv_norm()), "OptimizedModule is compiled"),
        (lambda: torch.jit.trace(conv_norm().eval(), torch.randn(2, 3, 8, 8)), "is compiled"),
        (lambda: "resnet18", "A network is unfolded, not 'resnet18'"),
        (lambda: unfold(conv_norm(), "repvgg", example_input=torch.randn(2, 3, 8, 8)), "unfolded already"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_models_that_cannot_be_unfolded(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        unfold(make(), "mobileone", example_input=torch.randn(2, 3, 8, 8))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("rules", "repeats", "words"),
    [
        ({"dense": ("3x3",)}, 1, "a branch '3x3' that there is not"),
        ({"round": ("1x1",)}, 1, "a kind of layer 'round' that there is not"),
        ({"dense": "1x1"}, 1, "in a list"),
        ({}, 2, "in a list"),
        ({"dense": ("1x1",)}, 0, "0 repeats"),
    ],
)
def test_plans_that_are_none(rules: Any, repeats: int, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Plan("mine", rules, repeats)


def test_a_model_that_was_not_unfolded_has_no_way_back() -> None:
    with pytest.raises(InputError, match="no unfold report"):
        original_state_dict(small())
    wide = unfold(conv_norm(), "repvgg", example_input=torch.randn(2, 3, 8, 8))
    with pytest.raises(InputError, match="no unfold report; pass its 'module'"):
        original_state_dict(nn.DataParallel(wide))


def test_models_of_every_sort_are_unfolded() -> None:
    lazy = nn.Sequential(nn.LazyConv2d(4, 3, padding=1), nn.BatchNorm2d(4))
    with torch.device("meta"):
        without_values = conv_norm()
    x = torch.randn(2, 3, 8, 8)
    half, in_inference = conv_norm().half().eval(), conv_norm()
    assert [layer.path for layer in unfold(lazy, "repvgg", example_input=x).unfold_report.layers] == ["0"]
    assert unfold(without_values, "repvgg", kinds="dense", stages=0)[0].branches[1].conv.weight.is_meta
    wide = unfold(half, "mobileone", example_input=x.half())
    assert wide[0].branches[1].conv.weight.dtype == torch.float16
    assert torch.equal(half(x.half()), wide(x.half()))
    assert {tensor.dtype for tensor in original_state_dict(wide).values()} == {torch.float16, torch.int64}
    with torch.inference_mode():
        wide = unfold(in_inference, "mobileone", example_input=x)
    wide.train()(x).sum().backward()
    wide = unfold(nn.DataParallel(conv_norm()), "repvgg", example_input=x)
    assert [layer.path for layer in wide.unfold_report.layers] == ["module.0"]


def test_an_unfolded_model_is_an_ordinary_module() -> None:
    x = torch.randn(2, 3, 8, 8)
    wide = unfold(conv_norm(), "mobileone", example_input=x).train()
    again, compiled, saving = (copy.deepcopy(wide) for _ in range(3))
    expected = wide(x)
    expected.square().mean().backward()
    assert torch.equal(pickle.loads(pickle.dumps(again))(x), expected)
    assert torch.allclose(torch.compile(compiled, backend="aot_eager")(x), expected, atol=1e-6)
    checkpoint(saving, x, use_reentrant=False).square().mean().backward()
    for ours, theirs in zip(wide.parameters(), saving.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        wide(torch.randn(1, 3, 1, 1))


class Odd(nn.Module):
    """Layers that look like a convolution and its norm, and are not."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Conv2d(3, 3, 3, 1, 1, bias=False)
        self.read_twice = nn.Conv2d(3, 3, 3, 1, 1)
        self.norm = nn.BatchNorm2d(3)
        self.twice_norm = nn.BatchNorm2d(3)
        self.hooked = nn.Conv2d(3, 3, 3, 1, 1)
        self.hooked.register_forward_hook(lambda module, inputs, out: out + 1)
        self.reflect = nn.Conv2d(3, 3, 3, 1, 1, padding_mode="reflect")
        self.looked_into = nn.Conv2d(3, 3, 3, 1, 1)
        self.weighted = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice_norm(self.shared(self.shared(x)))
        y = self.read_twice(x)
        y = self.looked_into(y.to(self.looked_into.weight))
        return self.weighted(self.reflect(self.hooked(self.norm(y) + self.twice_norm(y))))


def test_odd_layers_are_left_alone() -> None:
    torch.manual_seed(0)
    model, x = Odd().double().eval(), images()
    wide = unfold(model, "repvgg", example_input=x)
    assert [(layer.path, layer.norm) for layer in wide.unfold_report.layers] == [("read_twice", None)]
    assert close(model(x), wide(x))
    train(wide, x)
    fresh = Odd().double().eval()
    fresh.load_state_dict(original_state_dict(wide), strict=True)
    assert close(wide(x), fresh(x))


def same_padded() -> nn.Sequential:
    return nn.Sequential(
        Conv2dSame(3, 6, 3, 2, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        Conv2dSame(6, 6, 5, 2, groups=6),
        nn.ReLU(),
        Conv2dSame(6, 4, 4, dilation=2, bias=False),
        BatchNormAct2d(4),
    ).double()


@pytest.mark.parametrize("size", [32, 37])
def test_layers_that_pad_by_the_size_of_the_map(size: int) -> None:
    torch.manual_seed(0)
    model, x = same_padded().eval(), images(size=size)
    wide = unfold(model, "mobileone", example_input=x[:1], branches=2)
    assert [(layer.path, layer.branches) for layer in wide.unfold_report.layers] == [
        ("0", 2),
        ("3", 2),
        ("5", 2),
    ]
    assert close(model(x), wide(x))
    train(wide, x)
    plain = refold.fold(wide, x[:1])
    assert plain.fold_report.after.batch_norms == 0
    other = images(size=size + 3)
    for source in (wide, plain):
        fresh = same_padded().eval()
        fresh.load_state_dict(original_state_dict(source), strict=True)
        assert all(close(wide(map_), found(map_)) for map_ in (x, other) for found in (plain, fresh))


def test_own_networks_train_the_same_with_parallel_branches() -> None:
    torch.manual_seed(0)
    model, x = refold.create_model("ghostnetv3_050", num_classes=5).double(), images(size=64, batch=2)
    fast = copy.deepcopy(model)
    for form, network in (("looped", model), ("moments", fast)):
        sums = [module for module in network.modules() if isinstance(module, ParallelBranches)]
        assert sums
        for module in sums:
            module.form = form
    torch.manual_seed(1)
    expected = model.train()(x)
    torch.manual_seed(1)
    assert close(expected, fast.train()(x))
    for name, buffer in fast.named_buffers():
        assert bool(torch.isclose(buffer, model.get_buffer(name), rtol=1e-9, atol=1e-12).all()), name
