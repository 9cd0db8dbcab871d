"""What folding leaves free is used by int8 files: channels that are dead, and scales between layers."""

import torch
from torch import nn

import refold
from chains import Chain


def test_a_file_of_int8_without_dead_channels(tmp_path):
    net = Chain(nn.ReLU).eval()
    with torch.no_grad():
        net.first[0].weight[4] = 0
        net.first[0].bias[4] = -1.0
        net.filter[0].bias[4] = -1.0
    images = torch.randn(40, 3, 12, 12)
    report = refold.quantize(net, tmp_path / "net.onnx", images)
    assert any("1 of 8 channels left out" in gauge for gauge in report.gauges)
    assert {layer.name: layer.channels for layer in report.layers}["first.0.weight"] == 7
    config = refold.QuantizationConfig(weights="tensor", balance=False)
    apart = refold.quantize(net, tmp_path / "apart.onnx", images, config=config)
    config = refold.QuantizationConfig(weights="tensor")
    alike = refold.quantize(net, tmp_path / "alike.onnx", images, config=config)
    assert any("channels scaled" in gauge for gauge in alike.gauges)
    assert alike.agreement.decibels > apart.agreement.decibels + 3
