"""timm's and torchvision's networks fold: those made for it as far as timm's own conversion goes, and all others."""

import copy
import os
import pickle
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import refold
from golden import drawn_weights
from refold.folding import FoldReport, count

LARGEST = 1e-9

# The input size that is folded here, and the gain of the weights at which the network is stable.
REPARAMETERISED = {
    "repvgg_a0": (64, 0.7),
    "repvgg_b1g4": (32, 0.7),
    "repvgg_d2se": (32, 1.0),
    "mobileone_s1": (64, 0.7),
    "repghostnet_100": (64, 0.7),
    "ghostnetv3_100": (64, 0.5),
    "fastvit_t8": (64, 0.7),
    "repvit_m0_9": (64, 0.7),
}

# Networks that nobody made for folding: input size, convolutions and batch norms that stay, regions.
OTHERS = {
    "resnet50": (64, 53, 0, 53),
    "regnetx_032": (64, 80, 0, 80),
    "densenet121": (64, 120, 62, 59),
    "inception_v3": (96, 94, 0, 94),
    "hrnet_w18": (64, 325, 0, 325),
    "dla34": (64, 38, 0, 37),
    "efficientnet_b0": (64, 81, 0, 49),
    "mobilenetv4_conv_small": (64, 46, 0, 46),
    "vgg16_bn": (64, 15, 0, 13),
    "tf_efficientnet_lite0": (64, 49, 0, 49),
    "convnext_tiny": (64, 22, 0, 18),
    "levit_128s": (224, 4, 0, 51),
}

# Why those batch norms stay, and how many: a norm that reads the growing concatenation of DenseNet is followed by an
# activation, and the output of a transition, an average of a convolution, is read by all the layers behind it too.
REASONS = {
    "densenet121": {
        "it stands between a concatenation and a ReLU, not next to a convolution": 59,
        "as one convolution it would have 131,072 weights, not 32,768": 1,
        "as one convolution it would have 524,288 weights, not 131,072": 1,
        "as one convolution it would have 2,097,152 weights, not 524,288": 1,
    },
}

# Networks of features, and the batch norms that stay. Those of GhostNetV3 and RepGhostNet take the output of the first
# convolution as a feature, without its norm; in DenseNet most norms read a concatenation.
WITH_FEATURES = {
    "densenet121": 62,
    "dla34": 0,
    "efficientnet_b0": 0,
    "fastvit_t8": 0,
    "ghostnetv3_050": 1,
    "hrnet_w18_small": 0,
    "mobileone_s1": 0,
    "repghostnet_050": 1,
    "repvgg_a0": 0,
    "repvit_m0_9": 0,
    "resnet18": 0,
}

# Networks that take images of one size only.
SIZES = {"levit_128s": 224, "levit_conv_128s": 224, "tiny_vit_5m_224": 224}


def drawn(name: str, gain: float = 0.7, **arguments: Any) -> nn.Module:
    """A timm network in float64 and training form, with random weights and batch norm statistics."""
    return with_drawn_weights(timm.create_model(name, **arguments), gain)


def with_drawn_weights(network: nn.Module, gain: float = 0.7) -> nn.Module:
    network = network.double().eval()
    network.load_state_dict(drawn_weights(network, gain))
    return network


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@cache
def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """A network with 10 classes and its plain form; tests must leave both as they are."""
    network = drawn(name, num_classes=10)
    size = SIZES.get(name, 64)
    return network, refold.fold(network, images(1, 3, size, size))


def assert_same(network: nn.Module, plain: nn.Module, *inputs: Tensor) -> None:
    """Both give the same outputs, tensor by tensor, up to rounding in float64."""
    for x in inputs:
        with torch.no_grad():
            expected, found = tensors(network(x.clone())), tensors(plain(x.clone()))
        assert [e.shape for e in expected] == [f.shape for f in found]
        for e, f in zip(expected, found, strict=True):
            assert e.abs().max() > 0
            assert (e - f).abs().max() <= LARGEST * e.abs().max()


def tensors(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)


def left_norms(report: FoldReport, network: nn.Module) -> dict[str, int]:
    """How many batch norms stay for each reason."""
    norms = {name for name, module in network.named_modules() if isinstance(module, _BatchNorm)}
    return dict(Counter(reason for name, reason in report.left if name in norms))


def convolutions_of_timms_conversion(name: str, size: int) -> int:
    converted = timm.utils.reparameterize_model(timm.create_model(name)).to("meta")
    return count(converted, torch.empty(1, 3, size, size, device="meta")).convolutions


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=pytest.mark.slow if name in ("repvgg_b1g4", "repvgg_d2se", "ghostnetv3_100") else ()
        )
        for name in REPARAMETERISED
    ],
)
def test_at_most_as_many_convolutions_as_timms_conversion(name: str) -> None:
    size, gain = REPARAMETERISED[name]
    network = drawn(name, gain)
    plain = refold.fold(network, images(1, 3, size, size))
    report = plain.fold_report
    assert report.before.batch_norms > 0
    assert (report.after.batch_norms, report.left) == (0, [])
    assert report.after.convolutions <= convolutions_of_timms_conversion(name, size)
    assert report.after.macs <= report.before.macs
    assert report.proof.distance_float64 <= LARGEST
    assert_same(network, plain, images(2, 3, size + 32, size))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["repvgg_a0", "fastvit_t8", "ghostnetv3_100"])
def test_at_the_default_size(name: str) -> None:
    network = drawn(name, REPARAMETERISED[name][1])
    size = network.pretrained_cfg["input_size"][-1]
    plain = refold.fold(network, images(1, 3, size, size))
    assert (plain.fold_report.after.batch_norms, plain.fold_report.left) == (0, [])
    assert plain.fold_report.proof.distance_float64 <= LARGEST


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=pytest.mark.slow if name in ("hrnet_w18", "vgg16_bn", "convnext_tiny") else ()
        )
        for name in OTHERS
    ],
)
def test_networks_nobody_meant(name: str) -> None:
    size, convolutions, batch_norms, regions = OTHERS[name]
    network = drawn(name)
    plain = refold.fold(network, images(1, 3, size, size))
    report = plain.fold_report
    assert (report.after.convolutions, report.after.batch_norms) == (convolutions, batch_norms)
    assert len(report.regions) == regions
    assert left_norms(report, network) == REASONS.get(name, {})
    assert report.after.macs <= report.before.macs
    assert isinstance(plain, type(network))
    assert_same(network, plain, images(2, 3, size, size))


def test_torchvisions_mobilenet() -> None:
    network = with_drawn_weights(torchvision.models.mobilenet_v3_large(num_classes=10))
    plain = refold.fold(network, images(1, 3, 64, 64))
    report = plain.fold_report
    assert (report.before.batch_norms, report.after.batch_norms, report.left) == (46, 0, [])
    assert report.after.convolutions == report.before.convolutions == 62
    assert_same(network, plain, images(2, 3, 97, 61))


def test_a_detector_that_takes_a_list_of_images() -> None:
    """Every batch norm folds, and the boxes stay."""
    network = with_drawn_weights(
        torchvision.models.detection.fcos_resnet50_fpn(
            weights=None, weights_backbone=None, num_classes=5, min_size=64, max_size=96
        )
    )
    photos = [images(3, 64, 80).sigmoid()]
    plain = refold.fold(network, (photos,))
    report = plain.fold_report
    assert (report.before.batch_norms, report.after.batch_norms) == (53, 0)
    assert len(report.regions) == 53
    assert report.left == []
    assert report.proof.compared > 1000
    others = [images(3, 64, 96).sigmoid(), images(3, 90, 70).sigmoid()]
    with torch.no_grad():
        expected, found = network(others), plain(others)
    for one, other in zip(expected, found, strict=True):
        assert len(one["scores"]) > 0
        assert torch.equal(one["labels"], other["labels"])
        assert torch.allclose(one["scores"], other["scores"], rtol=1e-9)
        assert torch.allclose(one["boxes"], other["boxes"], rtol=1e-9)


@pytest.mark.parametrize("name", ["repvgg_a0", "repghostnet_050", "fastvit_t8", "efficientnet_b0"])
def test_the_methods_of_the_class_still_work(name: str) -> None:
    network, plain = pair(name)
    x = images(2, 3, 64, 96)
    assert_same(network, plain, x)
    with torch.no_grad():
        features, expected = plain.forward_features(x), network.forward_features(x)
        assert (features - expected).abs().max() <= LARGEST * expected.abs().max()
        hidden, expected = plain.forward_head(features, pre_logits=True), network.forward_head(expected, True)
        assert (hidden - expected).abs().max() <= LARGEST * expected.abs().max()
        assert torch.equal(plain.forward_head(features), plain(x))
    changed = copy.deepcopy(plain)
    assert isinstance(changed.get_classifier(), nn.Module)
    changed.reset_classifier(7)
    changed.to(torch.float64)
    with torch.no_grad():
        assert changed(x).shape == (2, 7)
        assert torch.equal(changed.forward_features(x), features)
    assert plain(x).shape == (2, 10)


@pytest.mark.parametrize("name", ["repvgg_a0", "fastvit_t8", "efficientnet_b0"])
def test_intermediate_features_stay(name: str) -> None:
    network, plain = pair(name)
    x = images(2, 3, 64, 64)
    with torch.no_grad():
        expected = network.forward_intermediates(x, intermediates_only=True)
        found = plain.forward_intermediates(x, intermediates_only=True)
    assert len(expected) == len(found) >= 4
    for e, f in zip(expected, found, strict=True):
        assert (e - f).abs().max() <= LARGEST * e.abs().max()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=pytest.mark.slow if name in ("ghostnetv3_050", "repvit_m0_9", "dla34") else ()
        )
        for name in WITH_FEATURES
    ],
)
def test_feature_networks_fold_and_give_the_same_features(name: str) -> None:
    network = drawn(name, features_only=True)
    plain = refold.fold(network, images(1, 3, 64, 64))
    assert plain.fold_report.after.batch_norms == WITH_FEATURES[name]
    assert plain.fold_report.after.convolutions <= plain.fold_report.before.convolutions
    assert plain.feature_info.channels() == network.feature_info.channels()
    assert_same(network, plain, images(2, 3, 96, 64))


@pytest.mark.parametrize(
    "name",
    ["repvgg_a0", "fastvit_t8", "levit_conv_128s", pytest.param("ghostnetv3_050", marks=pytest.mark.slow)],
)
def test_copies_and_files_of_the_plain_network(name: str, tmp_path: Path) -> None:
    size = SIZES.get(name, 64)
    plain = pair(name)[1]
    x = images(2, 3, size, size)
    with torch.no_grad():
        expected = plain(x)
        assert torch.equal(copy.deepcopy(plain)(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(plain))(x), expected)
        torch.save(plain, tmp_path / "whole.pt")
        assert torch.equal(torch.load(tmp_path / "whole.pt", weights_only=False)(x), expected)


@pytest.mark.parametrize(
    "name",
    ["repvgg_a0", "fastvit_t8", "levit_128s", pytest.param("ghostnetv3_050", marks=pytest.mark.slow)],
)
def test_weights_move_between_plain_networks(name: str, tmp_path: Path) -> None:
    size = SIZES.get(name, 64)
    plain = pair(name)[1]
    x = images(1, 3, size, size)
    torch.save(plain.state_dict(), tmp_path / "weights.pt")
    other = refold.fold(timm.create_model(name, num_classes=10).double(), x)
    with torch.no_grad():
        assert not torch.equal(other(x), plain(x))
        other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
        other.train().eval()  # LeViT of older timm keeps the biases of before until it is trained
        assert torch.equal(other(x), plain(x))


@pytest.mark.parametrize("name", ["repvgg_a0", "repghostnet_050", "fastvit_t8"])
def test_the_plain_network_compiles(name: str) -> None:
    plain = pair(name)[1]
    torch.compiler.reset()
    compiled = torch.compile(plain, backend="aot_eager")
    x = images(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(compiled(x), plain(x), rtol=1e-12)


@pytest.mark.parametrize("name", ["repghostnet_050", pytest.param("fastvit_t8", marks=pytest.mark.slow)])
def test_the_exported_network_takes_any_batch(name: str, tmp_path: Path) -> None:
    plain = copy.deepcopy(pair(name)[1]).float()
    report = refold.export(plain, tmp_path / "plain.onnx", images(2, 3, 64, 64).float())
    assert report.contents.operators["Conv"] == plain.fold_report.after.convolutions
    assert "BatchNormalization" not in report.contents.operators
    session = onnxruntime.InferenceSession(tmp_path / "plain.onnx", providers=["CPUExecutionProvider"])
    (name_of_input,) = (value.name for value in session.get_inputs())
    for batch in (1, 5):
        x = images(batch, 3, 64, 64).float()
        (found,) = session.run(None, {name_of_input: x.numpy()})
        with torch.no_grad():
            expected = plain(x).numpy()
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["repvgg_a0", "repghostnet_050", "fastvit_t8", "efficientnet_b0"])
def test_other_sizes_than_the_one_that_was_folded(name: str) -> None:
    network, plain = pair(name)
    sizes = [(97, 61), (33, 128), (32, 32)]
    assert_same(network, plain, *(images(1, 3, *size) for size in sizes))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name", ["repvit_m0_9", "levit_128s", pytest.param("tiny_vit_5m_224", marks=pytest.mark.slow)]
)
def test_half_precision_of_networks_that_timms_conversion_breaks(name: str, dtype: torch.dtype) -> None:
    size = SIZES.get(name, 32)
    network = drawn(name, 0.5, num_classes=10).to(dtype)
    x = images(1, 3, size, size).to(dtype)
    plain = refold.fold(network, x)
    assert plain.fold_report.after.batch_norms == 0
    assert {value.dtype for value in plain.parameters()} == {dtype}
    with torch.no_grad():
        assert plain(x).dtype == dtype
        assert torch.isfinite(plain(x)).all()
    proof = refold.verify(network, plain, x)
    assert proof.folded_distance <= 4 * proof.original_distance
    assert plain.fold_report.proof.distance_float64 <= LARGEST


@pytest.mark.parametrize("name", ["repvgg_a0", "repghostnet_050", "fastvit_t8", "efficientnet_b0"])
def test_a_second_fold_finds_nothing(name: str) -> None:
    plain = pair(name)[1]
    again = refold.fold(plain, images(1, 3, 64, 64))
    assert again.fold_report.regions == []
    assert again.fold_report.before.operators == again.fold_report.after.operators
    state = plain.state_dict()
    assert list(again.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())


def test_a_model_in_training_mode_is_folded_as_it_evaluates() -> None:
    network = copy.deepcopy(pair("fastvit_t8")[0]).train()
    before = copy.deepcopy(network.state_dict())
    plain = refold.fold(network, images(1, 3, 64, 64))
    assert not plain.training
    assert network.training
    assert "training mode" in plain.fold_report.notes[0]
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert_same(copy.deepcopy(network).eval(), plain, images(1, 3, 64, 64))


_MEASURE_MEMORY = """
import sys
from pathlib import Path
import timm, torch
import refold
torch.set_num_threads(1)
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
refold.fold(timm.create_model("repghostnet_050"), torch.randn(1, 3, 32, 32))
base = peak()
model = timm.create_model(sys.argv[1])
built = peak()
refold.fold(model, torch.randn(1, 3, 32, 32))
weights = sum(value.nbytes for value in model.state_dict().values())
print(base, built, peak(), weights)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the peak of memory is read from /proc")
def test_the_peak_of_memory_is_at_most_three_times_the_model() -> None:
    """A network whose weights outweigh its activations, in a worker process: libraries are counted before."""
    command = [sys.executable, "-c", _MEASURE_MEMORY, "repvgg_b2"]
    # What the allocator of the C library keeps after it was freed is not counted.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    base, built, peak, weights = map(int, done.stdout.split())
    assert built - base >= 0.9 * weights, "the model was not seen in the measurement"
    assert peak - base <= 3 * weights
