"""What comes out of a fold: the class, the methods, the files and the compilers go on working, the argument too."""

import copy
import io
import pickle
import re
from typing import Any

import pytest
import torch
from checking import LARGEST, Net, Parallel, call, check_fold, conv_bn, distance, images, trained
from torch import Tensor, fx, nn

import refold


class Block(nn.Module):
    """A block with branches, an attribute and a method that other code may use."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.stride, self.out_channels = stride, out_channels
        self.wide = conv_bn(in_channels, out_channels, 3, stride=stride)
        self.thin = conv_bn(in_channels, out_channels, 1, stride=stride)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.wide(x) + self.thin(x))
        return y * torch.sigmoid(y)

    def rescale(self, x: Tensor) -> Tensor:
        """What a neck or a head asks a block for."""
        return x * self.stride


class Network(nn.Module):
    """A network in timm's style whose own forward has branches, with methods and attributes around them."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.stem_wide, self.stem_thin = conv_bn(3, 4, 3, stride=2), conv_bn(3, 4, 1, stride=2)
        self.blocks = nn.Sequential(Block(4, 6), Block(6, 6, stride=2))
        self.head = nn.Linear(6, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.blocks(x)

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(x.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_wide(x) + self.stem_thin(x))
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.head


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    model = trained(Network().double())
    assert isinstance(model, Network)
    return model


@pytest.fixture
def plain(network: Network) -> Any:
    return refold.fold(network, images(3)[0])


def test_the_class_the_attributes_and_the_methods_stay(network: Network, plain: Any) -> None:
    """USERS: folded models that no longer are what other code expects."""
    (x, *_) = images(3)
    assert isinstance(plain, Network)
    assert type(plain).__name__ == "Network"
    assert plain.num_classes == 3
    assert plain.get_classifier() is plain.head
    assert distance(call(network, x), call(plain, x)) <= LARGEST
    features, pooled = images(4)[0], images(6)[0]
    assert distance(network.forward_features(features), plain.forward_features(features)) <= LARGEST
    assert distance(network.forward_head(pooled), plain.forward_head(pooled)) <= LARGEST
    assert plain.fold_report.after.batch_norms == 0
    assert plain.fold_report.after.convolutions == 3


class WithMethod(nn.Module):
    """Its branches are in a method that users call by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_bn(4, 4, 3), conv_bn(4, 4, 1)
        self.head = nn.Conv2d(4, 2, 1)

    def features(self, x: Tensor) -> Tensor:
        return torch.relu(self.a(x) + self.b(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def test_a_method_that_holds_branches_still_computes_the_same() -> None:
    model = WithMethod()
    plain = check_fold(model, images(4), convolutions=2)
    (x, *_) = images(4)
    assert distance(model.features(x), plain.features(x)) <= LARGEST


class WithUnusedPart(WithMethod):
    """An auxiliary head that only training uses, in a method of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = conv_bn(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x) + self.b(x))
        return self.head(x) + self.auxiliary(x) if self.training else self.head(x)

    def auxiliary_head(self, x: Tensor) -> Tensor:
        return self.auxiliary(x)


def test_a_part_that_only_training_uses_is_not_in_the_way() -> None:
    plain = check_fold(WithUnusedPart(), images(4), convolutions=2, left=["does not run"])
    assert plain.auxiliary_head(images(4)[0]).shape == (2, 2, 12, 12)


def test_an_inner_block_keeps_its_class_and_methods(plain: Any) -> None:
    for block, stride in zip(plain.blocks, (1, 2), strict=True):
        assert isinstance(block, Block)
        assert (block.stride, block.out_channels) == (stride, 6)
        assert torch.equal(block.rescale(torch.ones(2)), torch.full((2,), float(stride)))


def test_outer_code_that_asks_blocks_for_attributes_and_methods_still_folds() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.block.rescale(net.block(x))
        return y.mean((2, 3)) / net.block.out_channels

    check_fold(Net(forward, block=Block(4, 6, stride=2)), images(4), convolutions=1)
    check_fold(Net(forward, block=ShortBlock(4, 6, stride=2)), images(4), convolutions=1)


class ShortBlock(Block):
    """Folded, it is a convolution and an activation."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.wide(x) + self.thin(x))


def test_a_block_that_becomes_one_convolution_is_one() -> None:
    """Without an activation inside, nothing of the block remains but a layer of torch."""
    block = Parallel(conv_bn(4, 4, 3), conv_bn(4, 4, 1), act=nn.Identity())
    plain = check_fold(nn.Sequential(block, nn.ReLU(), nn.Sequential(block, nn.ReLU())), images(4))
    assert type(plain[0]) is nn.Conv2d
    alone = check_fold(Parallel(conv_bn(4, 4, 3), conv_bn(4, 4, 1), act=nn.Identity()), images(4))
    assert type(alone) is nn.Conv2d


def test_names_are_readable(plain: Any) -> None:
    for name, _ in plain.named_parameters():
        assert re.fullmatch(r"([a-z][a-z_]*(_\d)?|\d+)(\.([a-z][a-z_]*(_\d)?|\d+))*", name), name
    assert "head.weight" in dict(plain.named_parameters())
    assert len(list(plain.parameters())) == 2 * (3 + 1)


def test_the_argument_is_untouched() -> None:
    """USERS: a conversion that works in place, or on a copy that nobody gets."""
    model = trained(nn.Sequential(Network(), nn.BatchNorm1d(3))).train()
    model[0].blocks[0].eval()
    model[0].register_forward_hook(lambda *_: None)
    model.register_buffer("counter", torch.tensor(3))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    tensors = {id(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    modules = [(name, type(module), module.training) for name, module in model.named_modules()]
    hooks = list(model[0]._forward_hooks)
    refold.fold(model, images(3)[0].float())
    assert {id(tensor) for tensor in [*model.parameters(), *model.buffers()]} == tensors
    assert [(name, type(module), module.training) for name, module in model.named_modules()] == modules
    assert list(model[0]._forward_hooks) == hooks
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not hasattr(model, "fold_report")
    assert all(parameter.grad is None for parameter in model.parameters())


class Counting(nn.Module):
    """Counts its calls in a buffer, in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.body = conv_bn(4, 4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.calls: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.body(x).relu()


def test_the_argument_is_untouched_even_if_its_forward_counts() -> None:
    model = trained(Counting().double())
    (x, *_) = images(4)
    plain: Any = refold.fold(model, x)
    refold.verify(model, plain, x)
    assert int(model.calls) == 0
    assert int(plain.calls) == 0
    call(plain, x)
    assert int(plain.calls) == 1


def test_no_tensor_is_shared(network: Network, plain: Any) -> None:
    """Training one of the two must never move the other."""
    own, other = (
        {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
        for model in (network, plain)
    )
    assert not own & other
    expected = call(plain, images(3)[0])
    with torch.no_grad():
        for tensor in [*network.parameters(), *network.buffers()]:
            tensor.zero_()
    assert torch.equal(call(plain, images(3)[0]), expected)


def test_a_second_fold_changes_nothing(plain: Any) -> None:
    """USERS: a second fold crashes."""
    (x, *_) = images(3)
    again: Any = refold.fold(plain, x)
    assert torch.equal(call(plain, x), call(again, x))
    assert again.fold_report.regions == []
    assert again.fold_report.left == []
    assert again.fold_report.after == plain.fold_report.after == again.fold_report.before
    assert isinstance(again, Network)
    assert list(again.state_dict()) == list(plain.state_dict())


def test_a_plain_network_is_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 2))
    plain = check_fold(model, images(3, [(12, 12)]), convolutions=1)
    assert [type(layer) for layer in plain] == [type(layer) for layer in model]
    assert plain.fold_report.regions == []


def test_a_model_without_any_linear_part() -> None:
    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sigmoid().exp()

    plain = check_fold(Nothing(), images(3))
    assert plain.fold_report.regions == []
    assert plain.fold_report.after.parameters == 0


def test_it_pickles_and_copies(network: Network, plain: Any) -> None:
    (x, *_) = images(3)
    for other in (
        pickle.loads(pickle.dumps(plain)),
        copy.deepcopy(plain),
        copy.deepcopy(pickle.loads(pickle.dumps(plain))),
    ):
        assert isinstance(other, Network)
        assert torch.equal(call(other, x), call(plain, x))
        assert torch.equal(other.forward_features(images(4)[0]), plain.forward_features(images(4)[0]))
        assert other.fold_report == plain.fold_report
        assert list(other.state_dict()) == list(plain.state_dict())


def test_it_saves_and_loads_whole(plain: Any) -> None:
    (x, *_) = images(3)
    file = io.BytesIO()
    torch.save(plain, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    assert torch.equal(call(other, x), call(plain, x))


def test_a_state_dict_loads_into_another_fold_of_the_class(plain: Any) -> None:
    """USERS: a folded checkpoint does not load back."""
    (x, *_) = images(3)
    torch.manual_seed(7)
    other: Any = refold.fold(trained(Network().double(), seed=3), x)
    assert distance(call(plain, x), call(other, x)) > 1e-3
    other.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(call(plain, x), call(other, x))


def test_a_long_network_pickles() -> None:
    """Hundreds of operators in the forward pass of the root itself."""
    model = trained(LongNetwork().double())
    (x, *_) = images(3)
    plain = refold.fold(model, x)
    for other in (pickle.loads(pickle.dumps(plain)), copy.deepcopy(plain)):
        assert torch.equal(call(other, x), call(plain, x))


class LongNetwork(Network):
    """Eight hundred activations in a row behind a stem with branches."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_wide(x) + self.stem_thin(x))
        for _ in range(400):
            x = torch.sigmoid(torch.relu(x))
        return x


def test_it_changes_its_dtype_and_device_like_any_module(network: Network, plain: Any) -> None:
    (x, *_) = images(3)
    assert distance(call(network.float(), x.float()), call(plain.float(), x.float())) <= 1e-5
    assert call(plain.to("meta"), x.to("meta").float()).shape == (2, 3)


def test_it_can_be_trained(plain: Any) -> None:
    """USERS: the plain form cannot be trained on."""
    (x, *_) = images(3)
    plain.train()
    plain(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in plain.parameters())
    optimiser = torch.optim.SGD(plain.parameters(), lr=1e-3)
    before = float(plain(x).square().sum())
    optimiser.step()
    assert float(plain(x).square().sum()) < before


@pytest.mark.parametrize("caller", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_called_in_any_gradient_mode(network: Network, caller: Any) -> None:
    """Inside `inference_mode` too, the result holds ordinary tensors that can be trained afterwards."""
    (x, *_) = images(3)
    with caller():
        plain: Any = refold.fold(network, x.clone())
        refold.verify(network, plain, x.clone())
    tensors = [*plain.parameters(), *plain.buffers()]
    assert not any(tensor.is_inference() for tensor in tensors)
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in plain.parameters())
    plain(x).sum().backward()


def test_a_model_made_in_inference_mode() -> None:
    with torch.inference_mode():
        check_fold(nn.Sequential(Block(4, 6), *conv_bn(6, 3)), images(4), convolutions=2)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_it_compiles(plain: Any, backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(plain, backend=backend, fullgraph=True)
    for x in images(3)[:2]:
        with torch.no_grad():
            assert distance(compiled(x), plain(x)) <= 1e-12


def test_it_is_traced_by_torchscript(plain: Any) -> None:
    """USERS: torch.jit fails after folding."""
    first, second, _ = images(3)
    traced = torch.jit.trace(plain, first)
    assert distance(traced(second), plain(second)) <= 1e-12


def test_it_is_compiled_by_torchscript(network: Network, plain: Any) -> None:
    """USERS: torch.jit.script fails after folding, though the network could be scripted before."""
    (x, *_) = images(3)
    for model in (network, plain):
        assert distance(torch.jit.script(model)(x), plain(x)) <= LARGEST


def test_it_exports_with_a_dynamic_batch_and_image(plain: Any) -> None:
    """USERS: the exported graph still has all branches. It has three convolutions and no norm."""
    first, second, third = images(3)
    shapes = {"x": {0: torch.export.Dim("batch"), 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}}
    program = torch.export.export(plain, (first,), dynamic_shapes=shapes)
    for x in (second, third):
        assert distance(program.module()(x), plain(x)) <= 1e-12
    operators = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("conv" in operator for operator in operators) == 3
    assert not any("norm" in operator for operator in operators)


def test_it_is_traced_again(plain: Any) -> None:
    graph = fx.symbolic_trace(plain)
    (x, *_) = images(3)
    assert torch.equal(graph(x), plain(x))


def test_its_source_can_be_read_in_a_traceback(plain: Any) -> None:
    """A wrong input raises from the new forward with its source line, not from nowhere."""
    with pytest.raises(RuntimeError) as caught:
        plain(torch.randn(2, 7, 12, 12, dtype=torch.float64))
    lines = [entry.statement for entry in caught.traceback]
    assert any("conv" in str(line) for line in lines)


def test_two_folds_do_not_disturb_each_other(network: Network) -> None:
    """Each fold has a forward of its own, the original class has none of them."""
    (x, *_) = images(3)
    one: Any = refold.fold(network, x)
    simple = trained(Network().double())
    simple.stem_thin = nn.Sequential(nn.ReLU(), simple.stem_thin)  # type: ignore[assignment]
    other: Any = refold.fold(simple, x)
    assert distance(call(network, x), call(one, x)) <= LARGEST
    assert distance(call(simple, x), call(other, x)) <= LARGEST
    assert type(network) is Network is type(simple)
