"""The forms of parallel branches compute what the plain loop computes, down to the running statistics."""

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import refold
from refold.blocks.parallel import ParallelBranches
from refold.blocks.parallel.branch import Branch
from refold.errors import InputError

FAST = ("stacked", "moments")


def parallel(
    in_channels: int,
    out_channels: int,
    sizes: Any,
    *,
    stride: int = 1,
    groups: int = 1,
    dilation: int = 1,
    skip: bool = True,
    adds_input: bool = False,
    bias: bool = False,
    **norm: Any,
) -> ParallelBranches:
    branches = []
    for size in sizes:
        size = (size, size) if isinstance(size, int) else size
        padding = tuple(dilation * (k // 2) for k in size)
        conv = nn.Conv2d(in_channels, out_channels, size, stride, padding, dilation, groups, bias)
        branches.append(Branch(conv, nn.BatchNorm2d(out_channels, **norm)))
    fits = in_channels == out_channels and stride == 1
    made = ParallelBranches(
        branches,
        nn.BatchNorm2d(in_channels, **norm) if skip and fits else None,
        adds_input=adds_input and fits,
    )
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, -1, 1.5)
            nn.init.uniform_(module.bias, -1, 1)
    return made


def with_form(module: ParallelBranches, form: Any) -> ParallelBranches:
    module = copy.deepcopy(module)
    module.form = form
    return module


def train(module: nn.Module, inputs: list[Tensor], *, autocast: bool = False) -> dict[str, Tensor]:
    """Outputs, gradients and buffers after a step of plain descent for each input."""
    found = {}
    for number, x in enumerate(inputs):
        x = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = module(x)
        weights = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).reshape(out.shape).to(out.dtype)
        names, parameters = zip(
            *((n, p) for n, p in module.named_parameters() if p.requires_grad), strict=True
        )
        grads = torch.autograd.grad((out * weights + out.square()).sum(), [x, *parameters])
        found[f"output {number}"], found[f"input gradient {number}"] = out.detach(), grads[0]
        for name, parameter, grad in zip(names, parameters, grads[1:], strict=True):
            found[f"gradient of {name} {number}"] = grad
            parameter.data -= 1e-3 * grad / (1 + grad.abs().max())
    found.update({name: buffer.clone() for name, buffer in module.named_buffers()})
    return found


def check_same(expected: dict[str, Tensor], found: dict[str, Tensor], tolerance: float) -> None:
    assert expected.keys() == found.keys()
    largest = max(float(e.abs().max()) for name, e in expected.items() if "gradient" in name)
    for name, e in expected.items():
        # Gradients that are zero in truth, as those behind a batch norm, are compared with the largest one.
        scale = float(e.abs().max()) if "gradient" not in name else max(float(e.abs().max()), 1e-2 * largest)
        assert found[name].shape == e.shape
        assert float((found[name] - e).abs().max()) <= tolerance * max(scale, 1e-6), name


@st.composite
def cases(draw: st.DrawFn) -> tuple[ParallelBranches, list[Tensor]]:
    kind = draw(st.sampled_from(["pointwise", "grouped", "depthwise", "dense"]))
    each_in, each_out = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    groups = {"pointwise": 1, "dense": 1}.get(kind, draw(st.integers(2, 4)))
    if draw(st.booleans()):
        each_out = each_in
    if kind == "depthwise":
        each_in, each_out = 1, draw(st.sampled_from([1, 1, 1, 2]))
    sizes: list[Any] = [1] * draw(st.integers(1, 3))
    if kind != "pointwise":
        largest = draw(st.sampled_from([1, 3, 3, 3, 5]))
        sizes += [largest] * draw(st.integers(1, 3))
        sizes += draw(st.sampled_from([[], [(largest, 1), (1, largest)]]))
    torch.manual_seed(draw(st.integers(0, 99)))
    module = parallel(
        each_in * groups,
        each_out * groups,
        draw(st.permutations(sizes)),
        stride=draw(st.sampled_from([1, 1, 2])),
        groups=groups,
        dilation=draw(st.sampled_from([1, 1, 2])),
        skip=draw(st.booleans()),
        adds_input=draw(st.booleans()),
        bias=draw(st.booleans()),
        momentum=draw(st.sampled_from([0.1, 0.5, None])),
        eps=draw(st.sampled_from([1e-5, 1e-3])),
        affine=draw(st.sampled_from([True, True, False])),
        track_running_stats=draw(st.sampled_from([True, True, False])),
    )
    shape = (draw(st.integers(2, 4)), each_in * groups, draw(st.integers(3, 8)), draw(st.integers(3, 8)))
    last = draw(st.sampled_from([torch.contiguous_format, torch.channels_last]))
    inputs = [(torch.randn(shape, dtype=torch.float64) + 0.5 * i).to(memory_format=last) for i in range(5)]
    return module.double(), inputs


@given(cases())
@settings(max_examples=60, deadline=None)
def test_forms_agree_with_loop(case: tuple[ParallelBranches, list[Tensor]]) -> None:
    module, inputs = case
    expected = train(with_form(module, "looped"), inputs)
    for form in (*FAST, "auto"):
        check_same(expected, train(with_form(module, form), inputs), 1e-9)


LAYERS = {
    "1x1": lambda **more: parallel(12, 16, [1, 1, 1], **more),
    "1x1 with skip": lambda **more: parallel(16, 16, [1, 1], **more),
    "depthwise": lambda **more: parallel(12, 12, [3, 3, 1], groups=12, **more),
    "depthwise, stride 2": lambda **more: parallel(12, 12, [3, 3, 1], groups=12, stride=2, **more),
    "dense": lambda **more: parallel(8, 8, [3, 1], **more),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("form", FAST)
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_float32_is_as_good_as_the_loop(layer: str, form: str, offset: float) -> None:
    torch.manual_seed(0)
    module = LAYERS[layer]()
    inputs = [torch.randn(8, module.geometry.in_channels, 14, 14) + offset for _ in range(2)]
    truth = train(with_form(module, "looped").double(), [x.double() for x in inputs])
    if not offset:
        check_same({k: v.float() for k, v in truth.items()}, train(with_form(module, form), inputs), 1e-4)
    errors = {}
    for name in ("looped", form):
        found = train(with_form(module, name), inputs)
        largest = max(float(t.abs().max()) for key, t in truth.items() if "gradient" in key)
        errors[name] = max(
            float((found[key] - t).abs().max()) / (largest if "gradient" in key else float(t.abs().max()))
            for key, t in truth.items()
        )
    # At a mean of a hundred deviations, a covariance that is not centred first would lose four digits.
    assert errors[form] <= max(4 * errors["looped"], 1e-5)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("form", FAST)
def test_autocast_is_no_worse_than_the_loop(layer: str, form: str) -> None:
    errors: dict[str, dict[str, list[float]]] = {}
    for seed in range(4):
        torch.manual_seed(seed)
        module = LAYERS[layer]()
        x = (torch.randn(8, module.geometry.in_channels, 14, 14) + seed).bfloat16()
        truth = train(with_form(module, "looped").double(), [x.double()])
        for name in ("looped", form):
            found = train(with_form(module, name), [x], autocast=True)
            assert found["output 0"].dtype == torch.bfloat16
            own = errors.setdefault(name, {})
            for kind in ("output", "input gradient", "gradient of", "running"):
                pairs = [(found[key], t) for key, t in truth.items() if kind in key]
                missed = sum(float((f - t).square().sum()) for f, t in pairs)
                own.setdefault(kind, []).append(
                    (missed / sum(float(t.square().sum()) for _, t in pairs)) ** 0.5
                )
    for kind, values in errors[form].items():
        assert sum(values) <= 1.2 * sum(errors["looped"][kind]), (kind, values, errors["looped"][kind])


def test_autocast_keeps_the_precision_of_an_input_that_is_added() -> None:
    x = torch.randn(2, 4, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert with_form(parallel(4, 4, [1, 1]), "moments")(x).dtype == torch.float32


def test_only_the_input_is_kept() -> None:
    x = torch.randn(4, 16, 12, 12, requires_grad=True)
    for module in (parallel(16, 16, [1, 1, 1]), parallel(16, 16, [3, 3, 1], groups=16)):
        kept: dict[int, int] = {}
        parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}

        def note(tensor: Tensor, kept: Any = kept, parameters: Any = parameters) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in parameters:
                kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            with_form(module, "moments")(x)
        assert [size for size in kept.values() if size >= x.numel()] == [x.numel()]


def test_state_dict_has_the_names_of_the_loop() -> None:
    names = {name for name, _ in parallel(4, 4, [3, 1]).named_parameters()}
    assert names == {
        *(f"branches.{i}.{part}" for i in (0, 1) for part in ("conv.weight", "bn.weight", "bn.bias")),
        "skip.weight",
        "skip.bias",
    }


@pytest.mark.parametrize("form", FAST)
@pytest.mark.parametrize("layer", LAYERS)
def test_frozen_parameters_and_norms(layer: str, form: str) -> None:
    torch.manual_seed(0)
    module = LAYERS[layer]().double()
    inputs = [torch.randn(3, module.geometry.in_channels, 6, 5, dtype=torch.float64) for _ in range(2)]
    for branch in module.branches:
        branch.conv.weight.requires_grad_(False)
    check_same(train(with_form(module, "looped"), inputs), train(with_form(module, form), inputs), 1e-9)
    module.branches[0].bn.eval()
    check_same(train(with_form(module, "looped"), inputs), train(with_form(module, form), inputs), 1e-9)
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.eval()
    check_same(train(with_form(module, "looped"), inputs), train(with_form(module, form), inputs), 1e-9)


@pytest.mark.parametrize("form", FAST)
@pytest.mark.parametrize("layer", LAYERS)
def test_channels_without_variance(layer: str, form: str) -> None:
    torch.manual_seed(0)
    module = LAYERS[layer]().double()
    x = torch.randn(3, module.geometry.in_channels, 6, 5, dtype=torch.float64)
    x[:, ::2] = 1.5
    x[:, 1] = 0
    check_same(train(with_form(module, "looped"), [x]), train(with_form(module, form), [x]), 1e-9)


@pytest.mark.parametrize("form", [*FAST, "auto"])
def test_one_value_a_channel_is_refused_as_by_a_batch_norm(form: str) -> None:
    x = torch.randn(1, 4, 1, 1)
    for module in (parallel(4, 6, [1, 1]), parallel(4, 4, [3, 3, 1], groups=4)):
        messages = []
        for name in ("looped", form):
            with pytest.raises(ValueError, match="more than 1 value per channel") as caught:
                with_form(module, name)(x)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
        assert with_form(module, form).eval()(x).shape[0] == 1


@pytest.mark.parametrize("layer", ["1x1 with skip", "depthwise"])
def test_activation_checkpointing(layer: str) -> None:
    torch.manual_seed(0)
    module = LAYERS[layer]().double()
    x = torch.randn(3, module.geometry.in_channels, 6, 5, dtype=torch.float64)

    class Checkpointed(nn.Module):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body = body

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.body, x, use_reentrant=False)

    looped, fast = (train(Checkpointed(with_form(module, form)), [x]) for form in ("looped", "moments"))
    check_same(looped, fast, 1e-9)


@pytest.mark.parametrize("layer", ["1x1 with skip", "depthwise"])
def test_compiled(layer: str) -> None:
    torch.manual_seed(0)
    module = LAYERS[layer]().double()
    x = torch.randn(3, module.geometry.in_channels, 6, 5, dtype=torch.float64)
    torch._dynamo.reset()
    # The compiler's front end and automatic differentiation; the code generator needs a C++ compiler.
    compiled = torch.compile(with_form(module, "moments"), backend="aot_eager")
    found = {name.replace("_orig_mod.", ""): value for name, value in train(compiled, [x]).items()}
    check_same(train(with_form(module, "looped"), [x]), found, 1e-9)


def test_strided_stem() -> None:
    torch.manual_seed(0)
    module = parallel(3, 8, [3, 1, 1], stride=2, bias=True)
    x = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
    for form in ("auto", "moments"):
        pairs = []
        for layout in (torch.contiguous_format, torch.channels_last):
            own = with_form(module, form if layout == torch.channels_last else "looped")
            out = own.to(memory_format=layout)(x.contiguous(memory_format=layout))
            out.square().sum().backward()
            pairs.append([out.detach(), *(p.grad for n, p in own.named_parameters() if "conv.bias" not in n)])
        for expected, found in zip(*pairs, strict=True):
            assert float((found - expected).abs().max()) <= 1e-3 * max(float(expected.abs().max()), 1.0)


def test_second_derivatives() -> None:
    torch.manual_seed(0)
    for layer in ("1x1", "depthwise"):
        module = with_form(LAYERS[layer]().double(), "moments")
        x = torch.randn(2, 12, 4, 4, dtype=torch.float64)

        def penalty(form: str, module: Any = module, x: Tensor = x) -> Tensor:
            own, leaf = with_form(module, form), x.clone().requires_grad_()
            (grad,) = torch.autograd.grad(own(leaf).pow(3).sum(), leaf, create_graph=True)
            return torch.autograd.grad(grad.square().sum(), leaf)[0]

        expected = penalty("looped")
        assert float((penalty("moments") - expected).abs().max() / expected.abs().max()) <= 1e-9


def test_hooks_on_a_branch_are_called() -> None:
    module = with_form(parallel(4, 4, [1, 1]), "moments")
    called = []
    module.branches[1].conv.register_forward_hook(lambda *_: called.append(1))
    module(torch.randn(2, 4, 3, 3))
    assert called


def test_other_modules_as_branches() -> None:
    torch.manual_seed(0)
    chain = nn.Sequential(nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6), nn.AvgPool2d(3, 1, 1))
    plain = parallel(6, 6, [3, 1, 1]).double()
    module = ParallelBranches([*plain.branches, chain.double()], plain.skip)
    inputs = [torch.randn(3, 6, 5, 5, dtype=torch.float64)]
    for form in FAST:
        check_same(train(with_form(module, "looped"), inputs), train(with_form(module, form), inputs), 1e-9)


def test_branch_without_norm_and_pickle() -> None:
    torch.manual_seed(0)
    module = parallel(6, 6, [1, 1, 1], bias=True).double()
    module.branches[0].bn = nn.Identity()
    module = pickle.loads(pickle.dumps(ParallelBranches(list(module.branches), module.skip)))
    inputs = [torch.randn(3, 6, 5, 5, dtype=torch.float64)]
    for form in FAST:
        check_same(train(with_form(module, "looped"), inputs), train(with_form(module, form), inputs), 1e-9)


@pytest.mark.parametrize("layer", LAYERS)
def test_folds_to_one_convolution(layer: str) -> None:
    torch.manual_seed(0)
    module = LAYERS[layer]().double()
    x = torch.randn(3, module.geometry.in_channels, 8, 8, dtype=torch.float64)
    module(x)
    plain = refold.fold(module, x)
    assert plain.fold_report.after.convolutions == 1
    assert plain.fold_report.after.batch_norms == 0


def test_what_does_not_fit_is_refused() -> None:
    def branch(*arguments: Any, **more: Any) -> Branch:
        conv = nn.Conv2d(*arguments, **more)
        return Branch(conv, nn.BatchNorm2d(conv.out_channels))

    with pytest.raises(InputError, match="There is no form"):
        ParallelBranches([branch(4, 4, 1)], form="faster")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="does not fit beside"):
        ParallelBranches([branch(4, 4, 3, padding=1), branch(4, 4, 1, padding=1)])
    with pytest.raises(InputError, match="does not fit beside"):
        ParallelBranches([branch(4, 4, 3, padding=1), branch(4, 4, 3, padding=1, stride=2)])
    with pytest.raises(InputError, match="does not pad with zeros"):
        ParallelBranches([branch(4, 4, 3, padding=1, padding_mode="reflect")])
    with pytest.raises(InputError, match="input cannot be added"):
        ParallelBranches([branch(4, 6, 1)], nn.BatchNorm2d(4))
