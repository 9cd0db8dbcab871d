"""What saturation does to a file, computed with the sums of 16 bits that processors without VNNI have."""

import os
import platform
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import refold


class OneLayer(nn.Module):
    """A 1x1 convolution of 64 channels behind ReLU6, as in inverted bottlenecks."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(64, 64, 1)
        nn.init.normal_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, image):
        return self.conv(image)


def activations(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (4 + 4 * torch.randn(count, 64, 12, 12, generator=generator)).clamp(0, 6)


def as_without_vnni(path, images):
    """The answers of a file of one layer where two products are added in 16 bits."""
    model = onnx.load(path)
    values = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    (node,) = (each for each in model.graph.node if each.op_type == "Conv")
    given = makers[node.input[0]]
    scale, zero = values[given.input[1]], int(values[given.input[2]])
    weight = makers[node.input[1]]
    rows = values[weight.input[0]].astype(np.int64).reshape(64, 64)
    bytes_ = np.clip(np.rint(images.numpy() / scale) + zero, 0, 255).astype(np.int64)
    columns = np.moveaxis(bytes_, 1, 0).reshape(64, -1)
    total = np.zeros((64, columns.shape[1]), np.int64)
    for pair in range(0, 64, 2):
        sums = rows[:, pair : pair + 2] @ columns[pair : pair + 2]
        total += np.clip(sums, -(2**15), 2**15 - 1)
    total -= zero * rows.sum(axis=1, keepdims=True)
    floats = total * scale * values[weight.input[1]].reshape(-1, 1)
    return torch.from_numpy(np.moveaxis(floats.reshape(64, len(images), 12, 12), 0, 1)).float()


def decibels(wanted, found):
    return float(10 * torch.log10(wanted.square().sum() / (wanted - found).square().sum()))


@pytest.fixture(scope="module")
def layer():
    torch.manual_seed(0)
    return OneLayer().eval()


def test_the_default_file_of_onnxruntime_saturates_without_vnni(layer, tmp_path):
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    images = activations(32)
    refold.export(layer, tmp_path / "float.onnx", images[:1])

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.left = [{"image": images.numpy()}]

        def get_next(self):
            return self.left.pop() if self.left else None

    kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(tmp_path / "float.onnx", tmp_path / "peer.onnx", Reader(), per_channel=True, **kinds)
    wanted = layer(images).detach()
    assert decibels(wanted, as_without_vnni(tmp_path / "peer.onnx", images)) < 25


@pytest.mark.parametrize(("cpu", "safe"), [("any", True), ("avx2", True), ("vnni", False)])
def test_the_report_tells_which_file_saturates(layer, tmp_path, cpu, safe):
    images = activations(32)
    path = tmp_path / "ours.onnx"
    report = refold.quantize(layer, path, images, config=refold.QuantizationConfig(cpu=cpu))
    (found,) = report.layers
    assert found.name == "conv.weight"
    wanted = layer(images).detach()
    limited = as_without_vnni(path, images)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    in_float = torch.from_numpy(session.run(None, {"image": images.numpy()})[0])
    if safe:
        assert found.saturating_channels == 0
        # The same, whatever the arithmetic; and near.
        assert decibels(in_float, limited) > 60
        assert decibels(wanted, limited) > 35
    else:
        assert found.saturating_channels > 50
        assert decibels(wanted, limited) < decibels(wanted, in_float) - 10


IN_OPENVINO = """
import sys, torch, refold
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Conv2d(64, 64, 1), torch.nn.ReLU6(), torch.nn.Conv2d(64, 64, 1)).eval()
torch.nn.init.normal_(net[0].weight)
torch.nn.init.normal_(net[2].weight)
images = (4 + 4 * torch.randn(32, 64, 12, 12)).clamp(0, 6)
for cpu in ("any", "vnni"):
    config = refold.QuantizationConfig(cpu=cpu, rotate=False)
    try:
        print(abs(refold.quantize(net, sys.argv[1], images, engine="openvino", config=config).engine_gap) < 1)
    except refold.NotEquivalent as refusal:
        print(refusal)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86 adds in 16 bits")
def test_an_engine_that_saturates_is_refused_with_its_layers(tmp_path):
    pytest.importorskip("openvino")
    # OpenVINO without the processor's dot product of bytes: what an older one would do.
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    told = subprocess.run(
        [sys.executable, "-c", IN_OPENVINO, str(tmp_path / "net.xml")],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    safe, refusal = told.stdout.splitlines()
    assert safe == "True"
    assert refusal.startswith("OpenVINO loses ")
    assert "first at 0.weight, 2.weight; give cpu='any'" in refusal
