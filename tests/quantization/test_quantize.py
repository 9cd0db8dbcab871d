import copy
import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from quantised_networks import Ladder, lively, photos
from torch import nn

import refold
from refold.export.metadata import read_description
from refold.export.onnxruntime import read_metadata
from refold.quantization.columns import layout_of
from refold.quantization.integers import PAIR_LIMIT, Pairs


@pytest.fixture(scope="module")
def ladder():
    return lively(Ladder())


@pytest.fixture(scope="module")
def written(ladder, tmp_path_factory):
    path = tmp_path_factory.mktemp("int8") / "ladder.int8.onnx"
    report = refold.quantize(ladder, path, photos(64), held_out=photos(200, seed=5))
    return path, report


def run(path, images, *, optimised=True):
    options = onnxruntime.SessionOptions()
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(value) for value in session.run(None, {"image": images.numpy()})]


def decibels(wanted, found):
    return float(10 * torch.log10(wanted.square().sum() / (wanted - found).square().sum()))


def constants(path):
    return {each.name: numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer}


def test_the_report_says_what_the_file_does(ladder, written):
    path, report = written
    images = photos(200, seed=5)
    with torch.no_grad():
        wanted = ladder(images)
    (found,) = run(path, images)
    assert report.agreement.images == 200
    assert report.agreement.decibels == pytest.approx(decibels(wanted, found), abs=0.01)
    assert report.agreement.same == int((wanted.argmax(1) == found.argmax(1)).sum())
    assert report.agreement.decibels > 20
    assert report.bytes == path.stat().st_size
    assert json.loads(json.dumps(report.to_dict()))["saturating_channels"] == 0


def test_every_channel_in_the_file_is_safe_and_reported(written):
    path, report = written
    values = constants(path)
    model = onnx.load(path)
    makers = {name: node for node in model.graph.node for name in node.output}
    seen = {}
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            name = makers[node.input[1]].input[0]
            weight = values[name]
            assert weight.dtype == np.int8
            layout = layout_of(node, weight.shape)
            rows = torch.from_numpy(layout.rows(weight.astype("f4"))).flatten(0, 1)
            # Worst activations: 255 wherever a weight has one sign.
            if not layout.is_depthwise:
                for partner in Pairs.of(layout.columns, layout.channels).partners:
                    for sign in (1, -1):
                        side = 255 * (sign * rows).clamp_min(0)
                        neighbour = side[:, partner] * (partner != torch.arange(len(partner)))
                        assert (side + neighbour).max() <= 2**15 - 1 + (sign < 0)
            seen[name.removesuffix("_quantized")] = len(rows)
    assert seen == {layer.name: layer.channels for layer in report.layers}
    assert len(seen) == 6
    assert all(0 < layer.largest_pair <= PAIR_LIMIT for layer in report.layers)


def test_engine_and_float_arithmetic_of_the_file_agree(written):
    path, report = written
    images = photos(64, seed=5)
    assert abs(report.engine_gap) < 1
    assert decibels(run(path, images, optimised=False)[0], run(path, images)[0]) > 30


def test_integers_run_inside_and_the_output_is_not_rounded(written):
    path, _ = written
    images = photos(300, seed=9)
    (found,) = run(path, images)
    # 256 steps would leave at most 256 values.
    assert len(found.unique()) > 1000
    assert len([t for t in onnx.load(path).graph.node if t.op_type == "QuantizeLinear"]) >= 6


def test_it_beats_what_onnxruntime_writes_by_default(ladder, tmp_path):
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    images, test = photos(64), photos(200, seed=5)
    refold.export(ladder, tmp_path / "float.onnx", images[:1])

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.left = [{"image": images.numpy()}]

        def get_next(self):
            return self.left.pop() if self.left else None

    quantize_static(
        tmp_path / "float.onnx",
        tmp_path / "peer.onnx",
        Reader(),
        per_channel=True,
        weight_type=QuantType.QInt8,
        activation_type=QuantType.QUInt8,
        # The best that this processor can show: computed in float arithmetic, nothing saturates.
    )
    report = refold.quantize(ladder, tmp_path / "ours.onnx", images, held_out=test)
    with torch.no_grad():
        wanted = ladder(test)
    peer = run(tmp_path / "peer.onnx", test, optimised=False)[0]
    assert report.agreement.decibels > decibels(wanted, peer) + 2


def test_each_part_is_worth_something(ladder, tmp_path):
    def distance(**settings):
        config = refold.QuantizationConfig(**settings)
        found = refold.quantize(
            ladder, tmp_path / "net.onnx", photos(64), config=config, held_out=photos(200, seed=5)
        )
        return found.agreement.decibels

    whole = distance()
    assert distance(round_together=False, correct_bias=False) < whole - 1
    assert distance(bits=4) < whole - 5
    assert distance(weights="tensor") <= whole + 0.5


def test_the_file_says_what_the_network_said(ladder, tmp_path):
    path = tmp_path / "named.onnx"
    names = [f"class {index}" for index in range(10)]
    refold.quantize(ladder, path, photos(40), class_names=names)
    said = read_description(read_metadata(path), path)
    assert said.class_names == names
    assert said.inputs[0].shape == ["batch", 3, 32, 32]


def test_an_onnx_file_is_quantised_as_its_network_is(ladder, tmp_path, written):
    ladder = copy.deepcopy(ladder)
    ladder.pretrained_cfg = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_pct": 0.9}
    images = photos(64)
    refold.export(ladder, tmp_path / "net.onnx", images[:1], fold=False)
    found = refold.quantize(
        tmp_path / "net.onnx", tmp_path / "net.int8.onnx", images, held_out=photos(200, seed=5)
    )
    assert found.agreement.decibels > written[1].agreement.decibels - 1
    assert len(found.layers) == len(written[1].layers)
    said = read_description(read_metadata(tmp_path / "net.int8.onnx"), tmp_path / "net.int8.onnx")
    assert said.preprocessing.mean == (0.1, 0.2, 0.3), "what the file says of its images is kept"
    with pytest.raises(refold.InputError, match="There is no file"):
        refold.quantize(tmp_path / "none.onnx", tmp_path / "net.int8.onnx", images)


def test_constants_that_operators_make_are_constants(ladder, tmp_path, written):
    refold.export(ladder, tmp_path / "net.onnx", photos(1), fold=False)
    model = onnx.load(tmp_path / "net.onnx")
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        # As PyTorch before 2.7 and other exporters write them.
        if node.op_type == "Clip" and node.input[1] in constants:
            for place, name in enumerate(node.input[1:], start=1):
                own = f"bound_{len(nodes)}"
                nodes.append(onnx.helper.make_node("Constant", [], [own], value=constants[name]))
                nodes.append(onnx.helper.make_node("CastLike", [own, node.input[0]], [f"{own}_like"]))
                node.input[place] = f"{own}_like"
        nodes.append(node)
    assert [node.op_type for node in nodes].count("CastLike") == 6
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, tmp_path / "net.onnx")
    found = refold.quantize(
        tmp_path / "net.onnx", tmp_path / "net.int8.onnx", photos(64), held_out=photos(200, seed=5)
    )
    assert found.agreement.decibels > written[1].agreement.decibels - 1
    # A Clip of known bounds goes into the rounding.
    assert "Clip" not in [node.op_type for node in onnx.load(tmp_path / "net.int8.onnx").graph.node]


def test_a_training_form_is_folded_first(tmp_path):
    net = refold.create_model("repghostnet_050", num_classes=7).eval()
    report = refold.quantize(net, tmp_path / "net.onnx", torch.randn(40, 3, 64, 64))
    graph = onnx.load(tmp_path / "net.onnx").graph
    assert not [node for node in graph.node if node.op_type == "BatchNormalization"]
    assert report.saturating_channels == 0
    assert report.agreement.images == 40
    assert report.notes[0].startswith("The agreement was measured on the images that")


def test_several_outputs_and_a_layer_left_in_float(tmp_path):
    net = lively(Ladder(heads=2))
    images = photos(64)
    config = refold.QuantizationConfig(in_float=["heads.1"])
    report = refold.quantize(net, tmp_path / "two.onnx", images, config=config)
    assert report.in_float == ["heads.1.weight"]
    assert "heads.1.weight" not in [layer.name for layer in report.layers]
    with torch.no_grad():
        wanted = net(images)
    for value, found in zip(wanted, run(tmp_path / "two.onnx", images), strict=True):
        assert decibels(value, found) > 20


def test_layers_are_left_in_float_until_few_enough_answers_are_lost(tmp_path):
    net = lively(Ladder())
    images = photos(64)
    rough = refold.quantize(net, tmp_path / "rough.onnx", images, config=refold.QuantizationConfig(bits=3))
    assert rough.agreement.drop > 10
    config = refold.QuantizationConfig(bits=3, max_drop=10)
    near = refold.quantize(net, tmp_path / "near.onnx", images, config=config)
    assert near.agreement.drop <= 10
    assert 0 < len(near.in_float) < 6


def test_right_answers_are_counted_by_the_labels(ladder, tmp_path):
    images = photos(50)
    with torch.no_grad():
        labels = ladder(images).argmax(1)
    labels[:5] = (labels[:5] + 1) % 10
    found = refold.quantize(ladder, tmp_path / "net.onnx", images, labels=labels).agreement
    assert found.float_right == 45
    assert found.drop == pytest.approx(100 * (45 - found.right) / 50)


@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        (torch.zeros(0, 3, 32, 32), "The images are none; give a few hundred"),
        (torch.ones(4, 3, 32, 32), "of one colour each"),
        (torch.full((4, 3, 32, 32), float("nan")), "NaN or infinity"),
        (torch.zeros(4, 3, 32, 32, dtype=torch.uint8), "floating point"),
        ("photos", "give a tensor"),
    ],
)
def test_images_of_no_use_are_refused(ladder, tmp_path, images, sentence):
    with pytest.raises(refold.InputError, match=sentence):
        refold.quantize(ladder, tmp_path / "net.onnx", images)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_quantised_is_refused(ladder, tmp_path):
    path, images = tmp_path / "net.onnx", photos(4)
    with pytest.raises(refold.InputError, match="no convolution or linear layer"):
        refold.quantize(nn.ReLU(), path, images)
    broken = lively(Ladder())
    broken.heads[0].weight.data[0, 0] = float("nan")
    with pytest.raises(refold.RefoldError):
        refold.quantize(broken, path, images)
    with pytest.raises(refold.InputError, match=r"no layer 'head.9'.*heads.0.weight"):
        refold.quantize(ladder, path, images, config=refold.QuantizationConfig(in_float=["head.9"]))
    with pytest.raises(refold.InputError, match="one whole number for each of 4"):
        refold.quantize(ladder, path, images, labels=[1, 2])
    with pytest.raises(refold.InputError, match="NVIDIA"):
        refold.quantize(ladder, path, images, engine="tensorrt")
    with pytest.raises(refold.InputError, match="There is no engine 'tvm'"):
        refold.quantize(ladder, path, images, engine="tvm")
    with pytest.raises(refold.InputError, match=r"ends in .onnx"):
        refold.quantize(ladder, tmp_path / "net.tflite", images)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "settings",
    [{"cpu": "z80"}, {"weights": "row"}, {"bits": 1}, {"keep_identity": "yes"}, {"max_drop": -1.0}],
)
def test_settings_are_checked(settings):
    with pytest.raises(refold.InputError, match=next(iter(settings))):
        refold.QuantizationConfig(**settings)


def test_training_mode_few_and_constant_images_are_said(tmp_path):
    net = lively(Ladder()).train()
    images = photos(6)
    images[0] = 1.0
    notes = " ".join(refold.quantize(net, tmp_path / "net.onnx", images, labels=[3] * 6).notes)
    assert net.training
    for words in ("in training mode", "1 of 6 images are of one colour", "6 images are few", "of one class"):
        assert words in notes


def test_openvino_runs_the_same_integers(ladder, tmp_path):
    pytest.importorskip("openvino")
    report = refold.quantize(
        ladder, tmp_path / "net.xml", photos(64), engine="openvino", held_out=photos(100, seed=5)
    )
    assert report.agreement.decibels > 20
    assert (tmp_path / "net.bin").is_file()


class Plain(nn.Module):
    """Dense layers of one width, as a folded RepVGG has them, with identities on their diagonals."""

    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU()]
        for _ in range(4):
            layers += [nn.Conv2d(16, 16, 3, 1, 1), nn.ReLU()]
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(16, 10)
        with torch.no_grad():
            for layer in self.layers[2::2]:
                layer.weight.mul_(0.5)
                layer.weight[:, :, 1, 1] += torch.eye(16) * (0.8 + 0.4 * torch.rand(16, 1))

    def forward(self, image):
        return self.head(self.layers(image).mean((2, 3)))


def test_identities_are_kept_out_where_it_is_asked_for(tmp_path):
    net, images = Plain().eval(), photos(64)

    def quantised(keep, bits):
        config = refold.QuantizationConfig(keep_identity=keep, bits=bits)
        return refold.quantize(net, tmp_path / "net.onnx", images, config=config)

    folded, beside = quantised("never", 4), quantised("always", 4)
    assert folded.kept_out == []
    assert len(beside.kept_out) == 4
    assert beside.agreement.decibels > folded.agreement.decibels + 3
    assert beside.saturating_channels == 0
    chosen = quantised("auto", 4)
    assert any("Branches beside their kernels: +" in note for note in chosen.notes)
    assert chosen.agreement.decibels in (
        pytest.approx(folded.agreement.decibels),
        pytest.approx(beside.agreement.decibels),
    )


def test_weights_alone_are_integers_of_four_bits(tmp_path):
    net, images, test = lively(Ladder()), photos(40), photos(200, seed=5)
    path = tmp_path / "net.onnx"
    config = refold.QuantizationConfig(activations="float32", bits=4)
    report = refold.quantize(net, path, images, config=config, held_out=test)
    model = onnx.load(path)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert {kinds[f"{layer.name}_quantized"] for layer in report.layers} == {onnx.TensorProto.INT4}
    assert len(report.layers) == 6
    assert not [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert report.saturating_channels == 0
    with torch.no_grad():
        wanted = net(test)
    assert report.agreement.decibels == pytest.approx(decibels(wanted, run(path, test)[0]), abs=0.01)
    assert report.agreement.decibels > 6
    eight = refold.QuantizationConfig(activations="float32")
    near = refold.quantize(net, tmp_path / "eight.onnx", images, config=eight, held_out=test)
    assert near.agreement.decibels > report.agreement.decibels + 15
    assert report.bytes < near.bytes


def test_zero_points_stand_in_the_file_once(written):
    path, _ = written
    graph = onnx.load(path).graph
    assert not graph.value_info
    points = {node.input[2] for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")}
    values = [each.raw_data + bytes([each.data_type]) for each in graph.initializer if each.name in points]
    assert len(set(values)) == len(values)
    read = {name for node in graph.node for name in node.input}
    assert {each.name for each in graph.initializer} <= read


def test_a_detectors_boxes_are_counted(tmp_path):
    torch.manual_seed(0)
    net = refold.create_model("dense/repghostnet_050", num_classes=3).eval()
    images = photos(12, 64)
    report = refold.quantize(net, tmp_path / "net.onnx", images)
    found = report.agreement
    assert found.kind == "boxes"
    assert found.same <= found.counted
    assert found.decibels > 15
    assert report.saturating_channels == 0


def test_a_segmenters_pixels_are_counted(tmp_path):
    torch.manual_seed(0)
    net = refold.create_model("lraspp/mobilenetv3_small_050", num_classes=3).eval()
    found = refold.quantize(net, tmp_path / "net.onnx", photos(8, 64)).agreement
    assert found.kind == "pixels"
    assert found.counted == 8 * 64 * 64
    assert found.drop == pytest.approx(100 * (found.counted - found.same) / found.counted)
