import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

import refold


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, and photos of two classes."""
    folder = tmp_path_factory.mktemp("quantize")
    net = refold.create_model("repghostnet_050", num_classes=2).eval()
    refold.save(
        net, folder / "net.safetensors", preprocessing={"input_size": [3, 64, 64]}, class_names=["cat", "dog"]
    )
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(12):
            pixels = generator.integers(0, 255, (9, 9, 3), np.uint8)
            image = Image.fromarray(pixels).resize((80, 70), Image.Resampling.BICUBIC)
            image.save(folder / "photos" / name / f"{number:02}.jpg")
    return folder


def test_a_checkpoint_becomes_an_int8_file_that_predicts(call, folder):
    code, out, err = call(
        *("quantize", folder / "net.safetensors", "--data", folder / "photos", "-o", "net.int8.onnx"),
        *("--labels", "--images", 12, "--report", "report.json"),
    )
    assert code == 0, err
    for words in ("net.int8.onnx", "right answers", "of 12", "could saturate", "0 of", "latency", "dB"):
        assert words in out
    report = json.loads(Path("report.json").read_text())
    assert report["agreement"]["images"] == 12
    assert report["agreement"]["right"] is not None
    assert report["saturating_channels"] == 0
    assert any("12 images are few" in note for note in report["notes"])
    kinds = {tensor.data_type for tensor in onnx.load("net.int8.onnx").graph.initializer}
    assert onnx.TensorProto.INT8 in kinds
    code, out, err = call("predict", "net.int8.onnx", folder / "photos" / "cat" / "00.jpg", "--json")
    assert code == 0
    (found,) = json.loads(out)
    assert {each["name"] for each in found["classes"]} == {"cat", "dog"}


def test_the_report_as_json(call, folder):
    code, out, _ = call(
        *("quantize", folder / "net.safetensors", "--data", folder / "photos", "-o", "net.onnx"),
        *("--bits", 4, "--weights", "tensor", "--cpu", "vnni", "--json"),
    )
    report = json.loads(out)
    assert code == 0
    assert (report["bits"], report["weights"], report["cpu"]) == (4, "tensor", "vnni")
    assert max(layer["largest_pair"] for layer in report["layers"]) <= 14


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--engine", "coreml"), "There are no int8 files for Core ML: its activations cannot"),
        (("--engine", "ncnn"), "ncnn2int8) is not in its Python packages"),
        (("--cpu", "z80"), "cpu is 'z80'; choose one of: avx2, vnni, arm, any."),
        (("--max-drop", "-3"), "max_drop is -3.0; give percentage points from 0 to 100."),
        (("--data", "nothing"), "There is no image 'nothing'; check the path."),
        (("-o", "net.tflite"), "ends in .onnx"),
        (("-o", "nowhere/net.onnx"), "the folder 'nowhere' does not exist"),
        (("--in-float", "head.fd"), "There is no layer 'head.fd' to leave in float; there are: "),
        (("--images", "0"), "--images"),
    ],
)
def test_mistakes_are_one_line(call, folder, options, sentence):
    given = {"--data": str(folder / "photos"), "-o": "net.onnx"} | {options[0]: options[1]}
    code, out, err = call(
        "quantize", folder / "net.safetensors", *(w for pair in given.items() for w in pair)
    )
    assert code == 2
    assert out == ""
    assert sentence in err.splitlines()[-1]


def test_a_network_that_is_not_finite_is_refused(call, folder, tmp_path):
    net = refold.create_model("repghostnet_050", num_classes=2)
    with torch.no_grad():
        net.get_classifier().weight[0, 0] = float("nan")
    refold.save(net, "nan.safetensors", preprocessing={"input_size": [3, 64, 64]})
    code, _, err = call("quantize", "nan.safetensors", "--data", folder / "photos", "-o", "net.onnx")
    assert code == 2
    assert "NaN" in err or "not finite" in err
