"""Time by kind of operator, from the profiles of PyTorch and of ONNX Runtime."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import refold
from refold.bench.breakdown import KINDS, from_onnxruntime, kind_of, profile_onnxruntime, profile_torch


@pytest.mark.parametrize(
    ("operator", "shapes", "kind"),
    [
        ("aten::conv2d", [[1, 16, 8, 8], [16, 1, 3, 3]], "depthwise convolution"),
        ("aten::conv2d", [[1, 16, 8, 8], [32, 16, 1, 1]], "1x1 convolution"),
        ("aten::conv2d", [[1, 16, 8, 8], [32, 4, 3, 3]], "k x k convolution"),
        ("aten::conv2d", [[1, 1, 8, 8], [32, 1, 3, 3]], "k x k convolution"),
        ("FusedConv", [[1, 16, 8, 8], [32, 16, 1, 1], [32]], "1x1 convolution"),
        ("Conv", [], "k x k convolution"),
        ("aten::relu_", [], "activation"),
        ("aten::_softmax", [], "activation"),
        ("aten::batch_norm", [], "batch norm"),
        ("aten::add_", [], "add"),
        ("Concat", [], "concatenation"),
        ("Gemm", [], "linear"),
        ("QGemm", [], "linear"),
        ("QLinearConv", [[1, 8, 8, 16], [32, 16, 1, 1]], "1x1 convolution"),
        ("QLinearAdd", [], "add"),
        ("QLinearMul", [], "multiply"),
        ("QLinearConcat", [], "concatenation"),
        ("QLinearGlobalAveragePool", [], "pooling"),
        ("QuantizeLinear", [], "layout"),
        ("DequantizeLinear", [], "layout"),
        ("ReorderOutput", [], "layout"),
        ("Mystery", [], "other"),
    ],
)
def test_kinds(operator: str, shapes: list[list[int]], kind: str) -> None:
    assert kind_of(operator, shapes) == kind
    assert kind in KINDS


def test_onnxruntime_events_are_averaged_without_the_warm_up() -> None:
    def node(operator: str, start: int, duration: int) -> dict[str, Any]:
        shapes = [{"float": [1, 8, 4, 4]}, {"float": [8, 1, 3, 3]}]
        arguments = {"op_name": operator, "input_type_shape": shapes}
        return {
            "cat": "Node",
            "name": f"{operator}_kernel_time",
            "ts": start,
            "dur": duration,
            "args": arguments,
        }

    events: list[dict[str, Any]] = [{"cat": "Session", "name": "model_loading", "ts": 0, "dur": 9}]
    for start in (100, 1000, 2000):
        duration = 900 if start == 100 else start // 10  # the first call is a warm-up
        events += [
            {"cat": "Session", "name": "model_run", "ts": start, "dur": 90},
            node("Conv", start + 1, duration),
            node("Add", start + 2, 50),
            {**node("Add", start + 2, 7), "name": "Add_fence_before"},
        ]
    assert from_onnxruntime(events, warm_up=1) == pytest.approx({"depthwise convolution": 0.15, "add": 0.05})


def test_an_int8_file_is_taken_apart_as_its_network_is(tmp_path: Path) -> None:
    net = nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 32, 1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)),
    ).eval()
    images = torch.randn(40, 3, 16, 16)
    refold.quantize(
        net, tmp_path / "net.onnx", images, config=refold.QuantizationConfig(keep_identity="never")
    )
    found = profile_onnxruntime(tmp_path / "net.onnx", images[:1], threads=1, calls=3, warm_up=1)
    assert {"k x k convolution", "1x1 convolution", "depthwise convolution", "linear"} <= set(found)
    assert "other" not in found


def test_pytorch_counts_what_runs() -> None:
    net = nn.Sequential(
        nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    times = profile_torch(
        nn.Sequential(net, nn.Linear(8, 2)).eval(), torch.randn(1, 4, 8, 8), calls=2, warm_up=1
    )
    assert list(times) == ["1x1 convolution", "linear", "batch norm", "activation", "pooling", "layout"]
    assert min(times.values()) > 0
