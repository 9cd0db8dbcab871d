"""What is seen of a model by running it: sizes, decisions, hidden code, and what holds for any size."""

import copy
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checking import (
    LARGEST,
    Deciding,
    Net,
    Parallel,
    call,
    conv_bn,
    distance,
    images,
    normal,
    trained,
)
from torch import Tensor, nn

import refold
from refold.errors import InputError
from refold.folding.answers import shared_copy
from refold.recording.recorder import record
from refold.recording.surroundings import record_twice

OTHER_SIZES = ((1, 1), (2, 3), (7, 12), (12, 12), (15, 15), (24, 33))


def branches() -> dict[str, nn.Module]:
    return {"a": conv_bn(4, 4, 3), "b": conv_bn(4, 4, 1)}


def agrees_everywhere(model: nn.Module, example: Tensor) -> Any:
    """The fold, which computes the same at every size and batch."""
    model = trained(model.double())
    plain: Any = refold.fold(model, example)
    for batch, size in enumerate(OTHER_SIZES, start=1):
        x = normal(batch, 4, *size, seed=batch)
        assert distance(call(model, x), call(plain, x)) <= LARGEST, size
    return plain


@pytest.mark.parametrize("size", [(12, 12), (2, 2), (1, 1)])
@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: (net.a(x) + net.b(x)).view(x.size(0), -1, x.shape[2] * x.shape[3]),
        lambda net, x: (net.a(x) + net.b(x)).reshape(len(x), 2, 2, *x.shape[2:]),
        lambda net, x: nn.functional.interpolate(
            net.a(x) + net.b(x), size=(2 * x.shape[-2], x.shape[-1] + 1)
        ),
        lambda net, x: (net.a(x) + net.b(x))[:, :, : max(1, x.shape[2] // 2), : -(-x.shape[3] // 2)],
        lambda net, x: (net.a(x) + net.b(x)) * x.shape[-1] ** -0.5,
        lambda net, x: (net.a(x) + net.b(x)) / math.sqrt(x.shape[-1]),
        lambda net, x: (net.a(x) + net.b(x))[..., : int(x.shape[-1] / 2) + 1],
        lambda net, x: net.a(x) + net.b(x) + torch.arange(x.shape[3]),
        lambda net, x: nn.functional.pad(net.a(x) + net.b(x), (0, -x.shape[3] % 4, 0, x.shape[2] % 2)),
        lambda net, x: (net.a(x) + net.b(x)) * (2 if x.shape[-1] > 13 else 1),
        lambda net, x: net.a(x) + net.b(x) if min(x.shape[2:]) > 1 else net.a(x) - net.b(x),
        lambda net, x: sum([net.a(x) + net.b(x)] * x.shape[0]),
    ],
)
def test_numbers_computed_from_sizes_hold_for_any_size(forward: Any, size: tuple[int, int]) -> None:
    """In the code that is rewritten: at sizes that collapse to one pixel too, a number of the example stays nowhere."""
    agrees_everywhere(Net(forward, **branches()), normal(2, 4, *size))


def test_code_that_compares_sizes_keeps_its_branches() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.a(x) + net.b(x)
        return y * 2 if x.shape[-1] > 13 else y

    plain = agrees_everywhere(Net(forward, **branches()), normal(2, 4, 12, 12))
    assert plain.fold_report.after.convolutions == 2
    assert plain.fold_report.after.batch_norms == 0


def test_code_that_only_asserts_the_channels_is_rewritten() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        assert x.dim() == 4
        assert x.shape[1] == 4
        return net.a(x) + net.b(x)

    assert (
        agrees_everywhere(Net(forward, **branches()), normal(2, 4, 12, 12)).fold_report.after.convolutions
        == 1
    )


def test_the_same_tensor_twice_is_not_taken_for_one() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = conv_bn(4, 4), conv_bn(4, 4), conv_bn(4, 4, 1)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return (self.a(x) + self.c(x) + self.b(y)).relu()

    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.two = Two()

        def forward(self, x: Tensor) -> Tensor:
            return self.two(x, x)

    model = trained(Calls().double())
    plain: Any = refold.fold(model, images(4)[0])
    one, other = normal(2, 4, 9, 9), normal(2, 4, 9, 9, seed=5)
    assert distance(call(model.two, (one, other)), call(plain.two, (one, other))) <= LARGEST


@torch.jit.script
def hidden(x: Tensor) -> Tensor:
    return x * x.mean()


def test_a_tensor_from_code_that_nobody_sees_is_no_constant() -> None:
    model = Net(lambda net, x: net.a(x) + net.b(x) * hidden(x), **branches())
    agrees_everywhere(model, normal(2, 4, 12, 12))


SCALE = torch.tensor(1.5, dtype=torch.float64)


def test_a_constant_of_the_module_around_is_folded() -> None:
    model = Net(lambda net, x: (net.a(x) + net.b(x)) * SCALE, **branches())
    assert agrees_everywhere(model, normal(2, 4, 12, 12)).fold_report.after.operators == {"convolution": 1}


def test_layers_in_a_plain_list_are_left() -> None:
    model = Net(lambda net, x: net.layers[1](net.layers[0](x)) + net.b(x), b=conv_bn(4, 4))
    model.layers = [nn.Conv2d(4, 4, 1).double(), nn.BatchNorm2d(4).double().eval()]
    agrees_everywhere(model, normal(2, 4, 12, 12))


def test_the_original_runs_at_most_six_times() -> None:
    class Counted(nn.Module):
        runs = 0

        def __init__(self, largest: int) -> None:
            super().__init__()
            self.block, self.largest = Parallel(conv_bn(3, 4), conv_bn(3, 4, 1)), largest

        def forward(self, x: Tensor) -> Tensor:
            Counted.runs += 1
            if x.shape[-1] not in (64, self.largest):
                raise ValueError("one size only")
            return self.block(x)

    for largest in (64, 32):
        Counted.runs = 0
        model = trained(Counted(largest).float())
        plain: Any = refold.fold(model, torch.randn(1, 3, 64, 64))
        assert plain.fold_report.after.convolutions == 1
        # The plain network keeps the class, so that its runs count too: one to look at, one or two to prove.
        assert Counted.runs <= 6 + 3


def test_two_recordings_agree_on_what_does_not_depend_on_the_size() -> None:
    model = trained(
        nn.Sequential(*conv_bn(4, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    )
    with torch.no_grad():
        recorded = record_twice(model, ((torch.randn(2, 4, 9, 9),), {}), shared_copy)
    assert recorded.second is not None
    assert not recorded.changed
    assert not recorded.moved
    assert not recorded.first.closed


def test_a_recording_leaves_no_trace() -> None:
    model = trained(nn.Sequential(Deciding(conv_bn(4, 4)), nn.ReLU()))
    call_module, apply = nn.Module.__call__, torch.autograd.Function.apply
    with pytest.raises(RuntimeError), torch.no_grad():
        record(copy.deepcopy(model), ((torch.randn(2, 7, 9, 9),), {}))
    assert nn.Module.__call__ is call_module
    assert torch.autograd.Function.apply == apply


def test_keywords_and_dictionaries() -> None:
    class Keyed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Parallel(conv_bn(4, 4), conv_bn(4, 4, 1))

        def forward(
            self, pixel_values: Tensor | None = None, mask: Tensor | None = None
        ) -> dict[str, Tensor]:
            assert pixel_values is not None
            y = self.body(pixel_values)
            return {"logits": y if mask is None else y * mask}

    model = trained(Keyed().double())
    x, mask = normal(2, 4, 8, 8), normal(2, 1, 8, 8, seed=3)
    for example in ({"pixel_values": x}, {"pixel_values": x, "mask": mask}):
        plain: Any = refold.fold(model, example)
        assert plain.fold_report.after.convolutions == 1
        with torch.no_grad():
            assert distance(model(**example), plain(**example)) <= LARGEST
        assert refold.verify(model, plain, example).distance_float64 <= LARGEST
    with pytest.raises(InputError, match="cannot run on the example"):
        refold.fold(model, {"image": x})


def test_only_torch_is_needed() -> None:
    script = Path(__file__).with_name("torch_alone.py")
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.stdout == "folded []\n", ran.stderr[-2000:]


def hard(run: Any, **layers: nn.Module) -> Net:
    """A network that is folded at one size and does something else at another."""
    return Net(run, a=nn.Conv2d(4, 4, 3, padding=1), norm=nn.BatchNorm2d(4), **layers)


@pytest.mark.parametrize("size", [(12, 12), (3, 3), (13, 8)])
@pytest.mark.parametrize(
    "wanted",
    [
        lambda x: x.shape[-1] > 14,
        lambda x: x.shape[0] == 4,
        lambda x: x.numel() > 1000,
        lambda x: len(x) > 3,
        lambda x: x.stride(1) > 400,
        lambda x: x.shape[2] & 1,
        lambda x: x.shape[2] >> 3,
        lambda x: divmod(x.shape[2], 2)[1],
        lambda x: {24: True}.get(x.shape[2]),
        lambda x: x.shape[3] in {33, 3},
        lambda x: len(x.split(16, -1)) > 1,
        lambda x: math.sqrt(x.shape[2]) > 4,
    ],
)
def test_a_turn_between_a_layer_and_its_norm_is_not_folded_across(wanted: Any, size: tuple[int, int]) -> None:
    """The layers are edited in their places, so that the code between them still decides."""

    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.a(x)
        if wanted(x):
            y = y.relu()
        return net.norm(y)

    agrees_everywhere(hard(forward), normal(2, 4, *size))


def test_the_way_not_taken_at_either_size_is_said() -> None:
    """Whoever decides before the layer may leave the norm out at a size that nobody has seen: a note names the code."""
    model = hard(lambda net, x: net.norm(net.a(x)) if x.shape[2] < 20 else net.a(x))
    plain: Any = refold.fold(trained(model.double()), normal(2, 4, 12, 12))
    assert plain.fold_report.after.batch_norms == 0
    assert any("the code of the model decides by the size" in note for note in plain.fold_report.notes)


@pytest.mark.parametrize("size", [(12, 12), (3, 3)])
def test_pieces_whose_number_depends_on_the_size(size: tuple[int, int]) -> None:
    tiled = Net(lambda net, x: torch.cat([net.a(t) + net.b(t) for t in x.split(16, -1)], -1), **branches())
    agrees_everywhere(tiled, normal(2, 4, *size))
    middle = Net(
        lambda net, x: (lambda parts: parts[len(parts) // 2])((net.a(x) + net.b(x)).split(4, -1)),
        **branches(),
    )
    agrees_everywhere(middle, normal(2, 4, *size))


def test_padding_to_even_sides_folded_at_odd_ones() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        x = nn.functional.pad(x, (0, width & 1, 0, height & 1))
        return net.a(x) + net.b(x)

    agrees_everywhere(Net(forward, **branches()), normal(2, 4, 13, 13))


class Gate(nn.Module):
    def forward(self, x: Tensor) -> bool:
        return bool(x.mean() > 0)


def test_a_gate_in_a_module_of_its_own_guards_its_caller() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.a(x)
        if net.gate(x):
            y = y + 1
        return net.norm(y)

    model = trained(hard(forward, gate=Gate()).double())
    x = normal(2, 4, 9, 9).abs()
    plain: Any = refold.fold(model, x)
    for other in (x, -x):
        assert distance(call(model, other), call(plain, other)) <= LARGEST


def test_arguments_that_the_fold_holds_for_are_said() -> None:
    class Flagged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor, raw: bool = False, mask: Tensor | None = None) -> Tensor:
            y = self.a(x)
            return y if raw else self.norm(y)

    plain: Any = refold.fold(trained(Flagged().double()), images(4)[0])
    assert any("holds for raw=False, mask=None" in note for note in plain.fold_report.notes)


def test_autocast_around_and_inside_leaves_the_weights_their_dtype() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return net.norm(net.a(x)).relu()

    for model in (trained(hard(forward)), trained(nn.Sequential(*conv_bn(4, 4), *conv_bn(4, 4)))):
        with torch.autocast("cpu", torch.bfloat16):
            plain = refold.fold(model, images(4)[0].float())
        assert {value.dtype for value in plain.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: net.b(net.norm(net.a(x.relu()))[:, : 2 * (x.shape[1] // 2)]),
        lambda net, x: (net.norm(net.a(x)) + net.b(x)) ** 2,
        lambda net, x: net.norm(net.a(x).to(x.dtype)).type_as(x),
        lambda net, x: net.norm(net.a(x)) / math.sqrt(x.shape[1]),
        lambda net, x: torch.vmap(lambda y: y * 2)(net.norm(net.a(x))),
    ],
)
def test_ways_to_write_what_folds(forward: Any) -> None:
    model = hard(forward, b=nn.Conv2d(4, 4, 1))
    assert agrees_everywhere(model, normal(2, 4, 12, 12)).fold_report.after.batch_norms == 0


@pytest.mark.parametrize("prove", [True, False])
@pytest.mark.parametrize("number", range(4))
def test_memory_that_changes_around_layers(number: int, prove: bool) -> None:
    def first(net: Net, x: Tensor) -> Tensor:
        y = x.relu()
        view = y.view(-1)
        found = net.norm(y)
        view.add_(1)
        return net.b(found)

    def second(net: Net, x: Tensor) -> Tensor:
        y = x.clone()
        y[:, 2:] += 1
        found = net.norm(y)
        y.add_(1)
        return net.b(found)

    def third(net: Net, x: Tensor) -> Tensor:
        y = net.norm(net.a(x))
        z = net.b(y)
        y.zero_()
        return net.other(z) + y

    def fourth(net: Net, x: Tensor) -> Tensor:
        x = x.contiguous()
        y = net.norm(net.a(x))
        x *= 2
        return y + x

    forward = (first, second, third, fourth)[number]
    model = trained(hard(forward, b=nn.Conv2d(4, 4, 1), other=nn.BatchNorm2d(4)).double())
    plain = refold.fold(model, images(4)[0], prove=prove)
    for x in images(4):
        assert distance(call(model, x), call(plain, x)) <= LARGEST


def test_a_cache_by_size_that_outlives_a_run() -> None:
    kept: dict[int, Tensor] = {}

    def grid(side: int) -> Tensor:
        if side not in kept:
            kept[side] = torch.arange(side) * 1.0
        return kept[side]

    model = Net(lambda net, x: net.fc(net.a(x) + grid(x.shape[-1])), a=conv_bn(4, 4), fc=nn.Linear(16, 4))
    plain: Any = refold.fold(trained(model.double()), normal(2, 4, 16, 16))
    assert plain.fold_report.after.batch_norms == 0
