"""Concatenations that sink into the dense convolutions behind them: exact, on request, and only where they can."""

import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checking import LARGEST, Deciding, Net, conv_bn, distance, normal, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import refold
from refold.folding import count
from refold.folding.alternatives import SINK, Alternative

SIZES = ((12, 12), (9, 14), (16, 7))


def first(alternatives: Sequence[Alternative]) -> Alternative | None:
    """Takes every concatenation apart."""
    return alternatives[0] if alternatives[0].kind == SINK else None


def filled(alternatives: Sequence[Alternative]) -> Alternative | None:
    """Takes every concatenation apart, with channels of zeros where that is offered."""
    return alternatives[-1] if alternatives[0].kind == SINK else None


def sunk(model: nn.Module, x: Tensor, judge: Any = first, concatenations: int = 0) -> Any:
    """The network with all concatenations sunk, checked in float64 at several sizes; so many must be left."""
    model = trained(model.double())
    plain: Any = refold.folding.fold(model, x, rewrites=judge)
    for size in SIZES:
        other = normal(2, x.shape[1], *size)
        with torch.no_grad():
            assert distance(model(other), plain(other)) <= LARGEST
    assert plain.fold_report.after.operators.get("concatenation", 0) == concatenations
    assert not [note for note in plain.fold_report.notes if "less was folded" in note]
    return plain


class Gate(nn.Module):
    """Squeeze and excite, pooled by a module or a method."""

    def __init__(self, channels: int, method: bool) -> None:
        super().__init__()
        self.pool = None if method else nn.AdaptiveAvgPool2d(1)
        self.reduce, self.expand = nn.Conv2d(channels, 3, 1), nn.Conv2d(3, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3), keepdim=True) if self.pool is None else self.pool(x)
        return x * F.hardsigmoid(self.expand(F.relu(self.reduce(pooled))))


class Residual(nn.Module):
    """A sum with a shortcut that a dense convolution computes."""

    def __init__(self, channels: int, strided: bool) -> None:
        super().__init__()
        self.filter = nn.Conv2d(channels, channels, 3, 1 + strided, 1, groups=channels)
        self.shortcut = nn.Conv2d(channels, channels, 1, 1 + strided)

    def forward(self, x: Tensor) -> Tensor:
        out = self.filter(x)
        out += self.shortcut(x)
        return out


def layers(channels: int, unit: int) -> st.SearchStrategy[nn.Module]:
    """Something that treats every channel, or every `unit` of them, for itself."""
    return st.one_of(
        st.sampled_from([nn.ReLU(), nn.ReLU(inplace=True), nn.Hardswish(), nn.GELU(), nn.Identity()]),
        st.builds(
            conv_bn,
            st.just(channels),
            st.just(channels),
            st.sampled_from([1, 3, 5, (1, 3)]),
            stride=st.sampled_from([1, 2]),
            groups=st.sampled_from([channels, channels // unit]),
        ),
        st.builds(nn.BatchNorm2d, st.just(channels)),
        st.builds(Gate, st.just(channels), st.booleans()),
        st.builds(Residual, st.just(channels), st.booleans()),
        st.sampled_from([nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1), nn.AvgPool2d(2, 1, ceil_mode=True)]),
        st.just(nn.Dropout()),
    )


class Consumer(nn.Module):
    """A dense convolution, or a linear layer behind a global average."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.dense = nn.Conv2d(channels, 5, max(1, kernel_size), padding=kernel_size // 2)
        self.head = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel_size:
            return self.dense(x)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Sinking(nn.Module):
    """Branches of one input, concatenated; layers; and one or two consumers, or the concatenation itself as well."""

    def __init__(
        self, branches: list[nn.Module], body: list[nn.Module], ends: list[nn.Module], whole: bool
    ) -> None:
        super().__init__()
        self.branches, self.body = nn.ModuleList(branches), nn.Sequential(*body)
        self.ends, self.whole = nn.ModuleList(ends), whole

    def forward(self, x: Tensor) -> Any:
        first = F.silu(self.branches[0](x))
        parts = [first, *(F.silu(branch(first)) for branch in list(self.branches)[1:])]
        body = self.body(torch.cat(parts, dim=1))
        found = [end(F.silu(body)) for end in self.ends]
        return (*found, body) if self.whole else found


@st.composite
def networks(draw: st.DrawFn) -> nn.Module:
    unit = draw(st.sampled_from([1, 2]))
    parts = draw(st.lists(st.integers(1, 3).map(lambda n: n * unit), min_size=2, max_size=3))
    branches: list[nn.Module] = [nn.Conv2d(3, parts[0], 1)]
    branches += [conv_bn(parts[0], part, 3) for part in parts[1:]]
    body = draw(st.lists(layers(sum(parts), unit), max_size=3))
    ends = [Consumer(sum(parts), draw(st.sampled_from([0, 1, 3]))) for _ in range(draw(st.integers(1, 2)))]
    return Sinking(branches, body, ends, draw(st.booleans()))


@settings(max_examples=15, deadline=None)
@given(networks(), st.sampled_from([first, filled]))
def test_any_chain_of_channelwise_layers(network: Sinking, judge: Any) -> None:
    plain = sunk(network, normal(1, 3, 12, 12), judge, concatenations=int(network.whole))
    assert type(plain) is not Sinking
    assert type(plain).__name__ == "Sinking"
    copy = pickle.loads(pickle.dumps(plain))
    x = normal(1, 3, 10, 11)
    with torch.no_grad():
        assert distance(plain(x), copy(x)) == 0.0


def ghost(channels: int = 4, **layers: nn.Module) -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        first = F.relu(self.first(x))
        return self.last(torch.cat([first, F.relu(self.cheap(first))], 1))

    made: dict[str, nn.Module] = {
        "first": nn.Conv2d(3, channels, 1),
        "cheap": nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
        "last": nn.Conv2d(2 * channels, 6, 1),
    }
    return Net(forward, **{**made, **layers})


@pytest.mark.parametrize("judge", [first, filled])
def test_the_same_multiplications_and_no_concatenation(judge: Any) -> None:
    model, x = ghost(), normal(1, 3, 12, 12)
    plain = sunk(model, x, judge)
    before, after = count(model, x), count(plain, x)
    assert after.convolutions == before.convolutions + 1
    assert (after.macs == before.macs) == (judge is first)
    assert plain.fold_report.options["rewrites"]


def test_channels_of_zeros_are_offered_where_parts_do_not_fill_blocks() -> None:
    offered: list[str] = []

    def listen(alternatives: Sequence[Alternative]) -> None:
        offered.extend(each.change for each in alternatives)

    for channels in (4, 18, 20):
        refold.folding.fold(ghost(channels), torch.zeros(1, 3, 12, 12), rewrites=listen)
    assert [text for text in offered if "apart" in text] == [
        "4 and 4 channels apart",
        "4 and 4 channels apart, filled up to 16 and 16",
        "18 and 18 channels apart",
        "18 and 18 channels apart, filled up to 20 and 20",
        "20 and 20 channels apart",
    ]


def test_alternatives_are_networks_of_their_own_with_the_real_size() -> None:
    found: list[Alternative] = []
    refold.folding.fold(ghost(), torch.zeros(1, 3, 12, 12), rewrites=lambda each: found.extend(each))
    sink = found[0]
    assert (sink.shape, sink.dtype) == ((1, 4, 12, 12), torch.float32)
    x = torch.randn(sink.shape)
    before, after = sink.before(), sink.after()
    torch.testing.assert_close(after(x), before(x))
    assert "cat" in before.code
    assert "cat" not in after.code


def test_padding_of_the_consumer_meets_the_border() -> None:
    sunk(ghost(last=nn.Conv2d(8, 6, 5, padding=2, stride=2)), normal(1, 3, 12, 12))
    sunk(ghost(last=nn.Conv2d(8, 6, 3, padding="same", dilation=2)), normal(1, 3, 12, 12), filled)


def test_halves_stay_apart_across_blocks() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.cheap = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 4, 3, padding=1, groups=4)

        def forward(self, x: Tensor) -> Tensor:
            half = self.first(x)
            return torch.cat([half, self.cheap(F.relu(half))], 1) + x

    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), Block(), Block(), nn.Conv2d(8, 5, 1))
    plain = sunk(model, normal(1, 3, 12, 12))
    assert plain.fold_report.after.operators["add"] == 2 * 2 + 2 + 1
    assert type(plain).__name__ == "Sequential"


def test_what_reads_the_concatenation_as_a_whole_still_does() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        joined = torch.cat([self.a(x), self.b(x)], 1)
        return self.last(joined), joined.softmax(1)

    net = Net(
        forward, a=Deciding(nn.Conv2d(3, 4, 1)), b=Deciding(nn.Conv2d(3, 2, 1)), last=nn.Conv2d(6, 5, 1)
    )
    plain = sunk(net, normal(1, 3, 12, 12), concatenations=1)
    assert plain.fold_report.after.convolutions == 4


@pytest.mark.parametrize("axis", [0, 2, 3])
def test_concatenations_along_other_axes_are_left(axis: int) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.last(torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], axis))

    net = Net(forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 3, padding=1), last=nn.Conv2d(4, 5, 1))
    plain = sunk(net, normal(1, 3, 12, 12), concatenations=1)
    assert "rewrites" not in plain.fold_report.options


def test_what_mixes_channels_stops_it() -> None:
    def shuffled(self: Any, x: Tensor) -> Tensor:
        joined = torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], 1)
        return self.last(F.layer_norm(joined, joined.shape[1:]))

    net = Net(shuffled, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 3, padding=1), last=nn.Conv2d(8, 5, 1))
    with torch.no_grad():
        model = trained(net.double())
        x = normal(1, 3, 12, 12)
        plain = refold.folding.fold(model, x, rewrites=first)
        assert distance(model(x), plain(x)) <= LARGEST
    assert plain.fold_report.after.operators["concatenation"] == 1


def test_convolutions_and_norms_as_functions() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        joined = torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], 1)
        norm = F.batch_norm(joined, self.mean, self.variance, eps=0.1).relu()
        filtered = F.hardswish(F.conv2d(norm, self.depthwise, self.bias, padding=1, groups=8))
        return F.conv2d(filtered, weight=self.dense, stride=2)

    net = Net(forward, a=nn.Conv2d(3, 3, 1), b=nn.Conv2d(3, 5, 1))
    for name, shape in (("depthwise", (8, 1, 3, 3)), ("dense", (5, 8, 1, 1)), ("bias", (8,)), ("mean", (8,))):
        net.register_parameter(name, nn.Parameter(torch.randn(shape)))
    net.register_buffer("variance", torch.rand(8) + 0.5)
    plain = sunk(net, normal(1, 3, 12, 12))
    assert plain.fold_report.after.convolutions == 6


def test_groups_that_a_part_would_cut_stop_it() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.last(F.relu(self.groups(torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], 1))))

    layers = {"a": nn.Conv2d(3, 3, 1), "b": nn.Conv2d(3, 5, 1), "last": nn.Conv2d(8, 5, 1)}
    sunk(Net(forward, groups=nn.Conv2d(8, 8, 3, groups=4), **layers), normal(1, 3, 12, 12), concatenations=1)


def test_an_activation_in_place_leaves_the_parts_of_others_alone() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        first = self.a(x)
        return self.last(self.act(torch.cat([first, self.b(x)], 1))), first

    net = Net(
        forward,
        a=nn.Conv2d(3, 4, 1),
        b=nn.Conv2d(3, 4, 3, padding=1),
        act=nn.ReLU(inplace=True),
        last=nn.Conv2d(8, 5, 1),
    )
    sunk(net, normal(1, 3, 12, 12))


def test_the_names_of_a_fold_repeat_it_without_a_judge() -> None:
    model, x = trained(ghost().double()), normal(1, 3, 12, 12)
    plain: Any = refold.folding.fold(model, x, rewrites=filled)
    again: Any = refold.folding.fold(model, x, prove=False, **plain.fold_report.options)
    expected = plain.state_dict()
    assert [*again.state_dict()] == [*expected]
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())


def test_a_module_called_twice_is_taken_apart_once() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.inner(self.inner(x))

    net = Net(forward, inner=ghost(last=nn.Conv2d(8, 3, 1)))
    plain = sunk(net, normal(1, 3, 12, 12))
    assert plain.fold_report.after.convolutions == 2 * 4
    assert sum(isinstance(module, nn.Conv2d) for module in plain.modules()) == 4


def test_a_dense_block_whose_layers_take_lists() -> None:
    model = trained(refold.create_model("densenet121", num_classes=5, growth_rate=4, block_config=(2, 2)))
    x = torch.randn(1, 3, 64, 64)
    plain: Any = refold.folding.fold(model, x, rewrites=filled)
    assert type(plain).__name__ == "DenseNet"
    # Those of a single tensor are left.
    assert plain.fold_report.after.operators["concatenation"] == 2
    with torch.no_grad():
        torch.testing.assert_close(plain(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "left"), [("ghostnet_050", 0), ("ghostnetv2_100", 14)])
def test_whole_networks(name: str, left: int) -> None:
    model = trained(refold.create_model(name, num_classes=5))
    x = torch.randn(1, 3, 64, 64)
    plain: Any = refold.folding.fold(model, x, rewrites=filled)
    assert isinstance(plain, type(model))
    # The attention of V2 halves its input in a function that folding does not know, and reads it whole.
    assert plain.fold_report.after.operators.get("concatenation", 0) == left
    other = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        torch.testing.assert_close(plain(other), model(other), rtol=1e-3, atol=1e-4)
    batch = torch.export.Dim("batch")
    exported = torch.export.export(plain, (x.repeat(2, 1, 1, 1),), dynamic_shapes=({0: batch},))
    three = torch.randn(3, 3, 64, 64)
    torch.testing.assert_close(exported.module()(three), plain(three))
