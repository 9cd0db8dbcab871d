"""Maps that are finer than a network was made for hold the maps that it was made for."""

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import refold
from refold.errors import InputError
from refold.models.registry import _NETWORKS

# One network of each family, the smallest.
FAMILIES: dict[type, str] = {}
for _name, (_family, _) in sorted(_NETWORKS.items(), key=lambda item: item[0]):
    FAMILIES.setdefault(_family, _name)


@pytest.mark.parametrize("name", sorted(set(FAMILIES.values()) - {"cghost_vgg16"}))
def test_the_maps_have_the_strides_that_are_said(name: str) -> None:
    strides = refold.create_model(name, features_only=True).feature_info.reduction()  # type: ignore[union-attr, operator]
    side = 4 * strides[-1]
    for output_stride in strides[-3:-1]:
        net = refold.create_model(name, features_only=True, output_stride=output_stride).eval()
        said = net.feature_info.reduction()  # type: ignore[union-attr, operator]
        assert said == [min(stride, output_stride) for stride in strides]
        with torch.no_grad():
            assert [side // out.shape[-1] for out in net(torch.randn(1, 3, side, side))] == said


@pytest.mark.parametrize(
    ("name", "output_stride"),
    [("repvgg_a0", 8), ("repvgg_a0", 16), ("mobileone_s0", 8), ("repnext_u3_t", 16)],
)
def test_every_other_pixel_of_a_finer_map_is_that_of_the_coarse_one(
    name: str, output_stride: int, randomised: Callable[[nn.Module], nn.Module]
) -> None:
    coarse = randomised(refold.create_model(name)).double()
    fine = refold.create_model(name, output_stride=output_stride).eval().double()
    fine.load_state_dict(coarse.state_dict())
    image = torch.randn(1, 3, 128, 128, dtype=torch.double)
    with torch.no_grad():
        wanted, found = coarse.forward_features(image), fine.forward_features(image)  # type: ignore[operator]
    step = found.shape[-1] // wanted.shape[-1]
    assert step > 1
    assert torch.allclose(found[..., ::step, ::step], wanted, rtol=1e-9, atol=1e-9 * wanted.abs().max())


def test_it_trains_folds_and_loads(randomised: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    net = randomised(refold.create_model("ghostnetv3_050", num_classes=3, output_stride=16))
    image = torch.randn(2, 3, 64, 64)
    net.train()(image).sum().backward()
    plain = refold.fold(net.eval(), image)
    assert plain.fold_report.after.operators.get("batch norm", 0) == 0  # type: ignore[union-attr]
    path = tmp_path / "net.safetensors"
    refold.save(plain, path)
    with torch.no_grad():
        assert torch.allclose(refold.load(path)(image), plain(image))


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(InputError, match="output_stride is 12; choose one of 2, 4, 8, 16, 32"):
        refold.create_model("repvgg_a0", output_stride=12)
    with pytest.raises(InputError, match="halves its maps by MaxPool2d"):
        refold.create_model("cghost_vgg16", output_stride=4)


def test_timm_takes_it_too() -> None:
    net = timm.create_model("refold_repghostnet_100", features_only=True, output_stride=8)
    assert net.feature_info.reduction() == [2, 4, 8, 8, 8]
