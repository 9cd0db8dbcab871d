"""Checkpoints come back as what they were, and say clearly why where they cannot."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import refold
from refold.checkpoints import Card, example_input, original, read_card
from refold.errors import CheckpointError, InputError
from refold.unfolding import Plan, rebuild

SIZE = [3, 48, 48]


@pytest.fixture(scope="module")
def net(randomised: Callable[[nn.Module], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return randomised(refold.create_model("repghostnet_050", num_classes=7))


@pytest.fixture(scope="module")
def plain(net: nn.Module) -> nn.Module:
    return refold.fold(net, torch.randn(1, *SIZE), prove=False)


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_training_form_comes_back_and_can_be_folded(net: nn.Module, plain: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    names = [f"class {i}" for i in range(7)]
    preprocessing = {"input_size": SIZE, "mean": [0.5] * 3}
    refold.save(net, path, class_names=names, preprocessing=preprocessing, provenance={"epoch": 3})
    loaded = refold.load(path, form="training")
    assert same(net, loaded)
    assert not loaded.training
    card: Any = loaded.card
    assert card == read_card(path)
    assert (card.form, card.architecture, card.arguments) == (
        "training",
        "repghostnet_050",
        {"num_classes": 7},
    )
    assert (card.class_names, card.preprocessing, card.provenance) == (names, preprocessing, {"epoch": 3})
    # What the file said goes along through the fold into the next file.
    refold.save(refold.fold(loaded, example_input(loaded), prove=False), path)
    folded = refold.load(path, form="plain")
    assert same(plain, folded)
    assert folded.card.class_names == names  # type: ignore[union-attr]
    assert example_input(folded).shape == (1, *SIZE)


def test_plain_form_comes_back_with_the_proof_that_made_it(net: nn.Module, tmp_path: Path) -> None:
    example = torch.randn(1, *SIZE)
    plain = refold.fold(net, example)
    report: Any = plain.fold_report
    for name in ("first.safetensors", "again.safetensors"):
        refold.save(plain, tmp_path / name)
        loaded = refold.load(tmp_path / name, form="plain")
        assert same(plain, loaded)
        assert torch.equal(plain(example), loaded(example))
        card: Any = loaded.card
        assert card.fold == json.loads(report.to_json())
        assert card.fold["proof"]["distance_float64"] <= 1e-9
        plain = loaded


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("form", ["training", "plain"])
def test_dtype_is_kept(
    net: nn.Module, plain: nn.Module, form: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = refold.load(_saved(net if form == "training" else plain, tmp_path / "a.safetensors")).to(dtype)
    loaded = refold.load(_saved(model, tmp_path / "b.safetensors"))
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert same(model, loaded)


def _saved(model: nn.Module, path: Path) -> Path:
    refold.save(model, path)
    return path


def test_timm_networks_are_described_too(tmp_path: Path) -> None:
    model = refold.create_model("resnet18", num_classes=3, in_chans=1)
    loaded = refold.load(_saved(model, tmp_path / "x.safetensors"))
    assert same(model, loaded)
    assert example_input(loaded).shape == (1, 1, 224, 224)


class Own(nn.Module):
    """A network of the user's own, with a tied weight and a shared module."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.second = nn.Conv2d(width, width, 1)
        self.third = nn.Conv2d(width, width, 1)
        self.third.weight = self.second.weight
        self.again = self.second

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).relu()).relu()
        return self.again(self.third(x).relu()).mean((2, 3))


@pytest.mark.parametrize("build", [Own, lambda: Own(4)])
def test_the_users_own_class(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = Own().double().eval()
    path = _saved(model, tmp_path / "own.safetensors")
    loaded: Any = refold.load(path, build)
    assert same(model, loaded)
    assert loaded.third.weight is loaded.second.weight
    refold.save(
        refold.fold(model, example_input(model, [3, 8, 8])), path, preprocessing={"input_size": [3, 8, 8]}
    )
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert torch.allclose(refold.load(path, build)(x), model(x), rtol=1e-12)
    with pytest.raises(CheckpointError, match=r"holds a network of class Own, .* give the class"):
        refold.load(path)
    with pytest.raises(
        CheckpointError, match=r"does not fit Own: 'third.bias' has shape \(4,\), expected \(6,\)"
    ):
        refold.load(path, Own, width=6)


def test_the_wrong_form_is_a_clear_sentence(net: nn.Module, plain: nn.Module, tmp_path: Path) -> None:
    training, folded = _saved(net, tmp_path / "t.safetensors"), _saved(plain, tmp_path / "p.safetensors")
    with pytest.raises(
        CheckpointError, match="holds the plain form of repghostnet_050, the training form is"
    ):
        refold.load(folded, form="training")
    with pytest.raises(
        CheckpointError, match="holds the training form of repghostnet_050, the plain form is"
    ):
        refold.load(training, form="plain")
    with pytest.raises(InputError, match="form is 'deployed'"):
        refold.load(training, form="deployed")  # type: ignore[arg-type]


def test_another_number_of_classes(net: nn.Module, plain: nn.Module, tmp_path: Path) -> None:
    for model in (net, plain):
        path = _saved(model, tmp_path / "x.safetensors")
        with pytest.raises(CheckpointError, match=r"has shape \(7, .*expected \(12, .*num_classes"):
            refold.load(path, num_classes=12)


def test_another_architecture(net: nn.Module, tmp_path: Path) -> None:
    path = _saved(net, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="does not fit"):
        refold.load(path, "repvgg_a0")


def test_damaged_and_missing_files(net: nn.Module, tmp_path: Path) -> None:
    path = _saved(net, tmp_path / "x.safetensors")
    whole = path.read_bytes()
    for end in (0, 4, 500, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(CheckpointError, match="no readable safetensors file") as caught:
            refold.load(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="There is no checkpoint file"):
        refold.load(tmp_path / "missing.safetensors")


def test_foreign_checkpoints_need_the_name_of_the_network(net: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "official.pth"
    torch.save({"state_dict": net.state_dict()}, path)
    with pytest.raises(CheckpointError, match="does not name its network; give the architecture"):
        refold.load(path)
    assert same(net, refold.load(path, "repghostnet_050", num_classes=7))
    with pytest.raises(CheckpointError, match="7 classes"):
        refold.load(path, "repghostnet_050")
    with pytest.raises(CheckpointError, match="is read as a training form"):
        refold.load(path, "repghostnet_050", form="plain", num_classes=7)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        refold.load(path, "repghostnet_050", num_classes=7)


class Marker:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickled_code_runs_only_if_allowed(net: nn.Module, tmp_path: Path) -> None:
    path, mark = tmp_path / "trap.pth", tmp_path / "executed"
    torch.save({"state_dict": net.state_dict(), "trap": Marker(mark)}, path)
    with pytest.raises(CheckpointError):
        refold.load(path, "repghostnet_050", num_classes=7)
    assert not mark.exists()
    assert same(net, refold.load(path, "repghostnet_050", num_classes=7, allow_pickle=True))
    assert mark.exists()
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(CheckpointError, match="cannot be unpickled"):
        refold.load(path, "repghostnet_050", num_classes=7, allow_pickle=True)


def test_nothing_half_written_stays(net: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        refold.save(net, tmp_path / "missing" / "x.safetensors")
    with pytest.raises(CheckpointError, match="cannot be written as JSON"):
        refold.save(net, tmp_path / "x.safetensors", provenance={"tensor": torch.ones(1)})
    assert list(tmp_path.iterdir()) == []


def test_a_description_of_a_newer_version(net: nn.Module, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "x.safetensors"
    save_file(
        {"a": torch.ones(1)}, path, metadata={"refold": json.dumps({"form": "plain", "colour": "blue"})}
    )
    with pytest.raises(CheckpointError, match=r"not understood .* newer version"):
        read_card(path)
    save_file({"a": torch.ones(1)}, path)
    assert read_card(path) is None


def test_title_of_a_card() -> None:
    assert Card("plain", "Own").title == "Own"
    assert Card("plain", "RepVGG", "repvgg_a0").title == "repvgg_a0"


def _trained(model: nn.Module, x: Tensor) -> nn.Module:
    optimizer = torch.optim.SGD(model.train().parameters(), 0.05)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model.eval()


MINE = Plan("mine", {"dense": ("column", "row"), "depthwise": ("1x1", "identity")}, repeats=2)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet10t", {"plan": "repvgg", "start": "random", "form": "looped"}),
        ("mobilenetv2_035", {"plan": MINE, "stages": [1, 2], "branches": {"*.1.*": 3, "*": 2}}),
    ],
)
def test_an_unfolded_network_comes_back_by_itself(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    model = refold.create_model(name, num_classes=3).double()
    wide = _trained(refold.unfold(model, example_input=x[:1], **options), x)
    path = _saved(wide, tmp_path / "wide.safetensors")
    loaded: Any = refold.load(path, form="training")
    assert same(wide, loaded)
    assert loaded.unfold_report == wide.unfold_report
    assert torch.equal(wide(x), loaded(x))
    # Its fold, and the fold of that file, are the same network; and so is the original.
    plain = refold.fold(loaded, x[:1], prove=False)
    again = refold.load(_saved(plain, tmp_path / "plain.safetensors"), form="plain")
    assert same(plain, again)
    back = original(loaded)
    assert type(back) is type(model)
    assert not hasattr(back, "unfold_report")
    assert back.state_dict().keys() == model.state_dict().keys()
    assert torch.allclose(wide(x), back(x), rtol=1e-9, atol=1e-12)
    returned = refold.load(_saved(back, tmp_path / "back.safetensors"), form="training")
    assert same(back, returned)
    assert read_card(tmp_path / "back.safetensors").unfold is None  # type: ignore[union-attr]


def test_a_plain_network_that_was_unfolded_again_comes_back(tmp_path: Path) -> None:
    x = torch.randn(2, *SIZE)
    first = refold.fold(refold.create_model("resnet10t"), x[:1], prove=False)
    plain = refold.load(_saved(first, tmp_path / "plain.safetensors"))
    wide = _trained(refold.unfold(plain, "ghostnetv3", example_input=x[:1], stages=[3]), x)
    second = refold.fold(wide, x[:1], prove=False)
    wider = refold.unfold(second, "acb", example_input=x[:1], stages=[2])
    for number, (model, form) in enumerate([(wide, "training"), (second, "plain"), (wider, "training")]):
        path = _saved(model, tmp_path / f"{number}.safetensors")
        loaded = refold.load(path, form=form)  # type: ignore[arg-type]
        assert same(model, loaded)
        assert torch.equal(model(x), loaded(x))
    back = original(wide)
    assert same(refold.load(_saved(back, tmp_path / "back.safetensors"), form="plain"), back)
    assert torch.allclose(wide(x), back(x), atol=1e-5)


def test_an_unfolded_network_without_a_name_needs_what_builds_it(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 16, 16)
    wide = refold.unfold(Own(), "repvgg", example_input=x)
    path = _saved(wide, tmp_path / "own.safetensors")
    with pytest.raises(CheckpointError, match=r"class Own.*as it was before refold\.unfold"):
        refold.load(path)
    with pytest.raises(CheckpointError, match=r"only you can build its class.*original_state_dict"):
        original(wide)
    assert same(wide, refold.load(path, Own))
    with pytest.raises(CheckpointError, match="has not the layers that were unfolded"):
        refold.load(path, lambda: nn.Sequential(nn.Conv2d(3, 4, 3)))
    with pytest.raises(InputError, match="unfolded already"):
        refold.load(path, lambda: refold.unfold(Own(), "repvgg", example_input=x))
    with pytest.raises(CheckpointError, match="do not fit Own as they did"):
        refold.load(path, lambda: _with_first(nn.Conv2d(3, 4, 1, bias=False)))


def _with_first(conv: nn.Conv2d) -> nn.Module:
    model = Own()
    model.first[0] = conv
    return model


def test_a_record_of_branches_of_a_newer_version() -> None:
    wide: Any = refold.unfold(Own(), "repvgg", example_input=torch.randn(2, 3, 16, 16))
    record = wide.unfold_report.to_dict()
    for strange in ({**record, "knots": 3}, {**record, "layers": [{"path": "first.0", "shapes": []}]}):
        with pytest.raises(CheckpointError, match=r"not understood .* newer version"):
            rebuild(Own(), strange)
