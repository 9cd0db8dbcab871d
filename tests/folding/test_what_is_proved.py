"""What a proof compares, and what it says where it compares less than all; guards that nothing else would meet."""

import copy
import math
from typing import Any

import pytest
import torch
from checking import LARGEST, Net, Parallel, call, conv_bn, distance, images, normal, trained
from torch import Tensor, nn

import refold
from refold.errors import NotEquivalent
from refold.folding import planning
from refold.folding.shortcuts import folded_shortcuts
from refold.recording import precision


def notes(plain: Any) -> str:
    return " ".join(plain.fold_report.notes)


def test_infinities_and_nan_are_never_equal_by_being_unequal() -> None:
    model = trained(nn.Sequential(*conv_bn(4, 4), nn.ReLU(), *conv_bn(4, 4)).double())
    model[1].running_var[3] = math.nan
    other = copy.deepcopy(model)
    other[0].weight.data += 5
    for candidate in (other, copy.deepcopy(model)):
        with pytest.raises(NotEquivalent, match=r"no numbers \(NaN\), so that nothing can be said"):
            refold.verify(model, candidate, images(4)[0])
    plain: Any = refold.fold(model, images(4)[0])
    assert plain.fold_report.proof.compared == 0
    assert "nothing was compared" in notes(plain)


def test_part_of_the_outputs_is_not_finite() -> None:
    model = trained(nn.Sequential(*conv_bn(4, 4)).double())
    model[1].bias.data[1] = math.inf
    plain: Any = refold.fold(model, images(4)[0])
    proof = plain.fold_report.proof
    assert (proof.not_finite, proof.compared) == (proof.not_finite, 3 * proof.not_finite)
    assert "are no finite numbers and were not compared" in notes(plain)
    wrong = copy.deepcopy(model)
    wrong[1].bias.data[1] = -math.inf
    with pytest.raises(NotEquivalent):
        refold.verify(model, wrong, images(4)[0])


class Chooses(nn.Module):
    """The highest scores and their places: near ties fall either way."""

    def __init__(self, count: int = 5) -> None:
        super().__init__()
        self.body, self.head, self.count = conv_bn(4, 4), nn.Conv2d(4, 1, 1), count

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = (self.head(self.body(x)).flatten(1) * 1e3).round() / 1e3
        found = scores.topk(self.count)
        return found.values, found.indices


@pytest.mark.parametrize("seed", range(5))
def test_what_is_decided_is_compared_through_what_decided_it(seed: int) -> None:
    """Ties and rounding fall either way; weights that are wrong are found all the same."""
    torch.manual_seed(seed)
    model, x = trained(Chooses().double(), seed), normal(2, 4, 40, 40, seed=seed)
    plain: Any = refold.fold(model, x)
    assert plain.fold_report.after.batch_norms == 0
    assert plain.fold_report.proof.distance_float64 <= LARGEST
    refold.verify(model, plain, x)
    plain.body[0].weight.data.mul_(1.01)
    with pytest.raises(NotEquivalent):
        refold.verify(model, plain, x)


def test_another_threshold_is_no_tie() -> None:
    class Threshold(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.limit = conv_bn(4, 4), 0.5

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            return y[y > self.limit]

    model = trained(Threshold().double())
    plain: Any = refold.fold(model, images(4)[0])
    refold.verify(model, plain, images(4)[0])
    plain.limit = 0.6
    with pytest.raises(NotEquivalent):
        refold.verify(model, plain, images(4)[0])


def test_nothing_found_is_proved_by_the_scores() -> None:
    model = Net(lambda net, x: (y := net.body(x).sigmoid())[y > 2.0], body=conv_bn(4, 4))
    plain: Any = refold.fold(trained(model.double()), images(4)[0])
    assert plain.fold_report.proof.compared > 100
    assert plain.fold_report.proof.decided
    plain.body[0].weight.data.mul_(1.01)
    with pytest.raises(NotEquivalent):
        refold.verify(model, plain, images(4)[0])


def test_random_numbers_are_the_same_before_and_after() -> None:
    model = Net(
        lambda net, x: nn.functional.dropout(net.a(x), 0.3, training=True) + torch.rand_like(x),
        a=conv_bn(4, 4),
    )
    plain: Any = refold.fold(trained(model.double()), images(4)[0])
    assert "random numbers" in notes(plain)
    assert plain.fold_report.after.batch_norms == 0
    assert plain.fold_report.proof.distance_float64 <= LARGEST


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("cast", [lambda x: x.half().float(), lambda x: x.to(torch.bfloat16).to(x.dtype)])
def test_rounding_inside_is_named_and_no_alarm(seed: int, cast: Any) -> None:
    torch.manual_seed(seed)
    model = trained(Net(lambda net, x: net.b(cast(net.a(x))), a=conv_bn(4, 4), b=conv_bn(4, 4)), seed)
    plain: Any = refold.fold(model, normal(1, 4, 32, 32, seed=seed).float())
    assert "on its way" in notes(plain)
    assert plain.fold_report.proof.distance_float64 <= LARGEST


def test_a_tolerance_is_the_callers() -> None:
    model = trained(nn.Sequential(*conv_bn(4, 4), nn.ReLU()).double())
    other = copy.deepcopy(model)
    other[0].weight.data *= 1 + 1e-7
    with pytest.raises(NotEquivalent):
        refold.verify(model, other, images(4)[0])
    assert refold.verify(model, other, images(4)[0], tolerance=1e-5).distance_float64 > LARGEST
    plain: Any = refold.fold(model, images(4)[0], tolerance=0.0)
    assert all("the proof failed" in reason for _, reason in plain.fold_report.left)
    assert plain.fold_report.after.batch_norms == 1


def test_a_device_without_float64_is_proved_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Apple's: what cannot be asked of the device is asked of the CPU, and nothing of the model is moved."""
    asked: list[torch.device] = []

    def has_none(device: torch.device) -> bool:
        asked.append(device)
        return False

    monkeypatch.setattr("refold.folding.answers.has_float64", has_none)
    assert precision.has_float64(torch.device("cpu"))
    assert not precision.has_float64(torch.device("mps"))
    model = trained(nn.Sequential(Parallel(conv_bn(4, 4), conv_bn(4, 4, 1)), *conv_bn(4, 4)))
    plain: Any = refold.fold(model, images(4)[0].float())
    assert asked
    assert plain.fold_report.proof.distance_float64 <= 1e-12
    assert all(value.dtype == torch.float32 for value in plain.parameters())
    refold.verify(model, plain, images(4)[0].float())


def test_what_would_cost_more_is_taken_back_at_the_end() -> None:
    """The last guard: whatever a pass proposes, the network that is returned takes no more than before."""
    block = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1))
    model = Net(lambda net, x: net.block(x) + x, block=block).double().eval()
    for may_cost in (False, True):
        plain: Any = refold.folding.apply_passes(model, images(4)[0], [folded_shortcuts], may_cost=may_cost)
        report = plain.fold_report
        assert (report.after.macs > report.before.macs) is may_cost
        assert any("less was folded: it would have taken" in note for note in report.notes) is not may_cost
        assert distance(call(model, images(4)[1]), call(plain, images(4)[1])) <= LARGEST


def test_the_best_source_may_be_far_away() -> None:
    """From eight channels to two, back to eight, and a dozen scales behind: what narrows them stays a layer."""

    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.wide(net.narrow(x.relu()))
        for factor in range(planning._MOST_SOURCES - 4):
            y = y * (1.1 + factor)
        return y.sigmoid()

    model = Net(forward, narrow=nn.Conv2d(8, 2, 1), wide=nn.Conv2d(2, 8, 1))
    plain = check_macs(model, normal(2, 8, 9, 9))
    assert plain.fold_report.after.operators == {"convolution": 2, "activation": 2}


def test_a_chain_longer_than_all_sources_is_folded_from_its_start() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.conv(x.relu())
        for factor in range(4 * planning._MOST_SOURCES):
            y = y * (1.0 + factor / 100)
        return y

    plain = check_macs(Net(forward, conv=nn.Conv2d(8, 8, 1)), normal(2, 8, 9, 9))
    assert plain.fold_report.after.operators == {"convolution": 1, "activation": 1}


def check_macs(model: nn.Module, x: Tensor) -> Any:
    model = model.double().eval()
    plain: Any = refold.fold(model, x)
    assert plain.fold_report.after.macs <= plain.fold_report.before.macs
    assert distance(call(model, x), call(plain, x)) <= LARGEST
    return plain
