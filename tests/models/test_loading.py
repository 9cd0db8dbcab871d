"""Checkpoints: every known layout and wrapper loads, and what does not fit is told apart in one sentence."""

import argparse
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from golden import drawn_weights, golden_record, golden_state_dict
from refold.errors import CheckpointError
from refold.models import create_model, load_checkpoint
from refold.models.loading import checkpoint_classes, open_checkpoint

NAME = "repghostnet_050"


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return {key: value.float() for key, value in drawn_weights(create_model(NAME, num_classes=4)).items()}


def fresh(**arguments: object) -> nn.Module:
    return create_model(NAME, **{"num_classes": 4, **arguments})


def holds(network: nn.Module, weights: dict[str, Tensor]) -> bool:
    return all(
        torch.equal(value, weights[key].to(value.dtype)) for key, value in network.state_dict().items()
    )


def refusal(network: nn.Module, source: object, **arguments: object) -> str:
    """The message of the refusal, which is one sentence and leaves the network as it was."""
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(network, source, **arguments)
    assert holds(network, before)
    message = str(raised.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: w,
        lambda w: {"state_dict": w, "epoch": 3, "optimizer": {"lr": 0.1}},
        lambda w: {"model": w, "args": argparse.Namespace(lr=0.1)},
        lambda w: {"state_dict": {k: v + 1 for k, v in w.items()}, "state_dict_ema": w},
        lambda w: {"model": {k: v + 1 for k, v in w.items()}, "model_ema": w},
        lambda w: {"state_dict": w, "state_dict_ema": None},
        lambda w: {f"module.{k}": v for k, v in w.items()},
        lambda w: {"state_dict": {f"module._orig_mod.{k}": v for k, v in w.items()}},
    ],
    ids=["bare", "state_dict", "model", "ema", "model_ema", "no ema", "module", "compiled"],
)
def test_wrappers(wrap: Callable[..., dict[str, object]], weights: dict[str, Tensor], tmp_path: Path) -> None:
    for source in (wrap(weights), tmp_path / "checkpoint.pth"):
        if isinstance(source, Path):
            torch.save(wrap(weights), source)
        network = fresh()
        loaded = load_checkpoint(network, source)
        assert (loaded.layout, loaded.missing, loaded.unexpected) == ("refold", (), ())
        assert holds(network, weights)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".pth.tar", ".safetensors"])
def test_files(suffix: str, weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(weights, path)
    for source in (path, str(path)):
        network = fresh()
        load_checkpoint(network, source)
        assert holds(network, weights)


def test_a_network_is_a_source_and_dtype_is_the_targets(weights: dict[str, Tensor]) -> None:
    network = fresh()
    network.load_state_dict(weights)
    other = fresh().to(torch.bfloat16)
    load_checkpoint(other, {"model": network})
    assert other.get_classifier().weight.dtype == torch.bfloat16
    assert holds(other, weights)


def test_counters_of_batches_may_be_absent(weights: dict[str, Tensor]) -> None:
    network = fresh()
    kept = {key: value for key, value in weights.items() if not key.endswith("num_batches_tracked")}
    assert len(kept) < len(weights)
    assert load_checkpoint(network, kept).missing == ()
    assert holds(network, weights)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("repvgg_a0", "timm RepVGG"),
        ("ghostnet_050", "official GhostNet"),
        ("ghostnetv2_100", "official GhostNetV2"),
        ("ghostnetv3_050", "timm GhostNetV3"),
        ("mobileone_s0", "timm MobileOne"),
        ("mobileone_s4", "timm MobileOne"),
        ("repghostnet_050", "official RepGhostNet"),
    ],
)
def test_timms_layout_is_recognised(name: str, layout: str) -> None:
    theirs = timm.create_model(name, num_classes=4)
    loaded = load_checkpoint(create_model(name, num_classes=4), theirs.state_dict())
    assert (loaded.layout, loaded.missing, loaded.unexpected) == (layout, (), ())


def test_squeeze_excite_of_timms_repvgg_is_mapped() -> None:
    with torch.device("meta"):
        theirs, ours = timm.create_model("repvgg_d2se"), create_model("repvgg_d2se")
    assert load_checkpoint(ours, theirs.state_dict()).layout == "timm RepVGG"


def test_a_timm_network_loads_its_own_checkpoint() -> None:
    source = timm.create_model("resnet18", num_classes=4)
    network = create_model("resnet18", num_classes=4)
    load_checkpoint(network, {"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}})
    assert holds(network, source.state_dict())
    message = refusal(create_model("resnet18", num_classes=5), source.state_dict())
    assert "has 4 classes, but resnet18 has 5; create it with num_classes=4" in message


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kept", [0, 10, 5_000, -1_000])
def test_a_truncated_file(suffix: str, kept: int, weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(weights, path)
    path.write_bytes(path.read_bytes()[:kept])
    assert f"{path} cannot be read: it is cut short" in refusal(fresh(), path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_cut_anywhere(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(nn.Linear(3, 2).state_dict(), path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    network = nn.Linear(3, 2)
    for kept in range(0, len(whole), max(1, len(whole) // 100)):
        path.write_bytes(whole[:kept])
        assert "cannot be read" in refusal(network, path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_of_something_else(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"notes{suffix}"
    path.write_text("These are not weights.\n" * 100)
    assert "cannot be read" in refusal(fresh(), path)


def test_no_file(tmp_path: Path) -> None:
    assert "does not exist" in refusal(fresh(), tmp_path / "absent.pth")
    assert "is a folder" in refusal(fresh(), tmp_path)


def test_pickled_objects_are_named_and_not_executed(tmp_path: Path) -> None:
    path = tmp_path / "whole.pth"
    torch.save(fresh(), path)
    message = refusal(fresh(), path)
    assert "holds Python objects besides weights (" in message


def test_a_file_without_weights(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save([torch.zeros(3)], path)
    assert "holds a list, not a dictionary of weights" in refusal(fresh(), path)
    assert "holds no weights" in refusal(fresh(), {"epoch": 3})


def test_a_foreign_checkpoint_names_what_differs() -> None:
    foreign = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).state_dict()
    message = refusal(fresh(), foreign)
    total = len(fresh().state_dict())
    lacking = sum(not key.endswith("num_batches_tracked") for key in fresh().state_dict())
    assert f"is not one of {NAME}: it lacks {lacking} of {total} weights (stem.conv.weight, " in message
    assert f" and {lacking - 3} more)" in message
    assert f" and it has {len(foreign)} unknown ones (0.weight, 0.bias, 1.weight and 4 more);" in message
    assert "has no weight that fits" in refusal(fresh(), {"a": torch.zeros(2)}, strict=False)


def test_another_network_of_the_family(weights: dict[str, Tensor]) -> None:
    message = refusal(create_model("repghostnet_080", num_classes=4), weights)
    assert "weights of another shape (stem.conv.weight (8, 3, 3, 3) for (12, 3, 3, 3), " in message


def test_a_missing_weight_is_named_as_the_network_and_an_extra_one_as_the_file_names_it() -> None:
    official = timm.create_model(NAME, num_classes=4).state_dict()
    official["blocks.0.0.extra.weight"] = official.pop("conv_head.bias")
    message = refusal(fresh(), official)
    assert "it lacks 1 of " in message
    assert "(head.conv.bias) and it has 1 unknown ones (blocks.0.0.extra.weight);" in message
    loaded = load_checkpoint(fresh(), official, strict=False)
    assert (loaded.missing, loaded.unexpected) == (("head.conv.bias",), ("blocks.0.0.extra.weight",))


@pytest.mark.parametrize("classes", [0, 10])
def test_the_wrong_class_count(classes: int, weights: dict[str, Tensor]) -> None:
    network = fresh(num_classes=classes)
    message = refusal(network, weights)
    assert f"has 4 classes, but {NAME} has {classes}; create it with num_classes=4" in message
    untouched = network.get_classifier().state_dict()
    loaded = load_checkpoint(network, weights, strict=False)
    assert loaded.unexpected == ("head.fc.weight", "head.fc.bias")
    assert loaded.missing == (("head.fc.weight", "head.fc.bias") if classes else ())
    assert torch.equal(network.head.conv.weight, weights["head.conv.weight"])
    assert all(torch.equal(value, network.get_classifier().state_dict()[k]) for k, value in untouched.items())


@pytest.mark.parametrize("name", ["repvgg_a0", "repghostnet_050", "ghostnetv3_050", "mobileone_s0"])
def test_a_converted_checkpoint_of_timm_is_in_plain_form(name: str) -> None:
    plain = timm.utils.reparameterize_model(timm.create_model(name, num_classes=4))
    message = refusal(create_model(name, num_classes=4), plain.state_dict())
    assert f"is in plain (folded) form, but {name} is in training form" in message


@pytest.mark.parametrize(
    ("name", "official"),
    [
        ("repvgg_a0", "RepVGG_A0"),
        (NAME, "repghostnet_0_5x"),
        ("ghostnetv3_100", "ghostnetv3_1.0x"),
        ("mobileone_s0", "MobileOne_S0"),
    ],
)
def test_a_converted_official_checkpoint_is_in_plain_form(name: str, official: str) -> None:
    plain = golden_state_dict(golden_record(official), "deploy_state_dict")
    assert "is in plain (folded) form" in refusal(create_model(name), plain)


def test_mobileone_in_its_authors_layout() -> None:
    record = golden_record("MobileOne_S0")
    named_by_timm, named_by_apple = (
        golden_state_dict(record, kind) for kind in ("state_dict", "apple_state_dict")
    )
    networks = [create_model("mobileone_s0").double().eval() for _ in range(2)]
    for network, keys, layout in zip(
        networks, (named_by_timm, named_by_apple), ("timm MobileOne", "official MobileOne"), strict=True
    ):
        # Both name the same weights in the same order; only the names, not the weights, may make a difference.
        weights = dict(zip(keys, named_by_timm.values(), strict=True))
        loaded = load_checkpoint(network, weights)
        assert (loaded.layout, loaded.missing, loaded.unexpected) == (layout, (), ())
    assert holds(networks[1], networks[0].state_dict())


@pytest.mark.parametrize("branches", [1, 2, 5])
def test_official_names_fit_any_number_of_branches(branches: int) -> None:
    network = create_model("ghostnetv3_050", num_classes=4, branches=branches)
    weights = drawn_weights(network)
    network.load_state_dict(weights)
    weights = network.state_dict()
    official = {}
    for key, value in weights.items():
        new = key
        for ours, theirs in (("primary", "primary"), ("cheap", "cheap"), ("depthwise", "dw")):
            for index in range(branches):
                new = new.replace(f".{ours}.conv.branches.{index}.", f".{theirs}_rpr_conv.{index}.")
            new = new.replace(f".{ours}.conv.branches.{branches}.", f".{theirs}_rpr_scale.")
            new = new.replace(f".{ours}.conv.skip.", f".{theirs}_rpr_skip.")
        if new != key:
            official[new] = value
    again = create_model("ghostnetv3_050", num_classes=4, branches=branches)
    loaded = load_checkpoint(again, official, strict=False)
    assert (loaded.layout, loaded.unexpected) == ("official GhostNetV3", ())
    state = again.state_dict()
    filled = [key for key in weights if "branches" in key or "skip" in key]
    assert len(filled) == len(official)
    assert all(torch.equal(state[key], weights[key]) for key in filled)


def test_plain_and_training_form_are_told_apart_for_refolds_own_names() -> None:
    training, plain = (create_model("repvgg_a0", num_classes=4) for _ in range(2))
    for block in (module for module in plain.modules() if hasattr(module, "conv")):
        if hasattr(block.conv, "branches"):
            first = block.conv.branches[0].conv
            block.conv = nn.Conv2d(
                first.in_channels, first.out_channels, 3, first.stride, padding=1, groups=first.groups
            )
    assert "is in plain (folded) form" in refusal(training, plain.state_dict())
    message = refusal(plain, training.state_dict())
    assert "is in training form, but repvgg_a0 is in plain (folded) form" in message
    load_checkpoint(plain, plain.state_dict())
    converted = timm.utils.reparameterize_model(timm.create_model("repvgg_a0", num_classes=4))
    assert load_checkpoint(plain, converted.state_dict()).layout == "timm RepVGG"


class Callbacks:
    """Something of a training script's own, which is no weight."""


def with_ema(weights: dict[str, Tensor], trained: str, averaged: str) -> dict[str, Tensor]:
    return {
        **{f"{trained}{key}": value + 1 for key, value in weights.items()},
        **{f"{averaged}{key}": value for key, value in weights.items()},
    }


@pytest.mark.parametrize(
    ("wrap", "notes"),
    [
        (lambda w: {"model_state_dict": w}, ["took the weights in 'model_state_dict'"]),
        (lambda w: {"net": w}, ["took the weights in 'net'"]),
        (lambda w: {"network": w}, ["took the weights in 'network'"]),
        (lambda w: {"weights": w}, ["took the weights in 'weights'"]),
        (
            lambda w: {"params": {k: v + 1 for k, v in w.items()}, "params_ema": w},
            ["took the weights in 'params_ema', which are averaged"],
        ),
        (
            lambda w: {"model": {k: v + 1 for k, v in w.items()}, "ema": {"decay": 0.9, "module": w}},
            ["took the weights in 'ema.module', which are averaged"],
        ),
        (
            lambda w: {"state_dict": w, "ema_state_dict": {"step": torch.tensor(3)}},
            ["took the weights in 'state_dict'"],
        ),
        (
            lambda w: {f"module._orig_mod.model.{k}": v for k, v in w.items()},
            ["stripped 'module._orig_mod.model.' from their names"],
        ),
        (
            lambda w: {f"model.module.backbone.{k}": v for k, v in w.items()},
            ["stripped 'model.module.backbone.' from their names"],
        ),
        (lambda w: {f"student.{k}": v for k, v in w.items()}, ["stripped 'student.' from their names"]),
        (
            lambda w: {"n_averaged": torch.tensor(5), **{f"module.{k}": v for k, v in w.items()}},
            ["stripped 'module.' from their names", "left out 1 other (n_averaged)"],
        ),
        (
            lambda w: {
                "pytorch-lightning_version": "2.6.6",
                "callbacks": {"ModelCheckpoint": {"best": Path("a") / "b"}},
                "hyper_parameters": {"rate": np.float64(0.1), "sizes": np.arange(3), "name": np.str_("x")},
                "state_dict": {
                    **{f"model.{k}": v for k, v in w.items()},
                    **{f"teacher.{k}": v + 1 for k, v in w.items()},
                    "loss.weight": torch.ones(4),
                },
            },
            [
                "took the weights in 'state_dict'",
                "stripped 'model.' from their names",
                "left out {others} others (teacher.stem.conv.weight, ",
            ],
        ),
        (
            lambda w: {"state_dict": with_ema(w, "net.", "average.module.")},
            [
                "took the weights in 'state_dict'",
                "stripped 'average.module.' from their names, which are averaged",
                "left out {own} others (net.)",
            ],
        ),
        (
            lambda w: with_ema(w, "online_model.", "ema_model."),
            ["stripped 'ema_model.' from their names, which are averaged", "left out {own} others (online_"],
        ),
        (
            lambda w: {k if k.startswith("head.fc") else f"backbone.{k}": v for k, v in w.items()},
            ["stripped 'backbone.' from their names"],
        ),
        (lambda w: {k: v.numpy() for k, v in w.items()}, []),
    ],
)  # fmt: skip
def test_what_training_scripts_put_around_weights(
    wrap: Callable[..., dict[str, object]], notes: list[str], weights: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint.ckpt"
    torch.save(wrap(weights), path)
    network = fresh()
    loaded = load_checkpoint(network, path)
    assert holds(network, weights)
    assert len(loaded.notes) == len(notes)
    for note, start in zip(loaded.notes, notes, strict=True):
        assert note.startswith(start.format(own=len(weights), others=len(weights) + 1))


def test_a_prefix_of_the_networks_own_names_stays() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))

    saved = Own().state_dict()
    network = Own()
    assert load_checkpoint(network, saved).notes == ()
    assert holds(network, saved)
    wrapped = {f"model.{key}": value for key, value in saved.items()}
    network = Own()
    assert load_checkpoint(network, wrapped).notes == ("stripped 'model.' from their names",)
    assert holds(network, saved)


def test_values_beside_the_weights_do_nothing(weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    beside = {
        "args": argparse.Namespace(output=Path("runs"), windows=PureWindowsPath("C:/runs")),
        "best": np.float32(0.5),
        "epochs": np.int64(3),
        "history": defaultdict(list, loss=[1.0]),
        "space": SimpleNamespace(a=1),
    }
    torch.save({"model": weights, **beside}, path)
    network = fresh()
    load_checkpoint(network, path)
    assert holds(network, weights)
    torch.save({"model": weights, "callbacks": Callbacks()}, path)
    assert "holds Python objects besides weights (" in refusal(fresh(), path)


def test_a_checkpoint_that_holds_itself(weights: dict[str, Tensor]) -> None:
    around: dict[str, object] = {"weights": weights}
    around |= dict.fromkeys(("model", "net", "ema", "state_dict"), around)
    network = fresh()
    assert load_checkpoint(network, around).notes == ("took the weights in 'weights'",)
    assert holds(network, weights)


def test_the_classes_are_read_from_the_checkpoint(weights: dict[str, Tensor]) -> None:
    network = create_model(NAME)
    wrapped = {"state_dict": {f"model.{key}": value for key, value in weights.items()}}
    assert checkpoint_classes(open_checkpoint(wrapped), network) == 4
    theirs = timm.create_model(NAME, num_classes=6).state_dict()
    assert checkpoint_classes(open_checkpoint(theirs), network) == 6
    without = {key: value for key, value in weights.items() if not key.startswith("head.fc")}
    assert checkpoint_classes(open_checkpoint(without), network) is None
