"""Normalization, softmax, half precision and metadata: in the file, and only if asked for."""

import json
from pathlib import Path

import onnx
import pytest
import timm
import torch
from torch import Tensor, nn

import refold
from refold.errors import InputError
from refold.export import get_engine
from refold.export.metadata import read_preprocessing

IMAGE = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    ).eval()


def metadata_of(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def test_normalization_and_softmax_are_in_the_file(tmp_path: Path) -> None:
    net = small_network()
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    path = tmp_path / "net.onnx"
    report = refold.export(
        net, path, IMAGE, normalize=(mean, std), softmax=True, class_names=["ape", "bee", "cat", "Öl"]
    )
    pixels = torch.rand(2, 3, 16, 16)
    normalized = (pixels - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    result = get_engine("onnxruntime").open(path)(pixels)[0]
    assert torch.allclose(result, net(normalized).softmax(dim=1), atol=1e-6)
    metadata = metadata_of(path)
    assert json.loads(metadata["class_names"]) == ["ape", "bee", "cat", "Öl"]
    assert json.loads(metadata["normalization"]) == {"mean": mean, "std": std}
    left = {"mean": [0.0] * 3, "std": [1.0] * 3, "input_size": [3, 16, 16]}
    assert json.loads(metadata["preprocessing"]) == left
    assert metadata["output"] == "probabilities"
    assert [trial.same_top1 for trial in report.trials] == [trial.batch_size for trial in report.trials]


def test_the_models_own_normalization_and_card_are_taken_over(tmp_path: Path) -> None:
    net = small_network()
    with pytest.raises(InputError, match="does not say how its images are normalized"):
        refold.export(net, tmp_path / "x.onnx", IMAGE, normalize=True)
    preprocessing = {"input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.25] * 3}
    refold.save(
        net, tmp_path / "net.safetensors", class_names=["a", "b", "c", "d"], preprocessing=preprocessing
    )
    loaded = refold.load(tmp_path / "net.safetensors", small_network)
    refold.export(loaded, tmp_path / "raw.onnx", IMAGE)
    raw = metadata_of(tmp_path / "raw.onnx")
    assert json.loads(raw["preprocessing"]) == preprocessing
    assert json.loads(raw["class_names"]) == ["a", "b", "c", "d"]
    assert "normalization" not in raw
    refold.export(loaded, tmp_path / "baked.onnx", IMAGE, normalize=True)
    assert json.loads(metadata_of(tmp_path / "baked.onnx")["normalization"])["std"] == [0.25] * 3
    result = get_engine("onnxruntime").open(tmp_path / "baked.onnx")(IMAGE)[0]
    assert torch.allclose(result, net((IMAGE - 0.5) / 0.25), atol=1e-5)


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x @ y.transpose(1, 2)


def test_half_precision_keeps_inputs_and_outputs(tmp_path: Path) -> None:
    net = small_network()
    report = refold.export(net, tmp_path / "half.onnx", IMAGE, half=True)
    assert report.half
    assert 1e-5 < report.relative_difference < 1e-2, "float16 is seen, and is close"
    assert next(net.parameters()).dtype == torch.float32
    assert get_engine("onnxruntime").open(tmp_path / "half.onnx")(IMAGE)[0].dtype == torch.float32
    assert {tensor.data_type for tensor in onnx.load(tmp_path / "half.onnx").graph.initializer} <= {
        onnx.TensorProto.FLOAT16,
        onnx.TensorProto.INT64,
    }
    two = refold.export(
        TwoInputs(), tmp_path / "two.onnx", (torch.randn(1, 2, 3), torch.randn(1, 2, 3)), half=True
    )
    assert two.batch_sizes == [1, 3]


def test_what_does_not_fit_is_one_sentence(tmp_path: Path) -> None:
    net, path = small_network(), tmp_path / "x.onnx"
    with pytest.raises(InputError, match="2 means and 3 standard deviations"):
        refold.export(net, path, IMAGE, normalize=([0.5, 0.5], [1, 1, 1]))
    with pytest.raises(InputError, match="all must be above zero"):
        refold.export(net, path, IMAGE, normalize=([0.5] * 3, [1, 0, 1]))
    with pytest.raises(InputError, match="all must be finite numbers"):
        refold.export(net, path, IMAGE, normalize=([0.5, float("nan"), 0.5], [1, 1, 1]))
    with pytest.raises(InputError, match="it takes 2 inputs"):
        refold.export(TwoInputs(), path, (torch.randn(1, 2, 3), torch.randn(1, 2, 3)), softmax=True)
    with pytest.raises(InputError, match=r"ends in \.onnx, such as .*x\.onnx"):
        refold.export(net, tmp_path / "x.tflite", IMAGE)
    assert list(tmp_path.iterdir()) == []


def test_every_preprocessing_of_timm_is_understood() -> None:
    for name in timm.list_models(pretrained=True):
        config = timm.models.get_pretrained_cfg(name)
        assert config is not None
        assert read_preprocessing(config.to_dict(), name).input_size == tuple(config.input_size)
