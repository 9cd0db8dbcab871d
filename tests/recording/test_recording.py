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
