"""RepNeXt: the official logits in training and plain form, the paper's sizes in each of its three forms."""

import pytest
import torch
from torch import Tensor, nn

from golden import assert_golden_logits, drawn_weights, golden_input, golden_record, golden_state_dict
from refold.blocks import RepUnit1, RepUnit2, RepUnit3
from refold.errors import CheckpointError, InputError
from refold.folding.fold import fold
from refold.models import create_model, list_models, load_checkpoint
from refold.models.repnext import RepNeXt, RepNeXtTable
from refold.recording.cost import count

# Parameters (M) and multiply-accumulates (G) in training form, folded, and with folded shortcuts.
PUBLISHED = {
    "repnext_u3_t": ((28.65, 4.473), (28.57, 4.456), (51.55, 8.202)),
    "repnext_u3_s": ((50.36, 8.712), (50.18, 8.684), (92.09, 16.138)),
    "repnext_u3_b": ((88.77, 15.392), (88.53, 15.355), (162.74, 28.531)),
}


UNITS = [RepUnit1, RepUnit2, RepUnit3]


def small(unit: type[nn.Module], **arguments: object) -> RepNeXt:
    return RepNeXt(RepNeXtTable(unit, (1, 2, 1, 1), (6, 12, 24, 48)), num_classes=5, **arguments)


def test_there_is_no_first_unit_where_three_does_not_divide_the_channels() -> None:
    assert list_models("repnext*") == [
        "repnext_u1_s",
        "repnext_u1_t",
        "repnext_u2_b",
        "repnext_u2_s",
        "repnext_u2_t",
        "repnext_u3_b",
        "repnext_u3_s",
        "repnext_u3_t",
    ]


def size(network: nn.Module) -> tuple[float, float]:
    cost = count(network.to("meta"), torch.empty(1, 3, 224, 224, device="meta"))
    return round(cost.parameters / 1e6, 2), round(cost.macs / 1e9, 3)


@pytest.mark.parametrize(
    "name",
    [
        "repnext_u3_t",
        pytest.param("repnext_u3_s", marks=pytest.mark.slow),
        pytest.param("repnext_u3_b", marks=pytest.mark.slow),
    ],
)
def test_each_form_has_the_papers_size(name: str) -> None:
    network = create_model(name).eval()
    x = torch.zeros(1, 3, 64, 64)
    regular, full = (fold(network, x, prove=False, shortcuts=shortcuts) for shortcuts in ("keep", "fold"))
    assert tuple(map(size, (network, regular, full))) == PUBLISHED[name]


@pytest.mark.parametrize("shortcuts", ["keep", "fold"])
@pytest.mark.parametrize("unit", UNITS)
def test_each_unit_becomes_one_depthwise_convolution(unit: type[nn.Module], shortcuts: str) -> None:
    network = small(unit).double()
    network.load_state_dict(drawn_weights(network))
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    plain = fold(network, x, objective="operators", shortcuts=shortcuts)
    operators = plain.fold_report.after.operators
    # The stem and three steps between stages are convolutions too.
    assert operators["convolution"] == 3 * 5 + 4
    assert operators["activation"] == (10 if shortcuts == "keep" else 5)
    assert operators.get("add", 0) == (5 if shortcuts == "keep" else 0)
    assert not operators.keys() & {"batch norm", "concatenation"}
    depthwise = [m for m in plain.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert len(depthwise) == 5
    for convolution in depthwise:
        assert (convolution.kernel_size, convolution.groups) == ((7, 7), convolution.in_channels)
        assert convolution.out_channels == convolution.in_channels * (1 if shortcuts == "keep" else 2)
    with torch.no_grad():
        expected = network.eval()(x)
        assert (plain(x) - expected).abs().max() <= 1e-9 * expected.std()


def test_the_first_unit_keeps_its_kernels_where_one_would_take_more_multiplications() -> None:
    network, x = small(RepUnit1), torch.randn(1, 3, 64, 96)
    plain = fold(network, x, prove=False)
    cost, single = (
        plain.fold_report.after,
        fold(network, x, prove=False, objective="operators").fold_report.after,
    )
    assert cost.convolutions == 5 * 5 + 4
    assert "batch norm" not in cost.operators
    # 3x3, 5x5 and 7x7 on a third of the channels each, against 7x7 on all of them.
    depthwise = sum(
        6 * 2**stage * (16 >> stage) * (24 >> stage) * blocks for stage, blocks in enumerate((1, 2, 1, 1))
    )
    assert single.macs - cost.macs == depthwise * (49 - (9 + 25 + 49) / 3)


def test_golden_logits_in_training_and_plain_form() -> None:
    record = golden_record("repnext_u3_s")
    network = create_model("repnext_u3_s").double().eval()
    loaded = load_checkpoint(network, golden_state_dict(record))
    assert (loaded.layout, loaded.missing, loaded.unexpected) == ("official RepNeXt", (), ())
    x = golden_input(record)
    plain = fold(network, torch.zeros(1, 3, 32, 32, dtype=torch.float64), prove=False)
    for form, expected in ((network, record["train"]["used_params"]), (plain, record["regular"]["params"])):
        assert sum(parameter.numel() for parameter in form.parameters()) == expected
        with torch.no_grad():
            assert_golden_logits(form(x), record, relative=1e-9)


def official(weights: dict[str, Tensor], stage: int, block: int) -> dict[str, Tensor]:
    prefix = f"stages.{stage}.{block}."
    return {key: value for key, value in weights.items() if key.startswith(prefix)}


def test_the_units_own_plain_convolution_is_left_out_beside_its_branches_alone() -> None:
    record = golden_record("repnext_u3_s")
    weights = {key: torch.empty(shape) for key, shape in record["state_dict"]}
    network = create_model("repnext_u3_s")
    weights.pop("stages.1.2.feature.dwconv3.weight")
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(network, weights)
    assert "it lacks 1 of" in str(raised.value)
    assert "(stages.1.3.unit.branches.2.conv.weight)" in str(raised.value)
    assert "unknown" not in str(raised.value)
    plain = {key: value for key, value in weights.items() if "dwconv" not in key and ".norm" not in key}
    with pytest.raises(CheckpointError, match=r"is in plain \(folded\) form"):
        load_checkpoint(network, plain)


def scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale


def official_plain(network: RepNeXt, between: str) -> dict[str, Tensor]:
    """The plain form with shortcuts as the official conversion makes it, by hand (figures 2 and 3, section 3.2).

    ``between`` is what the convolution between two stages is called after its stage's number.
    """
    weights = {}
    scale, shift = scale_and_shift(network.stem.bn)
    weights["downsample_layers.0.0.weight"] = network.stem.conv.weight * scale[:, None, None, None]
    weights["downsample_layers.0.0.bias"] = shift
    for stage, blocks in enumerate(network.stages):
        if stage:
            norm, conv = blocks[0]
            scale, shift = scale_and_shift(norm)
            weights[f"downsample_layers.{stage}{between}.weight"] = conv.weight * scale[None, :, None, None]
            weights[f"downsample_layers.{stage}{between}.bias"] = conv.bias + conv.weight.sum((2, 3)) @ shift
        for index, block in enumerate(blocks[min(stage, 1) :]):
            place = f"stages.{stage}.{index}"
            kernel, bias = torch.zeros_like(block.unit.branches[0].conv.weight), 0
            for branch in block.unit.branches:
                rows, columns = branch.conv.kernel_size
                scale, shift = scale_and_shift(branch.bn)
                top, left = (7 - rows) // 2, (7 - columns) // 2
                centre = kernel[:, :, top : top + rows, left : left + columns]
                centre += branch.conv.weight * scale[:, None, None, None]
                bias = bias + shift
            weights[f"{place}.feature.conv_repara.weight"] = kernel
            weights[f"{place}.feature.conv_repara.bias"] = bias
            for name, layer in (("pwconv1", block.expand), ("pwconv2", block.project)):
                weights |= {f"{place}.{name}.{key}": value for key, value in layer.state_dict().items()}
    return weights | {f"head.2.{key}": value for key, value in network.head.fc.state_dict().items()}


@torch.no_grad()
@pytest.mark.parametrize(
    "between", [".1", ".0", ""], ids=["norm replaced", "norm removed", "convolution alone"]
)
def test_the_official_plain_form_loads_into_the_folded_network(between: str) -> None:
    network = small(RepUnit3).double().eval()
    network.load_state_dict(drawn_weights(network))
    weights = official_plain(network, between)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    plain = fold(small(RepUnit3).double(), x, prove=False)
    loaded = load_checkpoint(plain, weights)
    assert (loaded.missing, loaded.unexpected) == ((), ())
    assert loaded.layout.startswith("official")
    expected = network(x)
    assert (plain(x) - expected).abs().max() <= 1e-9 * expected.std()
    with pytest.raises(CheckpointError, match=r"is in plain \(folded\) form"):
        load_checkpoint(network, weights)


@pytest.mark.parametrize("name", ["repnext_u1_t", "repnext_u2_t", "repnext_u3_t"])
def test_it_starts_as_the_official_code_does(name: str) -> None:
    network = create_model(name)
    for key, parameter in network.named_parameters():
        if parameter.ndim > 1:
            assert 0.015 < parameter.std().item() < 0.025, key
            assert parameter.abs().max() <= 2
        else:
            assert set(parameter.unique().tolist()) <= {0.0, 1.0}, key


def test_stochastic_depth_rises_over_the_blocks_and_acts_in_training_alone() -> None:
    network = create_model("repnext_u3_t", drop_path_rate=0.5, num_classes=0)
    blocks = [module for module in network.modules() if hasattr(module, "drop_path")]
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0.5 * index / 17 for index in range(18)])
    x = torch.randn(64, 768, 1, 1)
    last = blocks[-1].eval()
    assert torch.equal(last(x), last(x))
    last.train()
    with torch.no_grad():
        last.unit.requires_grad_(False)
        skipped = (last(x) - last.act(x)).abs().amax((1, 2, 3)) == 0
    assert 10 < skipped.sum() < 54
    with pytest.raises(InputError, match=r"drop_path_rate is 1\.5"):
        create_model("repnext_u3_t", drop_path_rate=1.5)


@pytest.mark.parametrize("size", [(32, 32), (33, 95), (64, 160)])
def test_sizes_of_images(size: tuple[int, int]) -> None:
    network = create_model("repnext_u1_t", in_chans=1, num_classes=7).eval()
    with torch.no_grad():
        assert network(torch.randn(1, 1, *size)).shape == (1, 7)
        assert network.forward_features(torch.randn(1, 1, *size)).shape[2:] == (size[0] // 32, size[1] // 32)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("unit", UNITS)
def test_a_training_step_reaches_every_weight_with_and_without_checkpointing(unit: type[nn.Module]) -> None:
    network = small(unit).double()
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    gradients = []
    for enable in (False, True):
        network.zero_grad()
        network.set_grad_checkpointing(enable)
        network(x).square().sum().backward()
        gradients.append({key: parameter.grad.clone() for key, parameter in network.named_parameters()})
    for key, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0, key
        assert torch.allclose(gradient, gradients[1][key]), key
    torch.optim.AdamW(network.parameters()).step()
    assert network(x).isfinite().all()


@pytest.mark.parametrize("unit", UNITS)
def test_it_exports_for_any_batch(unit: type[nn.Module]) -> None:
    network = small(unit, drop_path_rate=0.1).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    x = torch.randn(2, 3, 64, 96)
    program = torch.export.export(network, (x,), dynamic_shapes=({0: batch},))
    other = torch.randn(3, 3, 64, 96)
    assert torch.allclose(program.module()(other), network(other), atol=1e-6)


def test_units_depths_and_channels_are_free() -> None:
    """The ablation's network has RepNeXt's plain form, and so its sizes folded (table 5)."""
    network = create_model(
        "repnext_u3_t", unit="single", depths=(1, 2, 1, 1), channels=(6, 12, 24, 48), num_classes=5
    ).eval()
    assert network.architecture["arguments"]["unit"] == "single"
    x = torch.randn(2, 3, 64, 64)
    plain, free = fold(network, x), fold(small(RepUnit3).eval(), x)
    shapes, theirs = ([tuple(value.shape) for value in net.parameters()] for net in (plain, free))
    assert shapes == theirs
    with torch.device("meta"):
        whole = create_model("repnext_u3_t", unit="single").eval()
    cost = count(whole, torch.empty(1, 3, 224, 224, device="meta"))
    assert round(cost.macs / 1e9, 3) == PUBLISHED["repnext_u3_t"][1][1]  # one branch has the folded form's


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"unit": "u4"}, r"The unit is 'u4'; choose from 'u1', 'u2', 'u3', 'single'"),
        ({"depths": (1, 2, 3)}, r"The depths are \(1, 2, 3\); give four positive numbers"),
        ({"channels": (6, 12, 24, 0)}, r"The channels are .*; give four positive numbers"),
        ({"depths": ()}, r"The depths are \(\); give four"),
    ],
)
def test_wrong_stages_are_said(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        create_model("repnext_u3_t", **arguments)
