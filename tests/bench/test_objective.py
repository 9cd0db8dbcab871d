"""The latency objective: what is chosen from which figures, with chosen clocks, and once with a real engine."""

import io
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, fx, nn

import refold
from refold.bench.objective import Latency
from refold.bench.timing import Timing
from refold.bench.turns import TimingFailed
from refold.errors import InputError
from refold.folding import count, fold


class Ghost(nn.Module):
    """A ghost module and a 1x1 convolution, with a shortcut through the same activation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(16, 16, 1)
        self.cheap = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.last = nn.Conv2d(32, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = F.relu(self.first(x))
        return F.relu(self.last(torch.cat([first, F.relu(self.cheap(first))], 1)))


class Shortcut(nn.Module):
    """A chain of two convolutions, and the shortcut around it that passes through the same activation."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.project, self.act = nn.Conv2d(16, 32, 1), nn.Conv2d(32, 16, 1), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.act(self.expand(x))) + self.act(x)


def network() -> nn.Module:
    """Two ghosts of one shape, a shortcut, and a classifier."""
    torch.manual_seed(0)
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    return nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), Ghost(), Ghost(), Shortcut(), *head)


IMAGE = torch.zeros(1, 3, 12, 12)


class Clock:
    """Times networks by a rule: milliseconds from what runs; it counts how often it is asked."""

    def __init__(self, cost: Callable[[dict[str, int]], float], noise: Sequence[float] = (1.0,) * 8) -> None:
        self.cost, self.noise, self.asked = cost, noise, 0

    def __call__(self, networks: Sequence[nn.Module], example: Tensor) -> tuple[Timing, ...]:
        self.asked += 1
        times = [self.cost(count(network, example).operators) for network in networks]
        last = len(times) - 1
        return tuple(
            Timing(tuple(t * (n if i == last else 1.0) for n in self.noise)) for i, t in enumerate(times)
        )


def concatenations_cost(runs: dict[str, int]) -> float:
    return 10.0 + 5.0 * runs.get("concatenation", 0)


def decided(plain: Any) -> dict[tuple[str, str], bool]:
    return {(each.path, each.kind): each.kept for each in plain.fold_report.decisions}


def test_what_is_faster_is_kept_and_what_is_not_is_left() -> None:
    model, clock = network().eval(), Clock(concatenations_cost)
    plain: Any = fold(model, IMAGE, objective=Latency(threads=2, stopwatch=clock))
    assert decided(plain) == {
        ("4", "shortcut"): False,
        ("2", "sink"): True,
        ("3", "sink"): True,
        ("", "whole network"): True,
    }
    assert "concatenation" not in plain.fold_report.after.operators
    first = next(each for each in plain.fold_report.decisions if each.kind == "sink")
    assert (first.before, first.after, first.ratio) == (15.0, 10.0, 10 / 15)
    assert plain.fold_report.measured == {"engine": "onnxruntime", "threads": 2}
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(plain.fold_report)
    text = console.export_text()
    assert "measured on onnxruntime, 2 threads" in text
    assert re.search(r"2 +│ sink: 16 and 16 channels apart +│ +15.000 │ +10.000 │ +0.67 │ kept", text)
    assert json.loads(plain.fold_report.to_json())["decisions"][1]["ratio"] == 10 / 15
    # The ghosts are alike and measured once.
    assert clock.asked == 3
    x = torch.randn(2, 3, 9, 14)
    torch.testing.assert_close(plain(x), model(x))


def test_shortcuts_are_chosen_by_the_clock_too() -> None:
    for sums_cost, kept in ((5.0, True), (0.0, False)):
        clock = Clock(lambda runs, own=sums_cost: 10.0 + own * runs.get("add", 0) + runs["convolution"])
        plain: Any = fold(
            nn.Sequential(Shortcut(), nn.Sigmoid()),
            torch.zeros(1, 16, 12, 12),
            objective=Latency(stopwatch=clock),
        )
        assert decided(plain)["0", "shortcut"] is kept
        assert ("add" in plain.fold_report.after.operators) is not kept


@pytest.mark.parametrize(
    ("ratios", "pays"),
    [
        ([0.9] * 9, True),
        ([0.989] * 9, True),
        ([0.995] * 9, False),
        ([1.0] * 9, False),
        ([0.5, 0.9, 0.96, 1.3, 0.7, 1.2, 0.97, 1.1, 0.6], False),
        ([0.97], True),
        ([0.995], False),
    ],
)
def test_a_gain_must_exceed_margin_and_noise(ratios: list[float], pays: bool) -> None:
    assert Timing(tuple(ratios)).pays(Timing((1.0,) * len(ratios)), margin=0.01) is pays


def test_all_is_undone_where_the_whole_network_is_not_faster() -> None:
    def cost(runs: dict[str, int]) -> float:
        whole = "linear" in runs and "convolution" in runs
        return 10.0 - runs.get("concatenation", 0) if whole else concatenations_cost(runs)

    model = network().eval()
    plain: Any = fold(model, IMAGE, objective=Latency(stopwatch=Clock(cost)))
    assert plain.fold_report.after.operators["concatenation"] == 2
    assert decided(plain)["", "whole network"] is False
    assert "rewrites" not in plain.fold_report.options
    assert "all was undone: the whole network was not faster" in plain.fold_report.notes


def test_what_cannot_be_measured_is_left_with_the_reason() -> None:
    def clock(networks: Sequence[nn.Module], example: Tensor) -> tuple[Timing, ...]:
        raise TimingFailed("no answer within 120 s; its process was ended")

    plain: Any = fold(network().eval(), IMAGE, objective=Latency(stopwatch=clock))
    assert not any(each.kept for each in plain.fold_report.decisions)
    assert {each.note for each in plain.fold_report.decisions} == {
        "no answer within 120 s; its process was ended"
    }


def test_channels_last_is_tried_where_the_engine_takes_the_layout() -> None:
    def clock(networks: Sequence[nn.Module], example: Tensor) -> tuple[Timing, ...]:
        last = [
            n.get_parameter("0.weight").is_contiguous() for n in networks if not isinstance(n, fx.GraphModule)
        ]
        return tuple(Timing((2.0 if plain else 1.0,) * 8) for plain in last or [True] * len(networks))

    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3))
    plain: Any = fold(net, IMAGE, objective=Latency("pytorch", stopwatch=clock))
    assert plain.fold_report.decisions[-1].change == "channels last in memory"
    assert plain.get_parameter("0.weight").is_contiguous(memory_format=torch.channels_last)
    plain = fold(net, IMAGE, objective=Latency(stopwatch=clock))
    assert not plain.fold_report.decisions


def test_the_choices_are_repeated_from_the_checkpoint(tmp_path: Any) -> None:
    model = refold.create_model("densenet121", num_classes=3, growth_rate=4, block_config=(2, 2)).eval()
    x = torch.randn(1, 3, 64, 64)
    plain: Any = fold(model, x, objective=Latency(stopwatch=Clock(concatenations_cost)), prove=False)
    kept = [each for each in plain.fold_report.decisions if each.kept and each.kind == "sink"]
    assert len(plain.fold_report.options["rewrites"]) == len(kept) == 4
    refold.save(plain, tmp_path / "plain.safetensors")
    loaded = refold.load(tmp_path / "plain.safetensors", form="plain")
    with torch.no_grad():
        assert torch.equal(loaded(x), plain(x))


def test_what_makes_no_sense_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1))
    with pytest.raises(InputError, match=r'refold\.Latency\("onnxruntime"\)'):
        fold(net, IMAGE, objective="latency")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no engine 'tensorflow'"):
        Latency("tensorflow")
    with pytest.raises(InputError, match="one engine only"):
        Latency("all")
    with pytest.raises(InputError, match="takes one tensor"):
        fold(net, (IMAGE, IMAGE), objective=Latency())
    with pytest.raises(InputError, match="leave out one"):
        fold(net, IMAGE, objective=Latency(), rewrites=["sink cat"])
    with pytest.raises(InputError, match="objective is 'speed'"):
        fold(net, IMAGE, objective="speed")  # type: ignore[arg-type]


@pytest.mark.slow
def test_on_a_real_engine() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.ReLU(), Ghost(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()
    told: list[str] = []
    plain: Any = refold.fold(
        model, torch.zeros(1, 3, 56, 56), objective=refold.Latency(on_progress=told.append)
    )
    (sink, *_) = plain.fold_report.decisions
    assert sink.kind == "sink"
    assert sink.ratio is not None
    assert 0.1 < sink.ratio < 5
    assert sink.kept is ("concatenation" not in plain.fold_report.after.operators)
    assert told[0].startswith("sink in 2: ")
    x = torch.randn(2, 3, 40, 30)
    torch.testing.assert_close(plain(x), model(x))
