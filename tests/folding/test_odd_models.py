"""Models that are not written as the textbook has them: calls by name, other compilers' modules, foreign containers."""

import copy
import pickle
import threading
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from checking import LARGEST, Net, Parallel, call, check_fold, conv_bn, distance, images, trained
from torch import Tensor, fx, nn
from torchvision.models.feature_extraction import create_feature_extractor

import refold
from refold.errors import InputError, NotEquivalent


def branches(act: nn.Module | None = None) -> Parallel:
    return Parallel(conv_bn(4, 4, 3), conv_bn(4, 4, 1), act=act)


def test_layers_called_by_name() -> None:
    model = Net(
        lambda net, x: net.bn(input=net.conv(input=x)).relu(), conv=nn.Conv2d(4, 4, 3), bn=nn.BatchNorm2d(4)
    )
    check_fold(model, images(4), convolutions=1)


class Reads(nn.Module):
    """Reads one of its two inputs."""

    def __init__(self, second: bool) -> None:
        super().__init__()
        self.second = second
        self.a, self.b = conv_bn(4, 4, 3), conv_bn(4, 4, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = y if self.second else x
        return self.a(z) + self.b(z)


@pytest.mark.parametrize("second", [False, True])
def test_a_block_that_ignores_an_input_still_takes_it(second: bool) -> None:
    model = Net(lambda net, x: net.block(x.relu(), x.sigmoid()).relu(), block=Reads(second))
    check_fold(model, images(4), convolutions=1)


def test_a_block_called_by_position_and_by_name() -> None:
    """A bare convolution would not know the name of the block's argument."""

    def forward(net: Net, x: Tensor) -> Tensor:
        return net.block(x).relu() + net.block(x=x.sigmoid()).relu()

    model = trained(Net(forward, block=branches(nn.Identity())).double())
    plain: Any = refold.fold(model, images(4)[0])
    assert plain.fold_report.after.convolutions == 2
    assert distance(call(model, images(4)[1]), call(plain, images(4)[1])) <= LARGEST


class Switchable(nn.Module):
    """Chooses its forward when it is made, as detection code does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_bn(4, 4, 3), conv_bn(4, 4, 1)
        self.forward = self.other  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        return (self.a(x) + self.b(x)).relu()

    def other(self, x: Tensor) -> Tensor:
        return (self.a(x) - self.b(x)).relu()


def test_a_forward_chosen_on_the_instance() -> None:
    for model in (Switchable(), nn.Sequential(nn.ReLU(), Switchable())):
        trained(model.double())
        plain: Any = refold.fold(model, images(4)[0])
        assert plain.fold_report.after.batch_norms == 0
        assert distance(call(model, images(4)[1]), call(plain, images(4)[1])) <= LARGEST


def test_a_compiled_model_and_a_compiled_part() -> None:
    for model in (
        torch.compile(branches(), backend="eager"),
        nn.Sequential(torch.compile(branches(), backend="eager")),
    ):
        torch._dynamo.reset()
        trained(model.double())
        plain: Any = refold.fold(model, images(4)[0])
        assert plain.fold_report.after.convolutions == 1
        assert distance(call(model, images(4)[1]), call(plain, images(4)[1])) <= LARGEST


def test_a_graph_module() -> None:
    """What torchvision's feature extraction and other fx tools return."""
    model = nn.Sequential(branches(), branches(), *conv_bn(4, 4, 1))
    traced = fx.symbolic_trace(trained(model.double()))
    plain = check_fold(traced, images(4), convolutions=3)
    assert isinstance(plain, fx.GraphModule)
    for other in (pickle.loads(pickle.dumps(plain)), copy.deepcopy(plain)):
        assert torch.equal(call(other, images(4)[0]), call(plain, images(4)[0]))


def test_a_feature_extractor() -> None:
    model = nn.Sequential(branches(), branches(), *conv_bn(4, 4, 1)).eval()
    extractor = create_feature_extractor(model, {"0": "early", "1": "late"})
    plain = check_fold(extractor, images(4), convolutions=2)
    assert list(call(plain, images(4)[0])) == ["early", "late"]


def test_an_exported_program_is_left_with_a_reason() -> None:
    """Its operators are not torch's functions; what is left is named."""
    model = trained(branches().double())
    exported: Any = torch.export.export(model, (images(4)[0],)).module()
    plain: Any = refold.fold(exported, images(4)[0])
    assert distance(call(model, images(4)[0]), call(plain, images(4)[0])) <= LARGEST
    assert plain.fold_report.left or plain.fold_report.after.batch_norms == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("make", [torch.jit.script, lambda model: torch.jit.trace(model, images(4)[0])])
def test_a_torchscript_model_is_refused_in_one_sentence(make: Any) -> None:
    """Nothing can be rewritten in it: fold before compiling."""
    model = make(trained(conv_bn(4, 4).double()))
    with pytest.raises(InputError, match="TorchScript") as caught:
        refold.fold(model, images(4)[0])
    assert "\n" not in str(caught.value)


def test_a_model_that_cannot_be_copied_is_refused_in_one_sentence() -> None:
    """The example is not to blame."""
    model = trained(branches())
    model.lock = threading.Lock()
    with pytest.raises(InputError, match="cannot be copied") as caught:
        refold.fold(model, images(4)[0].float())
    assert "\n" not in str(caught.value)
    assert "example" not in str(caught.value)


@dataclass
class Detections:
    """An output that torch's pytrees do not know."""

    scores: Tensor
    boxes: list[Tensor]
    name: str = "boxes"


class Detector(nn.Module):
    """Returns its tensors inside an object."""

    def __init__(self) -> None:
        super().__init__()
        self.block = branches()

    def forward(self, x: Tensor) -> Detections:
        y = self.block(x)
        return Detections(y, [y.mean((2, 3))])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tensors_inside_an_object_are_compared_too(dtype: torch.dtype) -> None:
    """A proof that sees no tensor would pass for any weights."""
    model, x = trained(Detector()).to(dtype), images(4)[0].to(dtype)
    plain: Any = refold.fold(model, x)
    assert plain.fold_report.after.convolutions == 1
    refold.verify(model, plain, x)
    wrong = copy.deepcopy(model)
    wrong.block.branches[0][0].weight.data.mul_(1.5)
    with pytest.raises(NotEquivalent):
        refold.verify(model, wrong, x)


def test_a_model_that_returns_no_tensor_cannot_be_proved() -> None:
    model = trained(Net(lambda net, x: net.block(x).argmax(1).tolist(), block=branches()))
    with pytest.raises(InputError, match="returns no tensor"):
        refold.verify(model, copy.deepcopy(model), images(4)[0].float())


def test_whole_numbers_are_compared_exactly() -> None:
    """Predicted classes: equal, or not equivalent."""
    model = trained(Net(lambda net, x: net.block(x).argmax(1), block=branches()))
    (x, *_) = images(4)
    plain: Any = refold.fold(model, x.float())
    assert plain.fold_report.after.convolutions == 1
    assert torch.equal(call(model, x.float()), call(plain, x.float()))
    wrong = copy.deepcopy(model)
    wrong.block.branches[0][1].bias.data[0] += 100
    with pytest.raises(NotEquivalent):
        refold.verify(model, wrong, x.float())


def test_recurrent_and_attention_layers_beside_convolutions() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        tokens = net.stem(x).flatten(2).transpose(1, 2)
        tokens = net.encoder(net.attention(tokens, tokens, tokens)[0])
        return net.head(net.recurrent(tokens)[0][:, -1])

    model = Net(
        forward,
        stem=Parallel(conv_bn(4, 8, 3), conv_bn(4, 8, 1)),
        attention=nn.MultiheadAttention(8, 2, batch_first=True),
        encoder=nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        recurrent=nn.LSTM(8, 5, batch_first=True),
        head=nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)),
    )
    check_fold(model, images(4), convolutions=1)
    plain = refold.fold(trained(model.float()), images(4)[0].float())
    assert plain.fold_report.after.batch_norms == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_part(dtype: torch.dtype) -> None:
    """A compiled part stays as it is; everything around it folds."""
    scripted = torch.jit.script(trained(conv_bn(4, 4)))
    model = trained(nn.Sequential(branches(), scripted, branches())).to(dtype)
    x = images(4)[0].to(dtype)
    plain: Any = refold.fold(model, x)
    assert plain.fold_report.after.convolutions == 3
    assert plain.fold_report.after.batch_norms == 1
    assert {name for name, _ in plain.fold_report.left} == {"1"}
    assert distance(call(model, x), call(plain, x)) <= (1e-5 if dtype == torch.float32 else LARGEST)


def test_a_forward_that_fills_a_buffer_it_made() -> None:
    """Padding by hand into `torch.zeros`, in a float32 model."""

    def forward(net: Net, x: Tensor) -> Tensor:
        out = torch.zeros(2, 6, 12, 12, dtype=x.dtype)
        out[:, :4] = net.block(x)
        return out * 2

    check_fold(Net(forward, block=branches()), images(4, [(12, 12)]), convolutions=1)
    plain = refold.fold(trained(Net(forward, block=branches())), images(4, [(12, 12)])[0].float())
    assert plain.fold_report.after.convolutions == 1


def test_a_custom_autograd_function() -> None:
    model = Net(lambda net, x: net.one(Doubled.apply(net.two(x))), one=branches(), two=branches())
    check_fold(model, images(4), convolutions=2)


class Doubled(torch.autograd.Function):
    """An operator of a user that no tracer knows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2
