import copy

import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from quantised_networks import Ladder, lively, photos
from torch.nn import functional as F

import refold
from refold.quantization.checking import layer_reports
from refold.quantization.filling import Filled
from refold.quantization.rounded import RoundedNetwork
from refold.quantization.skeleton import Graph


@pytest.fixture(scope="module")
def plain():
    return refold.fold(lively(Ladder()), photos(1))


def rounded(plain, folder, **settings):
    found = Filled(plain, folder, photos(40), refold.QuantizationConfig(**settings), None)
    found.fill()
    return RoundedNetwork(found, plain)


def constants(path):
    return {each.name: numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer}


def answers(path, images):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"image": images.numpy()})[0])


def decibels(wanted, found):
    return float(10 * torch.log10(wanted.square().sum() / (wanted - found).square().sum()))


def learn(net, steps, rate):
    teacher = net.plain
    optimizer = torch.optim.AdamW(net.parameters(), rate)
    for step in range(steps):
        images = photos(16, seed=50 + step)
        loss = F.mse_loss(net(images), teacher(images).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("settings", [{}, {"bits": 4}, {"weights": "tensor"}, {"in_float": ["last.0"]}])
def test_it_starts_as_the_file_that_was_found(plain, tmp_path, settings):
    net = rounded(plain, tmp_path, **settings)
    net.write(tmp_path / "written.onnx")
    before, after = constants(tmp_path / "int8.onnx"), constants(tmp_path / "written.onnx")
    assert before.keys() == after.keys()
    assert all(
        (before[name] == after[name]).all() and before[name].dtype == after[name].dtype for name in before
    )
    assert net.start == onnx.load(tmp_path / "int8.onnx").SerializeToString()
    images = photos(100, seed=5)
    with torch.no_grad():
        assert decibels(net(images), answers(tmp_path / "int8.onnx", images)) > 40


@pytest.mark.parametrize("settings", [{}, {"bits": 4}])
def test_the_file_computes_what_was_trained(plain, tmp_path, settings):
    net = rounded(plain, tmp_path, **settings)
    start = copy.deepcopy(net)
    # So fast that weights run into every bound.
    learn(net, 15, 1.0)
    path = tmp_path / "trained.onnx"
    net.write(path)
    changed = constants(path)
    before = constants(tmp_path / "int8.onnx")
    assert any((changed[name] != before[name]).any() for name in changed)
    assert all((changed[name] == before[name]).all() for name in changed if "scale" in name or "zero" in name)
    layers = layer_reports(Graph(onnx.load(path)), [], 8)
    assert sum(layer.saturating_channels for layer in layers) == 0
    assert max(layer.largest_pair for layer in layers) > (100 if settings == {} else 7)
    images = photos(100, seed=5)
    with torch.no_grad():
        wanted, back = net(images), start.with_integers(path)(images)
    assert decibels(wanted, answers(path, images)) > 40
    assert decibels(wanted, back) > 60


def test_learning_brings_it_nearer(plain, tmp_path):
    net = rounded(plain, tmp_path, bits=4)
    images = photos(100, seed=5)
    wanted = plain(images).detach()
    before = decibels(wanted, net(images).detach())
    learn(net, 40, 0.003)
    assert decibels(wanted, net(images).detach()) > before + 3


def test_it_knows_what_the_float_network_knows_and_is_no_part_of_it(plain, tmp_path):
    net = rounded(plain, tmp_path)
    assert net.plain is plain
    assert net.fold_report is plain.fold_report
    assert copy.deepcopy(net).plain is plain
    assert {name.rpartition(".")[2] for name, _ in net.named_parameters()} == {"value"}
    assert not [name for name in net.state_dict() if "stem.0" in name]
    with pytest.raises(AttributeError):
        _ = net.nothing_of_the_kind


def test_an_operator_without_gradient_is_named(plain, tmp_path, monkeypatch):
    # All are taken for those that only ONNX's own evaluator runs.
    monkeypatch.setattr("refold.quantization.rounded.Evaluated", object)
    with pytest.raises(refold.InputError, match=r"The operator \w+ of the network has no gradient here"):
        rounded(plain, tmp_path)
