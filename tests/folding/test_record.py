"""A fold as data: the record puts the same changes into another network of the architecture, and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from checking import LARGEST, Net, Parallel, call, conv_bn, distance, images, trained
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import refold
from refold.errors import InputError
from refold.folding import apply_record, attempt
from refold.folding.written_graphs import graph_from_data


class Block(nn.Module):
    """Convolution, norm and activation, as detection code writes them: it looks for `bn` when it fuses."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))

    def forward_fuse(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


def fuse(model: nn.Module) -> None:
    """What other people's pipelines do with blocks that have a norm."""
    for module in model.modules():
        if isinstance(module, Block) and hasattr(module, "bn"):
            scale = module.bn.weight / (module.bn.running_var + module.bn.eps).sqrt()
            module.conv.weight.data.mul_(scale[:, None, None, None])
            del module.bn
            module.forward = module.forward_fuse  # type: ignore[method-assign]


def test_no_hollow_norm_stays_in_a_block() -> None:
    model = trained(nn.Sequential(Block(4), nn.MaxPool2d(2), Block(4)).double())
    plain: Any = refold.fold(model, images(4)[0])
    for block in (plain[0], plain[2]):
        assert isinstance(block, Block)
        assert not hasattr(block, "bn")
        assert list(block._modules) == ["conv", "act"]
    x = images(4)[1]
    expected = call(plain, x)
    fuse(plain)
    assert torch.equal(call(plain, x), expected)
    assert distance(call(model, x), expected) <= LARGEST


def test_a_norm_that_methods_of_the_model_need_keeps_its_place() -> None:
    """The model's own methods go on working; a hollow norm is what they need for that."""

    class Model(Block):
        def features(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x))

    model = trained(Model(4).double())
    plain: Any = refold.fold(model, images(4)[0])
    assert type(plain.bn) is nn.Identity
    assert distance(model.features(images(4)[1]), plain.features(images(4)[1])) <= LARGEST


def kinds() -> dict[str, Any]:
    """Networks of every way to write a change, by name, each a function that builds it anew."""
    return {
        "slots": lambda: nn.Sequential(*conv_bn(4, 4), nn.ReLU(), *conv_bn(4, 6, 1)),
        "sequence": lambda: nn.Sequential(Parallel(conv_bn(4, 4), conv_bn(4, 4, 1)), nn.ReLU()),
        "forward": lambda: Net(
            lambda net, x: (net.a(x) + net.b(x)).view(x.size(0), -1).relu(),
            a=conv_bn(4, 4),
            b=conv_bn(4, 4, 1),
        ),
        "block": lambda: nn.Sequential(Block(4), Block(4)),
        "padding": lambda: nn.Sequential(nn.ZeroPad2d((1, 0, 2, 0)), *conv_bn(4, 4), nn.ReLU()),
        "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(4, 3, 3), nn.BatchNorm2d(3)),
        "circular": lambda: nn.Sequential(
            nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular", bias=False), nn.BatchNorm2d(3)
        ),
        "twice": lambda: Net(lambda net, x: net.b(net.b(x)), b=Parallel(conv_bn(4, 4), conv_bn(4, 4, 1))),
        "regrouped": lambda: Net(
            lambda net, x: (net.a(x) + net.c(x.relu())) + net.b(x),
            **{name: conv_bn(4, 4, size) for name, size in (("a", 3), ("b", 1), ("c", 1))},
        ),
    }


@pytest.mark.parametrize("name", kinds())
def test_a_record_makes_the_plain_network_of_another_one(name: str) -> None:
    torch.manual_seed(0)
    plain: Any = refold.fold(trained(kinds()[name]().double()), images(4)[0])
    record = json.loads(json.dumps(plain.fold_report.record))
    torch.manual_seed(1)
    again = apply_record(kinds()[name]().double().eval(), record)
    assert type(again).__name__ == type(plain).__name__
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in plain.state_dict().items()
    }
    again = again.double()
    again.load_state_dict(plain.state_dict())
    for x in images(4):
        assert torch.equal(call(again, x), call(plain, x))


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenetv2_035", "tf_efficientnet_lite0", "repvit_m0_9", "levit_128s"]
)
def test_records_of_networks_of_timm(name: str) -> None:
    model = trained(timm.create_model(name, num_classes=5))
    size = model.pretrained_cfg["input_size"][1] if "levit" in name else 64
    plain: Any = refold.fold(model, torch.randn(1, 3, size, size), prove=False)
    again = apply_record(timm.create_model(name, num_classes=5).eval(), plain.fold_report.record)
    again.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, size, size)
    assert torch.equal(call(again, x), call(plain, x))
    # LeViT's own methods mention its heads, which therefore stay as they were.
    assert "levit" in name or not [m for m in again.modules() if isinstance(m, _BatchNorm)]


def test_a_plain_file_loads_without_planning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(refold.create_model("ghostnetv3_050", num_classes=5))
    plain: Any = refold.fold(model, torch.randn(1, 3, 64, 64))
    refold.save(plain, tmp_path / "a.safetensors")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("planned again")

    monkeypatch.setattr(attempt.Attempt, "carry_out", refuse)
    loaded: Any = refold.load(tmp_path / "a.safetensors")
    x = torch.randn(1, 3, 96, 64)
    assert torch.equal(call(loaded, x), call(plain, x))
    assert loaded.fold_report.to_dict() == plain.fold_report.to_dict()
    refold.save(loaded, tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


def test_a_plain_file_of_before_loads_by_searching(tmp_path: Path) -> None:
    model = trained(refold.create_model("repghostnet_050", num_classes=5))
    plain: Any = refold.fold(model, torch.randn(1, 3, 64, 64))
    plain.fold_report.record = None
    refold.save(plain, tmp_path / "a.safetensors")
    loaded: Any = refold.load(tmp_path / "a.safetensors")
    assert loaded.fold_report.record
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(call(loaded, x), call(plain, x))


@pytest.mark.parametrize(
    "target",
    [
        "torch.load",
        "torch.hub.load",
        "os.system",
        "builtins.eval",
        "operator.methodcaller",
        "torch.ops.load_library",
    ],
)
def test_a_record_runs_no_code(target: str) -> None:
    graph = [
        ["x", "placeholder", "x", {"tuple": []}, {}],
        ["y", "call_function", target, {"tuple": ["/tmp/x"]}, {}],
    ]
    with pytest.raises(ValueError, match="no operator that a fold writes"):
        graph_from_data([*graph, ["output", "output", "output", {"tuple": [{"node": "x"}]}, {}]])
    change = {"place": "", "adds": {}, "tensors": {}, "forward": graph}
    with pytest.raises(InputError, match="does not fit"):
        apply_record(nn.Sequential(nn.ReLU()), [change])


@pytest.mark.parametrize(
    "change",
    [
        {"place": "7", "layer": {"kind": "Identity"}},
        {"place": "0", "layer": {"kind": "Popen"}},
        {"place": "0", "layer": {"kind": "Conv2d", "channels": 3}},
        {"place": "0"},
        {},
    ],
)
def test_a_record_that_does_not_fit_is_one_sentence(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="does not fit this Sequential") as caught:
        apply_record(nn.Sequential(nn.ReLU()), [change])
    assert "\n" not in str(caught.value)


def test_what_has_no_form_as_data_is_said() -> None:
    """A user's own autograd function in code that is rewritten: the fold works, a file has to search again."""

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

    model = Net(lambda net, x: Own.apply(net.a(x) + net.b(x)), a=conv_bn(4, 4), b=conv_bn(4, 4, 1))
    plain: Any = refold.fold(trained(model.double()), images(4)[0])
    assert plain.fold_report.after.convolutions == 1
    assert plain.fold_report.record is None


def test_trainability_and_memory_format_stay() -> None:
    model = trained(nn.Sequential(*conv_bn(4, 8), nn.ReLU(), Parallel(conv_bn(8, 8), conv_bn(8, 8, 1))))
    model = model.to(memory_format=torch.channels_last)
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    plain: Any = refold.fold(model, torch.randn(1, 4, 9, 9))
    first, second = plain[0], next(m for m in plain[3].modules() if isinstance(m, nn.Conv2d))
    assert not first.weight.requires_grad
    assert not first.bias.requires_grad
    assert second.weight.requires_grad
    for layer in (first, second):
        assert layer.weight.is_contiguous(memory_format=torch.channels_last)
