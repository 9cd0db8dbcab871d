"""The ghost module for any convolution, what ratios mean, and the complexity ratios against counted modules."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from golden import drawn_weights
from refold.blocks import ConvNorm, GhostConv2d, GhostModule, ghost_compression, ghost_speed_up
from refold.errors import InputError
from refold.folding.fold import fold
from refold.recording.cost import count


def drawn(module: nn.Module) -> nn.Module:
    module.double().load_state_dict(drawn_weights(module, gain=0.7))
    return module.eval()


def image(channels: int) -> Tensor:
    return torch.randn(2, channels, 9, 7, dtype=torch.float64)


@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 3, "stride": 2, "padding": 1, "bias": False, "norm": nn.BatchNorm2d},
        {
            "kernel_size": (3, 1),
            "stride": (1, 2),
            "dilation": 2,
            "padding_mode": "reflect",
            "padding": (2, 0),
        },
        {"kernel_size": 3, "padding": "same", "groups": 2, "ratio": 3},
        {"kernel_size": 5, "padding": 1, "cheap_kernel_size": 5, "ratio": 4, "norm": nn.BatchNorm2d},
    ],
)
@pytest.mark.parametrize("activation", [nn.Hardswish(), None])
def test_it_has_the_shape_of_the_convolution_and_the_function_of_a_ghost_module(
    arguments: dict[str, object], activation: nn.Module | None
) -> None:
    module = drawn(GhostConv2d(4, 12, activation=activation, **arguments))
    layer = {
        key: value for key, value in arguments.items() if key not in ("ratio", "cheap_kernel_size", "norm")
    }
    x = image(4)
    out = module(x)
    assert out.shape == nn.Conv2d(4, 12, **layer).double()(x).shape
    primary = module.primary(x)
    assert torch.equal(out[:, : primary.shape[1]], primary)
    cheap = module.cheap.conv
    assert (cheap.groups, cheap.in_channels) == (primary.shape[1], primary.shape[1])
    assert cheap.kernel_size == (arguments.get("cheap_kernel_size", 3),) * 2
    ghosts = F.conv2d(
        primary if activation is None else activation(primary),
        cheap.weight,
        cheap.bias,
        padding=cheap.padding,
        groups=cheap.groups,
    )
    if "norm" in arguments:
        ghosts = module.cheap.bn(ghosts)
    assert torch.allclose(out[:, primary.shape[1] :], ghosts, rtol=1e-12)
    has_bias = arguments.get("bias", True)
    assert (module.primary.conv.bias is not None) == (cheap.bias is not None) == has_bias


def test_before_its_activation_it_is_the_ghost_module() -> None:
    ours = drawn(GhostModule(5, 9, activation=True, kernel_size=3, stride=2, ratio=2))
    other = (
        GhostConv2d(5, 9, 3, stride=2, padding=1, bias=False, norm=nn.BatchNorm2d, activation=nn.ReLU())
        .double()
        .eval()
    )
    other.load_state_dict(ours.state_dict())
    x = image(5)
    assert torch.allclose(other(x).relu(), ours(x), rtol=1e-12)


@pytest.mark.parametrize("activation", [True, False])
def test_a_ratio_of_1_is_the_plain_layer(activation: bool) -> None:
    module = drawn(GhostModule(5, 8, activation=activation, kernel_size=3, stride=2, ratio=1))
    plain = ConvNorm(5, 8, 3, stride=2, activation=activation).double().eval()
    plain.load_state_dict({key.removeprefix("primary."): value for key, value in module.state_dict().items()})
    x = image(5)
    assert torch.equal(module(x), plain(x))


def test_a_single_channel_has_no_ghosts() -> None:
    assert GhostModule(5, 1, activation=True, ratio=2).cheap is None
    assert GhostConv2d(5, 1, 3, ratio=4).cheap is None


@pytest.mark.parametrize("build", [GhostModule, GhostConv2d])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 0}, "ratio is 0; give 2 or more, or 1"),
        ({"cheap_kernel_size": 4}, "cheap_kernel_size is 4; give an odd number"),
        ({"cheap_kernel_size": -1}, "cheap_kernel_size is -1"),
    ],
)
def test_what_no_ghost_module_can_have_is_refused(
    build: type[nn.Module], arguments: dict[str, int], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        build(4, 8, kernel_size=3, **{"activation": True if build is GhostModule else None} | arguments)


def test_groups_must_divide_the_primary_channels() -> None:
    with pytest.raises(InputError, match="12 channels has 6 primary channels at ratio 2, which its 4 groups"):
        GhostConv2d(4, 12, 3, groups=4)


def test_it_folds() -> None:
    module = nn.Sequential(
        drawn(GhostConv2d(3, 8, 3, padding=1, norm=nn.BatchNorm2d, activation=nn.SiLU())), nn.SiLU()
    )
    x = image(3)
    plain = fold(module, x)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in plain.modules())
    assert torch.allclose(plain(x), module(x), rtol=1e-9)


@given(
    in_channels=st.integers(1, 12),
    primary=st.integers(1, 6),
    kernel_size=st.sampled_from([1, 3, 5]),
    ratio=st.integers(1, 5),
    cheap_kernel_size=st.sampled_from([1, 3, 5, 7]),
)
def test_the_complexity_ratios_are_those_of_counted_modules(
    in_channels: int, primary: int, kernel_size: int, ratio: int, cheap_kernel_size: int
) -> None:
    shape = {"kernel_size": kernel_size, "padding": kernel_size // 2, "bias": False}
    cheap = {"ratio": ratio, "cheap_kernel_size": cheap_kernel_size}
    with torch.device("meta"):
        x = torch.empty(1, in_channels, 6, 5)
        plain = count(nn.Conv2d(in_channels, primary * ratio, **shape), x)
        ghost = count(GhostConv2d(in_channels, primary * ratio, **shape, **cheap), x)
    assert ghost_speed_up(in_channels, kernel_size=kernel_size, **cheap) == pytest.approx(
        plain.macs / ghost.macs, rel=1e-12
    )
    assert ghost_compression(in_channels, kernel_size=kernel_size, **cheap) == pytest.approx(
        plain.parameters / ghost.parameters, rel=1e-12
    )


def test_the_complexity_ratio_of_equal_kernels_is_the_papers_short_form() -> None:
    for channels, ratio in [(1, 2), (16, 3), (512, 2)]:
        short = ratio * channels / (ratio + channels - 1)
        for kernel in (1, 3):
            assert ghost_speed_up(
                channels, kernel_size=kernel, ratio=ratio, cheap_kernel_size=kernel
            ) == pytest.approx(short)
    with pytest.raises(InputError, match="ratio is 0"):
        ghost_compression(4, ratio=0)
