"""Random small networks from a grammar of linear and other operators: every fold is exact and costs no more."""

from collections.abc import Callable
from math import gcd
from typing import Any

import torch
from checking import LARGEST, Deciding, Net, Parallel, call, distance, normal, trained
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torchvision.ops import FrozenBatchNorm2d

import refold
from refold.folding import count

CHANNELS = [2, 4, 6]
ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.ReLU,
    nn.Sigmoid,
    lambda: nn.ReLU(inplace=True),
    lambda: nn.Hardswish(inplace=True),
    nn.Identity,
]


@st.composite
def convolution(draw: st.DrawFn, c: int, to: int | None = None) -> nn.Module:
    """A convolution that keeps the size of the map, with any kernel, groups, dilation and padding mode."""
    to = draw(st.sampled_from(CHANNELS)) if to is None else to
    groups = draw(st.sampled_from([g for g in range(1, c + 1) if gcd(c, to) % g == 0]))
    kernel = (draw(st.sampled_from([1, 1, 3, 5])), draw(st.sampled_from([1, 3, 3])))
    dilation = draw(st.sampled_from([1, 1, 2]))
    mode = draw(st.sampled_from(["zeros"] * 8 + ["reflect"]))
    padding = tuple(dilation * (k - 1) // 2 for k in kernel)
    conv: nn.Module = nn.Conv2d(
        c, to, kernel, 1, padding, dilation, groups, bias=draw(st.booleans()), padding_mode=mode
    )
    if draw(st.integers(0, 9)) == 0:
        conv = parametrizations.weight_norm(conv)
    norms: list[nn.Module] = [
        nn.BatchNorm2d(to),
        nn.BatchNorm2d(to, eps=0.1),
        FrozenBatchNorm2d(to),
        nn.Identity(),
    ]
    return nn.Sequential(conv, draw(st.sampled_from(norms)))


@st.composite
def cropping(draw: st.DrawFn, c: int, to: int) -> nn.Module:
    """A padding layer before an unpadded convolution: what in other places the convolution does by itself."""
    k = draw(st.sampled_from([2, 3]))
    before = draw(st.integers(0, k - 1))
    ends = (before, k - 1 - before) * 2
    inner = nn.Conv2d(c, c, 1, bias=draw(st.booleans()))
    return nn.Sequential(
        nn.ZeroPad2d(ends), inner, nn.BatchNorm2d(c), nn.Conv2d(c, to, k), nn.BatchNorm2d(to)
    )


def scaled(body: nn.Module, to: int, kind: int) -> nn.Module:
    """A scale, a shift or a sign behind a body."""
    functions: list[Callable[[Any, Tensor], Tensor]] = [
        lambda net, x: net.body(x) * net.gamma,
        lambda net, x: 0.5 - net.body(x),
        lambda net, x: net.body(x) / 2 + net.gamma,
        lambda net, x: net.body(x).mul_(net.gamma).neg(),
        lambda net, x: net.body(x) * net.gate(x.mean((2, 3), keepdim=True)).sigmoid().mean(1, keepdim=True),
    ]
    return Net(functions[kind], body=body, gamma=nn.Parameter(torch.randn(1, to, 1, 1)), gate=nn.Sigmoid())


def concatenated(one: nn.Module, other: nn.Module) -> nn.Module:
    return Net(lambda net, x: torch.cat([net.one(x), net.other(x)], 1), one=one, other=other)


def on_parts(one: nn.Module, other: nn.Module, kind: int) -> nn.Module:
    """One body for each half of the channels."""
    functions: list[Callable[[Any, Tensor], Tensor]] = [
        lambda net, x: torch.cat([net.one(x.chunk(2, 1)[0]), net.other(x.chunk(2, 1)[1])], 1),
        lambda net, x: torch.cat([net.one(x[:, : net.half]), net.other(x[:, net.half :])], 1),
        lambda net, x: torch.cat([net.other(x.narrow(1, net.half, net.half)), x[:, : net.half]], 1),
        lambda net, x: net.one(x.split(net.half, 1)[0]) + net.other(x.split(net.half, 1)[1]),
    ]
    return Net(functions[kind], one=one, other=other)


def twice(body: nn.Module, kind: int) -> nn.Module:
    """A body that is called two times."""
    functions: list[Callable[[Any, Tensor], Tensor]] = [
        lambda net, x: net.body(net.body(x)),
        lambda net, x: net.body(x) + net.body(x.flip(-1)),
        lambda net, x: net.body(x.relu()).sigmoid() * net.body(x),
        lambda net, x: net.body(x + net.body(x).relu()),
    ]
    return Net(functions[kind], body=body)


@st.composite
def body(draw: st.DrawFn, c: int, to: int, depth: int) -> nn.Module:
    """Something that takes `c` channels to `to` channels and keeps the size of the map."""
    kinds = ["conv", "crop"]
    if depth > 0:
        kinds += ["sum", "sum", "sum", "chain", "chain", "scale", "untraceable", "hook"]
        kinds += ["twice", "residual"] if c == to else []
        kinds += ["cat"] if to % 4 == 0 else []
        kinds += ["parts"] if c == to and c % 2 == 0 else []
    if c == to:
        kinds += ["norm", "pool", "identity", "act"]
    kind = draw(st.sampled_from(kinds))
    inner = lambda a, b: draw(body(a, b, depth - 1))  # noqa: E731
    made: nn.Module
    if kind == "conv":
        made = draw(convolution(c, to))
    elif kind == "crop":
        made = draw(cropping(c, to))
    elif kind == "sum":
        made = Parallel(
            *(inner(c, to) for _ in range(draw(st.integers(2, 3)))), act=draw(st.sampled_from(ACTIVATIONS))()
        )
    elif kind == "chain":
        middle = draw(st.sampled_from(CHANNELS))
        made = nn.Sequential(inner(c, middle), draw(st.sampled_from(ACTIVATIONS))(), inner(middle, to))
    elif kind == "scale":
        made = scaled(inner(c, to), to, draw(st.integers(0, 4)))
    elif kind == "cat":
        made = concatenated(inner(c, to // 2), inner(c, to // 2))
    elif kind == "parts":
        which = draw(st.integers(0, 3))
        made = on_parts(*(inner(c // 2, to if which == 3 else to // 2) for _ in range(2)), which)
        made.half = c // 2
    elif kind == "twice":
        made = twice(inner(c, c), draw(st.integers(0, 3)))
    elif kind == "residual":
        made = Net(lambda net, x: x + net.body(x), body=inner(c, c))
    elif kind == "untraceable":
        made = Deciding(inner(c, to))
    elif kind == "hook":
        made = inner(c, to)
        made.register_forward_hook(lambda _, given, result: result * 2)
    elif kind == "pool":
        made = draw(st.sampled_from([nn.AvgPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1, count_include_pad=False)]))
    else:
        made = {"norm": nn.BatchNorm2d(c), "identity": nn.Dropout(), "act": nn.ReLU()}[kind]
    return made


@st.composite
def networks(draw: st.DrawFn) -> nn.Module:
    torch.manual_seed(draw(st.integers(0, 1000)))
    first, last = draw(st.sampled_from(CHANNELS)), draw(st.sampled_from(CHANNELS))
    layers = [draw(body(4, first, 3)), draw(st.sampled_from(ACTIVATIONS))(), draw(body(first, last, 2))]
    if draw(st.booleans()):
        layers += [nn.Conv2d(last, 4, 3, 2, draw(st.integers(0, 1))), nn.BatchNorm2d(4)]
    return trained(nn.Sequential(*layers).double(), seed=draw(st.integers(0, 1000)))


EXAMPLES = [normal(2, 4, 11, 12), normal(1, 4, 9, 14, seed=1)]


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(networks())
def test_every_random_network_folds_exactly_and_costs_no_more(model: nn.Module) -> None:
    plain: Any = refold.fold(model, EXAMPLES[0])
    report = plain.fold_report
    assert not [reason for _, reason in report.left if "proof failed" in reason]
    assert not [note for note in report.notes if "less was folded" in note]
    unproved = refold.fold(model, EXAMPLES[0], prove=False)
    for x in EXAMPLES:
        expected = call(model, x)
        scale = max(1.0, float(expected.abs().max()))
        assert float((call(plain, x) - expected).abs().max()) <= LARGEST * scale
        assert float((call(unproved, x) - expected).abs().max()) <= LARGEST * scale
        before, after = count(model, x), count(plain, x)
        assert after.macs <= before.macs
        assert after.operator_count <= before.operator_count
    again: Any = refold.fold(plain, EXAMPLES[0])
    assert distance(call(plain, EXAMPLES[1]), call(again, EXAMPLES[1])) <= LARGEST
    assert again.fold_report.after.operator_count <= report.after.operator_count
