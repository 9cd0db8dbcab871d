"""The proof: it passes for what is equal, fails loudly with numbers for what is not, and undoes a wrong fold."""

import copy
import importlib
import math
from typing import Any

import pytest
import torch
from checking import Deciding, Net, Parallel, call, conv_bn, distance, images, normal, trained
from torch import Tensor, nn

import refold
from refold.algebra import operations
from refold.errors import InputError, NotEquivalent

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def network() -> nn.Module:
    torch.manual_seed(0)
    return trained(
        nn.Sequential(
            Parallel(conv_bn(3, 8, 3), conv_bn(3, 8, 1)), nn.MaxPool2d(2), *conv_bn(8, 4), nn.Sigmoid()
        )
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fold_is_proved_and_verified(dtype: torch.dtype) -> None:
    model, x = network().to(dtype), images(3)[0].to(dtype)
    plain: Any = refold.fold(model, x)
    proof = plain.fold_report.proof
    assert proof.regions == len(plain.fold_report.regions) == 2
    assert proof.worst_region <= 1e-12
    assert proof.distance_float64 <= 1e-12
    assert proof.inputs == ("2×3×12×12", "1×3×7×7")
    again = refold.verify(model, plain, x)
    if dtype == torch.float64:
        assert proof.original_distance is proof.folded_distance is None
        assert again.distance_float64 <= 1e-12
    else:
        assert 0 < proof.folded_distance <= 4 * max(proof.original_distance, 2e-7)
        assert again.folded_distance == proof.folded_distance


def test_both_sizes_are_proved_for_sequences_too() -> None:
    """One spatial axis: the length changes, never the channels."""
    model = trained(nn.Sequential(nn.Conv1d(4, 6, 3, padding=1), nn.BatchNorm1d(6), nn.ReLU()).double())
    plain: Any = refold.fold(model, normal(2, 4, 12))
    assert len(plain.fold_report.proof.inputs) == 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_nudged_weights_are_not_equivalent(dtype: torch.dtype) -> None:
    """USERS: the folded model gives other outputs. The error carries the numbers."""
    model, x = network().to(dtype), images(3)[0].to(dtype)
    plain: Any = refold.fold(model, x)
    with torch.no_grad():
        plain[2].weight[1, 2, 0, 1] += 0.5
    with pytest.raises(NotEquivalent, match="do not compute the same function") as caught:
        refold.verify(model, plain, x)
    proof: Any = caught.value.proof
    assert proof.distance_float64 > 1e-3
    assert f"{proof.distance_float64:.1e}" in str(caught.value) or f"{proof.folded_distance:.1e}" in str(
        caught.value
    )


def test_one_last_bit_is_seen_in_float64() -> None:
    """A relative change of 1e-7 is far beyond rounding in float64."""
    model, x = network().double(), images(3)[0]
    plain: Any = refold.fold(model, x)
    with torch.no_grad():
        plain[2].weight.mul_(1 + 1e-7)
    with pytest.raises(NotEquivalent):
        refold.verify(model, plain, x)


def test_a_fold_of_the_training_function_is_not_equivalent() -> None:
    """USERS: folded in train mode. Statistics of one batch instead of the running ones."""
    model, x = network().double(), images(3)[0]
    wrong = copy.deepcopy(model)
    wrong[2:4].train()(wrong[:2](x))
    for module in wrong.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    wrong[2:4].train()(wrong[:2](x))
    with pytest.raises(NotEquivalent):
        refold.verify(model, refold.fold(wrong.eval(), x), x)


def test_the_border_is_part_of_the_proof() -> None:
    """A norm moved through zero padding is right everywhere but at the border."""
    model = trained(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)).double())
    scale = model[0].weight / (model[0].running_var + model[0].eps).sqrt()
    shift = model[0].bias - model[0].running_mean * scale
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong[1].weight.mul_(scale[:, None, None])
        wrong[1].bias.add_(model[1].weight.sum((2, 3)) @ shift)
    wrong[0] = nn.Identity()
    (x, *_) = images(4)
    assert distance(call(model, x)[:, :, 1:-1, 1:-1], call(wrong, x)[:, :, 1:-1, 1:-1]) <= 1e-12
    with pytest.raises(NotEquivalent):
        refold.verify(model, wrong, x)


def test_other_shapes_and_numbers_of_outputs_are_not_equivalent() -> None:
    (x, *_) = images(3)
    model = network().double()
    for other in (
        nn.Sequential(model, nn.Flatten()),
        Net(lambda net, x: (net.body(x), x), body=model),
        Net(lambda net, x: net.body(x) * math.nan, body=model),
    ):
        with pytest.raises(NotEquivalent):
            refold.verify(model, other, x)


def test_verify_leaves_both_as_they_were() -> None:
    model, x = network(), images(3)[0].float()
    plain: Any = refold.fold(model, x).train()
    model.train()
    states = [{name: value.clone() for name, value in m.state_dict().items()} for m in (model, plain)]
    refold.verify(model, plain, x)
    for m, state in zip((model, plain), states, strict=True):
        assert all(module.training for module in m.modules())
        assert all(torch.equal(value, state[name]) for name, value in m.state_dict().items())


def test_a_wrong_input_is_named() -> None:
    model, x = network(), images(3)[0].float()
    plain = refold.fold(model, x)
    with pytest.raises(
        InputError, match=r"Sequential cannot run on the example input \(shape \(1, 5, 8, 8\)\)"
    ) as caught:
        refold.verify(model, plain, torch.randn(1, 5, 8, 8))
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError):
        refold.verify(model, nn.Conv2d(4, 3, 1), x)
    with pytest.raises(InputError):
        refold.fold(model, torch.randn(1, 5, 8, 8))


class Chaos(nn.Module):
    """The logistic map: every rounding error doubles in each of sixty steps."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Parallel(conv_bn(3, 4, 3), conv_bn(3, 4, 1), act=nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        for _ in range(40):
            x = 3.99 * x * (1 - x)
        return x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_unstable_network_is_no_false_alarm(dtype: torch.dtype) -> None:
    """Its regions are proved one by one; the whole is as close as the network lets any two runs be."""
    torch.manual_seed(0)
    model, x = trained(Chaos()).to(dtype), images(3)[0].to(dtype)
    plain: Any = refold.fold(model, x)
    proof = plain.fold_report.proof
    assert plain.fold_report.after.convolutions == 1
    assert proof.worst_region <= 1e-12
    assert proof.sensitivity > 1e-9
    assert any("amplifies rounding" in note for note in plain.fold_report.notes)


def test_a_wrong_network_is_found_even_if_it_is_unstable() -> None:
    """Ten doublings of the last bit explain 1e-12, not a nudged weight."""
    torch.manual_seed(0)
    model, x = trained(Chaos().double()), images(3)[0]
    plain: Any = refold.fold(model, x)
    assert refold.verify(plain, copy.deepcopy(plain), x).distance_float64 == 0
    with torch.no_grad():
        plain.block.conv.weight.mul_(1.01) if hasattr(plain.block, "conv") else plain.block[0].weight.mul_(
            1.01
        )
    with pytest.raises(NotEquivalent):
        refold.verify(model, plain, x)


def without_shift(right: Any) -> Any:
    """A scale that forgets its shift, as a hand-written fold might."""
    return lambda convolution, scale, shift: right(convolution, scale, None)


def test_a_region_whose_proof_fails_is_undone_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one operation of the algebra broken, the regions that use it stay as they were, the others fold."""
    model = trained(
        nn.Sequential(*conv_bn(4, 4), nn.ReLU(), nn.Linear(12, 6), nn.Linear(6, 12, bias=False)).double()
    )
    regions = importlib.import_module("refold.folding.regions")
    for module in (operations, regions):
        monkeypatch.setattr(module, "scale_outputs", without_shift(operations.scale_outputs))
    (x, *_) = images(4)
    plain: Any = refold.fold(model, x)
    assert dict(plain.fold_report.left)["1"].startswith("the proof failed: the results differ by")
    assert isinstance(plain[1], nn.BatchNorm2d)
    assert plain.fold_report.after.batch_norms == 1
    assert distance(call(model, x), call(plain, x)) <= 1e-12


def test_a_network_whose_proof_fails_is_never_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every local proof is fooled, the proof of the whole network still stands."""
    module = importlib.import_module("refold.folding.rewrite")
    monkeypatch.setattr(operations, "scale_outputs", without_shift(operations.scale_outputs))
    monkeypatch.setattr(module, "_prove", lambda *_: 0.0)
    model = network().double()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(NotEquivalent) as caught:
        refold.fold(model, images(3)[0])
    proof: Any = caught.value.proof
    assert proof.distance_float64 > 1e-3
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_without_a_proof_nothing_is_claimed() -> None:
    model = trained(Parallel(nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)))
    plain: Any = refold.fold(model, images(3)[0].float(), prove=False)
    assert plain.fold_report.proof is None
    assert plain.fold_report.after.convolutions == 1
    assert refold.verify(model, plain, images(3)[0].float()).distance_float64 <= 1e-6


def test_weights_nudged_in_a_network_that_fills_a_buffer() -> None:
    """A float32 network that writes into `torch.zeros`: the float64 truth must not be zero."""

    def forward(net: Net, x: Tensor) -> Tensor:
        out = torch.zeros(2, 6, 12, 12)
        out[:, :4] = net.block(x)
        return out

    model, x = trained(Net(forward, block=conv_bn(3, 4))), images(3)[0].float()
    same = refold.verify(model, copy.deepcopy(model), x)
    assert same.original_distance is not None
    assert same.original_distance <= 1e-6
    wrong = copy.deepcopy(model)
    wrong.block[0].weight.data.mul_(1.01)
    with pytest.raises(NotEquivalent):
        refold.verify(model, wrong, x)


@pytest.mark.parametrize(
    "body", [lambda x: x.float() * 3, lambda x: x.half().float(), lambda x: x.to(torch.bfloat16)]
)
def test_casts_inside_a_network(body: Any) -> None:
    """A float32 network that rounds on its way: as close as the original, so no alarm, and wrong weights still are."""
    model = trained(
        Net(lambda net, x: net.b(body(net.a(x).relu()).float()), a=conv_bn(3, 4), b=conv_bn(4, 4))
    )
    (x, *_) = images(3)
    plain: Any = refold.fold(model, x.float())
    assert plain.fold_report.after.batch_norms == 0
    refold.verify(model, plain, x.float())
    last = [module for module in plain.modules() if isinstance(module, nn.Conv2d)][-1]
    last.weight.data.mul_(1.05)
    with pytest.raises(NotEquivalent):
        refold.verify(model, plain, x.float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equal_infinities_are_equal(dtype: torch.dtype) -> None:
    """Masked scores: minus infinity at the same places of both is no difference; at another place it is."""

    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.block(x)
        return y.masked_fill(y < net.limit, -math.inf)

    model = trained(Net(forward, block=conv_bn(3, 4))).to(dtype)
    model.limit = 0.0
    x = images(3)[0].to(dtype)
    assert torch.isinf(call(model, x)).any()
    plain: Any = refold.fold(model, x)
    assert plain.fold_report.after.batch_norms == 0
    refold.verify(model, plain, x)
    plain.limit = 1.0
    with pytest.raises(NotEquivalent):
        refold.verify(model, plain, x)


def test_a_network_that_is_not_finite_in_its_dtype_is_no_false_alarm() -> None:
    """float16 that overflows in the original already: both are infinitely far from the float64 result."""
    model = trained(nn.Sequential(*conv_bn(3, 4, 1), nn.ReLU())).half()
    model[1].weight.data.fill_(6e4)
    x = images(3)[0].half() * 1000
    assert not torch.isfinite(call(model, x)).all()
    plain: Any = refold.fold(model, x)
    proof = plain.fold_report.proof
    assert proof.distance_float64 <= 1e-12
    assert math.isinf(proof.original_distance)


def test_deciding_parts_are_proved_with_the_whole() -> None:
    model = trained(nn.Sequential(Deciding(conv_bn(3, 4)), nn.ReLU(), *conv_bn(4, 4)).double())
    plain: Any = refold.fold(model, images(3)[0])
    assert plain.fold_report.proof.regions == 2
    assert plain.fold_report.proof.distance_float64 <= 1e-12


def test_other_shapes_are_said() -> None:
    first, second = nn.Linear(4, 3).eval(), nn.Linear(4, 2).eval()
    with pytest.raises(NotEquivalent, match=r"other shapes, \(5, 3\) and \(5, 2\); compare networks"):
        refold.verify(first, second, torch.randn(5, 4))
