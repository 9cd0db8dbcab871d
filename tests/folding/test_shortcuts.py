"""Shortcuts taken into the convolutions that they lead around: exact for any activation, and only where they match."""

import pickle
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from checking import LARGEST, Net, conv_bn, normal, trained
from torch import Tensor, nn

import refold
from refold.errors import InputError

ACTIVATIONS = [
    nn.ReLU,
    nn.GELU,
    nn.SiLU,
    nn.Hardswish,
    nn.LeakyReLU,
    lambda: nn.ELU(0.3),
    lambda: nn.Threshold(0.1, 2.0),
]


def block(activation: Any, *layers: nn.Module, projection: nn.Module | None = None) -> Net:
    """A chain with one activation before its last layer, and the same one on the shortcut."""

    def forward(self: Any, x: Tensor) -> Tensor:
        out = x
        for layer in list(self.layers)[:-1]:
            out = layer(out)
        return self.layers[-1](self.act(out)) + self.projection(self.act(x))

    return Net(
        forward, layers=nn.ModuleList(layers), act=activation(), projection=projection or nn.Identity()
    )


def folded(model: nn.Module, x: Tensor) -> nn.Module:
    """The plain form, checked against the model at another size than it was folded with."""
    model = trained(model).double()
    plain = refold.fold(model, x.double(), shortcuts="fold")
    for size in ((9, 14), (16, 7)):
        other = normal(2, x.shape[1], *size).double()
        with torch.no_grad():
            expected = model(other)
            assert (plain(other) - expected).abs().max() <= LARGEST * expected.abs().max()
    return plain


def counts(plain: nn.Module) -> tuple[int, int, int]:
    operators = plain.fold_report.after.operators
    return operators.get("convolution", 0), operators.get("activation", 0), operators.get("add", 0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_any_activation_carries_a_shortcut(activation: Any) -> None:
    net = block(activation, conv_bn(6, 6, groups=6), nn.Conv2d(6, 24, 1), nn.Conv2d(24, 6, 1))
    # Depthwise and expanding convolution stay two: as one they would take more multiply-accumulates.
    assert counts(folded(net, normal(1, 6, 12, 12))) == (3, 1, 0)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_projection_and_grouped_convolutions(groups: int) -> None:
    net = block(
        nn.GELU, conv_bn(4, 8, groups=groups), conv_bn(8, 6, 5, groups=groups), projection=conv_bn(4, 6, 1)
    )
    plain = folded(net, normal(1, 4, 12, 12))
    assert counts(plain) == (2, 1, 0)
    assert [m.out_channels for m in plain.modules() if isinstance(m, nn.Conv2d)] == [12, 6]


def test_a_stride_in_the_last_convolution() -> None:
    net = block(
        nn.ReLU, conv_bn(4, 8), conv_bn(8, 6, stride=2), projection=conv_bn(4, 6, 1, stride=2, padding=0)
    )
    assert counts(folded(net, normal(1, 4, 12, 12))) == (2, 1, 0)


def test_a_stride_before_the_last_convolution_stays() -> None:
    net = block(
        nn.ReLU, conv_bn(4, 8, stride=2), conv_bn(8, 6), projection=conv_bn(4, 6, 1, stride=2, padding=0)
    )
    assert counts(folded(net, normal(1, 4, 12, 12))) == (3, 2, 1)


def functional(settings: dict[str, Any], own: dict[str, Any]) -> Net:
    def forward(self: Any, x: Tensor) -> Tensor:
        return F.leaky_relu(x, **own) + self.second(F.leaky_relu(self.first(x), **settings))

    return Net(forward, first=conv_bn(3, 5), second=conv_bn(5, 3))


def test_functions_with_equal_settings_match_and_others_do_not() -> None:
    x = normal(1, 3, 12, 12)
    assert counts(folded(functional({"negative_slope": 0.2}, {"negative_slope": 0.2}), x)) == (2, 1, 0)
    assert counts(folded(functional({"negative_slope": 0.2}, {"negative_slope": 0.1}), x)) == (2, 2, 1)
    assert counts(folded(functional({}, {"negative_slope": 0.1}), x)) == (2, 2, 1)


class Prelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.act = conv_bn(3, 3), conv_bn(3, 3), nn.PReLU(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x) + self.second(self.act(self.first(x)))


def bare(activation: Any) -> Net:
    """A block with an identity for its shortcut, behind the activation of the block before."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        return self.act(x + self.second(self.act(self.first(x))))

    return Net(forward, stem=conv_bn(3, 4), first=conv_bn(4, 4), second=conv_bn(4, 4), act=activation())


def test_a_bare_shortcut_passes_where_the_activation_repeats_itself() -> None:
    x = normal(1, 3, 12, 12)
    assert counts(folded(bare(nn.ReLU), x)) == (3, 3, 0)
    assert counts(folded(bare(nn.ReLU6), x)) == (3, 3, 0)
    assert counts(folded(bare(nn.GELU), x)) == (3, 3, 1)


def read_elsewhere(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    inner = F.gelu(self.first(x))
    return F.gelu(x) + self.second(inner), inner.mean()


def side_read_elsewhere(self: Any, x: Tensor) -> Tensor:
    side = F.gelu(x)
    return F.silu(side + self.second(F.gelu(self.first(x)))) * side


def gated(self: Any, x: Tensor) -> Tensor:
    inner = F.gelu(self.first(x))
    return F.gelu(x) + self.second(inner * inner.mean((2, 3), keepdim=True))


def test_what_somebody_else_reads_stays() -> None:
    layers = {"first": conv_bn(3, 5), "second": conv_bn(5, 3)}
    x = normal(1, 3, 12, 12).double()
    for forward, expected in (
        (read_elsewhere, (2, 2, 1)),
        (gated, (2, 2, 1)),
        (side_read_elsewhere, (2, 3, 0)),
    ):
        net = trained(Net(forward, **layers)).double()
        plain = refold.fold(net, x, shortcuts="fold")
        assert counts(plain) == expected, forward.__name__
    assert counts(refold.fold(Prelu().double(), x, shortcuts="fold"))[2] == 1


def test_hooks_keep_their_layer() -> None:
    net = block(nn.GELU, conv_bn(4, 8), nn.Conv2d(8, 4, 1)).double().eval()
    net.layers[1].register_forward_hook(lambda *_: None)
    assert counts(refold.fold(net, normal(1, 4, 12, 12).double(), shortcuts="fold"))[2] == 1


def test_a_block_that_is_called_twice_is_folded_once_for_both() -> None:
    shared = block(nn.GELU, conv_bn(4, 8), conv_bn(8, 4))
    net = Net(lambda self, x: self.block(torch.relu(self.block(x))), block=shared)
    plain = folded(net, normal(1, 4, 12, 12))
    assert counts(plain) == (4, 3, 0)
    assert sum(isinstance(module, nn.Conv2d) for module in plain.modules()) == 2


def test_resnet_loses_the_shortcuts_of_the_blocks_that_keep_the_size() -> None:
    net = trained(timm.create_model("resnet18", num_classes=10))
    x = normal(1, 3, 64, 64, dtype=torch.float32)
    plain = refold.fold(net, x, shortcuts="fold")
    assert plain.fold_report.options == {"objective": "macs", "shortcuts": "fold"}
    # layer1 has two such blocks, the first behind a pooling that keeps what ReLU wrote but is not seen as such.
    assert counts(plain) == (20, 17, 4)
    assert plain.fold_report.proof.folded_distance <= 4 * plain.fold_report.proof.original_distance
    assert plain.fold_report.after.macs > plain.fold_report.before.macs
    again = pickle.loads(pickle.dumps(plain))
    assert torch.equal(again(x), plain(x))


def test_mobilenet_carries_the_map_before_its_last_projection() -> None:
    """Behind a bottleneck without a shortcut the next one starts at a convolution of what ReLU6 wrote."""
    net = trained(timm.create_model("mobilenetv2_035", num_classes=10))
    plain = refold.fold(net, normal(1, 3, 32, 32, dtype=torch.float32), shortcuts="fold")
    assert plain.fold_report.before.operators["add"] == 10
    assert plain.fold_report.after.operators["add"] == 5
    assert plain.fold_report.proof.distance_float64 <= LARGEST


def test_it_says_where_no_shortcut_can_be_folded() -> None:
    net, x = bare(nn.GELU).double(), normal(1, 3, 12, 12)
    plain = refold.fold(net, x, shortcuts="fold", prove=False)
    assert "no shortcut was folded" in plain.fold_report.notes[-1]
    assert plain.fold_report.after == refold.fold(net, x, prove=False).fold_report.after


def test_float16_is_rounded_once() -> None:
    net = block(nn.ReLU, conv_bn(4, 8), conv_bn(8, 4)).half().eval()
    x = normal(1, 4, 12, 12).half()
    plain = refold.fold(net, x, shortcuts="fold")
    kept = refold.fold(net, x)
    assert torch.equal(plain.layers[1][0].weight[:, :8], kept.layers[1][0].weight)


def test_depthwise_kernels_become_one_where_operators_count() -> None:
    net = trained(timm.create_model("mixnet_s", num_classes=10))
    x = normal(1, 3, 64, 64, dtype=torch.float32)
    kept, fewer = (
        refold.fold(net, x, objective=objective).fold_report.after for objective in ("macs", "operators")
    )
    assert fewer.convolutions < kept.convolutions
    assert fewer.operator_count < kept.operator_count
    assert fewer.macs > kept.macs
    assert fewer.batch_norms == kept.batch_norms == 0


def test_dense_convolutions_are_never_widened() -> None:
    """Branches of several sizes that read all channels, and a depthwise convolution before a dense one."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.relu(torch.cat([self.small(x), self.large(x), self.dense(self.depthwise(x))], 1))

    net = Net(
        forward,
        small=conv_bn(6, 6, 1),
        large=conv_bn(6, 6, 5),
        depthwise=conv_bn(6, 6, 3, groups=6),
        dense=conv_bn(6, 6, 1),
    )
    x = normal(1, 6, 12, 12, dtype=torch.float32)
    macs, operators = (
        refold.fold(net, x, objective=each).fold_report.after for each in ("macs", "operators")
    )
    assert operators == macs
    assert macs.convolutions == 4


@pytest.mark.parametrize(("option", "value"), [("objective", "speed"), ("shortcuts", "drop")])
def test_unknown_options_are_refused(option: str, value: str) -> None:
    with pytest.raises(InputError, match=f"{option} is '{value}'; choose '"):
        refold.fold(nn.Conv2d(3, 3, 1), normal(1, 3, 8, 8), **{option: value})
