"""A card decides nothing dangerous, and one that is broken or lies is one sentence."""

import json
import os
import socket
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import refold
from refold.cards import is_harmless, is_recordable
from refold.checkpoints import read_card
from refold.errors import CheckpointError, InputError, RefoldError

NAME = "repghostnet_050"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A network in both forms, and one of timm's."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    model = refold.create_model(NAME, num_classes=4).eval()
    models = {
        "training": model,
        "plain": refold.fold(model, torch.randn(1, 3, 64, 64), prove=False),
        "unfolded": refold.unfold(model, "repvgg", example_input=torch.randn(1, 3, 64, 64)),
        "timm": refold.create_model("resnet10t", num_classes=4),
    }
    for name, each in models.items():
        refold.save(each, folder / f"{name}.safetensors", preprocessing={"input_size": [3, 64, 64]})
    return {name: folder / f"{name}.safetensors" for name in models}


@pytest.fixture
def lie(saved: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """Write a checkpoint again with another card: what it says, or a text in its place."""

    def write(form: str, change: Callable[[dict[str, Any]], object] | str) -> Path:
        path = tmp_path / "lie.safetensors"
        card: Any = read_card(saved[form])
        if isinstance(change, str):
            text = change
        else:
            described = json.loads(json.dumps(card, default=vars))
            change(described)
            text = json.dumps(described)
        save_file(load_file(saved[form]), path, metadata={"refold": text})
        return path

    return write


@pytest.fixture
def nothing_is_opened(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Everything that goes to a network or a hub, or runs a command, is written down and refused."""
    opened: list[object] = []

    def refused(*arguments: object, **_: object) -> None:
        opened.append(arguments)
        raise OSError("this must not be called")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(urllib.request, "urlopen", refused)
    monkeypatch.setattr(os, "system", refused)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refused)
    monkeypatch.setattr(torch.hub, "download_url_to_file", refused)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refused)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", refused)
    monkeypatch.setattr("timm.models._helpers.torch.load", refused)
    monkeypatch.setattr("timm.models._factory.load_model_config_from_path", refused)
    return opened


def refusal(path: Path) -> str:
    with pytest.raises(RefoldError) as raised:
        refold.load(path)
    message = str(raised.value)
    assert isinstance(raised.value, CheckpointError | InputError)
    assert "\n" not in message
    assert len(message) < 600
    return message


@pytest.mark.parametrize("form", ["training", "timm"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"pretrained": True},
        {"pretrained_cfg": {"url": "https://example.org/x.pth"}},
        {"pretrained": True, "pretrained_cfg_overlay": {"url": "https://example.org/x.pth"}},
        {"pretrained_cfg_overlay": {"file": "/etc/passwd"}},
        {"checkpoint_path": "/etc/passwd"},
        {"cache_dir": "/tmp/x"},
        {"pretrained_model_args": {}},
        {"weights_url": "x"},
        {"hub_id": "x"},
        {"cfg": 3},
        {"no such name": 3},
        {"colour": "red"},
        {"act_layer": "https://example.org"},
        {"act_layer": "a" * 1000},
        {"act_layer": {"a": {"b": {"c": {"d": {"e": 1}}}}}},
        {"in_chans": 10**12},
        {"drop_rate": 1e300},
        {"num_classes": "4"},
        {"num_classes": -4},
        {"num_classes": 4.5},
        {"num_classes": True},
        {"num_classes": 10**12},
        {"num_classes": 5_000_000},
        {"num_classes": 5},
    ],
)
def test_arguments_that_no_file_may_set(
    form: str, arguments: dict[str, Any], lie: Callable[..., Path], nothing_is_opened: list[object]
) -> None:
    path = lie(form, lambda card: card["arguments"].update(arguments))
    assert str(path) in refusal(path)
    assert nothing_is_opened == []


@pytest.mark.parametrize(
    "name",
    ["hf-hub:timm/resnet18.a1_in1k", "hf_hub:x", "local-dir:/tmp", "http://x", "../x", "/x", "a:b", "", 3],
)
def test_names_that_no_file_may_give(
    name: Any, lie: Callable[..., Path], nothing_is_opened: list[object]
) -> None:
    assert "is not understood by refold" in refusal(lie("timm", lambda card: card.update(architecture=name)))
    assert nothing_is_opened == []


@pytest.mark.parametrize(
    "text", ['{"a": ' * 100_000, "[" * 100_000 + "]" * 100_000, "{", "[]", "3", '"x"', "null"]
)
def test_a_card_that_is_none(text: str, lie: Callable[..., Path]) -> None:
    assert "is not understood by refold" in refusal(lie("training", text))


@pytest.mark.parametrize(
    "change",
    [
        {"form": "deployed"},
        {"model_class": 3},
        {"arguments": []},
        {"class_names": "abc"},
        {"class_names": [1, 2, 3, 4]},
        {"class_names": {"a": 1}},
        {"preprocessing": [3]},
        {"preprocessing": {"input_size": 224}},
        {"preprocessing": {"input_size": [3, 0, 64]}},
        {"preprocessing": {"input_size": [3, -64, 64]}},
        {"preprocessing": {"input_size": [3, 64.5, 64]}},
        {"preprocessing": {"input_size": [3, 10**6, 10**6]}},
        {"preprocessing": {"input_size": ["3", "64", "64"]}},
        {"preprocessing": {"mean": "0.5"}},
        {"preprocessing": {"mean": [float("nan")] * 3}},
        {"preprocessing": {"std": [0.0] * 3}},
        {"preprocessing": {"std": []}},
        {"preprocessing": {"crop_pct": 1e9}},
        {"preprocessing": {"interpolation": ["bicubic"]}},
        {"provenance": 3},
        {"fold": [3]},
        {"fold": "record"},
        {"unfold": 3},
        {"refold_version": None},
        {"colour": "red"},
    ],
)  # fmt: skip
def test_what_a_card_says_has_its_type(change: dict[str, Any], lie: Callable[..., Path]) -> None:
    message = refusal(lie("training", lambda card: card.update(change)))
    assert "is not understood by refold" in message
    assert next(iter(change)) in message


def test_names_are_as_many_as_the_classes(lie: Callable[..., Path]) -> None:
    for form in ("training", "plain"):
        message = refusal(lie(form, lambda card: card.update(class_names=["a", "b"])))
        assert "has 2 class names for a network of 4 classes" in message
    message = refusal(lie("training", lambda card: card.update(class_names=["a"] * 1_000_001)))
    assert "class_names: List should have at most 1000000 items" in message


def nested(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    "change",
    [
        lambda fold: fold.update(record=3),
        lambda fold: fold.update(record=[3]),
        lambda fold: fold.update(record=[{"place": "nowhere", "layer": {"kind": "Identity"}}]),
        lambda fold: fold.update(record=[{"place": ["x"], "layer": {"kind": "Identity"}}]),
        lambda fold: fold.update(record=[{"place": "", "adds": {}, "tensors": {"x": [10**7, 10**7]}, "becomes": []}]),
        lambda fold: fold.update(record=[{"place": "stem", "layer": {"kind": "Linear", "in_features": 10**6,
                                                                     "out_features": 10**6, "bias": True}}]),
        lambda fold: fold.update(record=[{"place": "stem", "layer": {"kind": "Conv2d", "in_channels": -1}}]),
        lambda fold: fold.update(record=nested(200)),
        lambda fold: fold.pop("regions"),
        lambda fold: fold.update(regions=[{"x": 1}]),
        lambda fold: fold.update(before=None),
        lambda fold: fold.update(record=[], options={"objective": 3}),
        lambda fold: fold.update(record=[], options={"colour": 3}),
        lambda fold: fold.update(record=[], options=[3]),
    ],
)  # fmt: skip
def test_the_record_of_a_fold_is_not_believed(change: Callable[..., Any], lie: Callable[..., Path]) -> None:
    path = lie("plain", lambda card: change(card["fold"]))
    refusal(path)


def test_the_record_of_branches_is_not_believed(lie: Callable[..., Path]) -> None:
    def with_layer(**values: Any) -> Callable[[dict[str, Any]], None]:
        return lambda card: card["unfold"]["layers"][0].update(values)

    for change in (
        with_layer(path="nowhere"),
        with_layer(repeats=10**9),
        with_layer(repeats="3"),
        with_layer(shapes=["nonsense"]),
        lambda card: card["unfold"].pop("layers"),
        lambda card: card["unfold"].update(before=3),
        lambda card: card["unfold"].update(before={"unfold": card["unfold"].copy(), "fold": None}),
    ):
        refusal(lie("unfolded", change))


@pytest.mark.parametrize(
    "node",
    [
        ["x", "placeholder", "x=__import__('os').system('true')", {"tuple": []}, {}],
        ["y", "call_method", "abs() or __import__('os').system('true') or x.abs", {"tuple": [{"node": "x"}]}, {}],
        ["y", "call_module", "a\"), __import__('os').system('true'), (\"", {"tuple": [{"node": "x"}]}, {}],
        ["y", "get_attr", "a\"), __import__('os').system('true'), (\"", {"tuple": []}, {}],
        ["y", "call_function", "torch.abs", {"tuple": [{"node": "x"}]}, {"out=__import__('os').system('true'), b": 1}],
        ["y", "call_function", "torch.ops.aten.from_file", {"tuple": ["/tmp/x"]}, {}],
    ],
)  # fmt: skip
def test_no_code_runs_because_a_record_says_so(
    node: list[Any], lie: Callable[..., Path], nothing_is_opened: list[object]
) -> None:
    x = ["x", "placeholder", "x", {"tuple": []}, {}]
    graph = [node] if node[1] == "placeholder" else [x, node]
    graph.append(["output", "output", "output", {"tuple": [{"node": graph[-1][0]}]}, {}])
    change = {"place": "", "adds": {}, "tensors": {}, "forward": graph, "keep_methods": False}
    path = lie("plain", lambda card: card["fold"].update(record=[change]))
    assert "does not fit this RepGhostNet at ''" in refusal(path)
    assert nothing_is_opened == []


def test_what_is_recorded_is_what_may_be_read() -> None:
    for name, arguments, recordable in (
        (NAME, {"num_classes": 3}, True),
        ("resnet18", {"num_classes": 3, "drop_path_rate": 0.1, "act_layer": "silu"}, True),
        ("convnext_atto", {"depths": [1, 1, 2, 1]}, True),
        ("convnext_atto", {"conv_mlp": True}, True),
        ("resnet18", {"pretrained_cfg_overlay": {"url": "x"}}, False),
        ("resnet18", {"colour": 3}, False),
        ("resnet18", {"act_layer": nn.SiLU}, False),
        ("hf-hub:timm/resnet18", {}, False),
        ("no_such_model", {"colour": 3}, False),
    ):  # fmt: skip
        assert is_recordable({"name": name, "arguments": arguments}) is recordable
    assert is_harmless("drop_path_rate")
    assert not is_harmless("checkpoint_path")


def test_what_a_pretrained_configuration_changes_is_recorded_as_what_it_changes(tmp_path: Path) -> None:
    overlay = {
        "num_classes": 5,
        "mean": [0.5, 0.5, 0.5],
        "input_size": [3, 96, 96],
        "url": "https://example.org/x",
    }
    model = refold.create_model("resnet10t", pretrained_cfg_overlay=overlay).eval()
    refold.save(model, tmp_path / "net.safetensors")
    card: Any = read_card(tmp_path / "net.safetensors")
    assert (card.architecture, card.arguments) == ("resnet10t", {"num_classes": 5})
    assert card.preprocessing["mean"] == [0.5, 0.5, 0.5]
    assert card.preprocessing["input_size"] == [3, 96, 96]
    assert "example.org" not in json.dumps(vars(card))
    assert refold.load(tmp_path / "net.safetensors").num_classes == 5


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("resnet10t", {"num_classes": 7}, ("resnet10t", {"num_classes": 7, "in_chans": 3})),
        ("resnet10t.c3_in1k", {"in_chans": 1, "num_classes": 2}, ("resnet10t", {"in_chans": 1, "num_classes": 2})),
        ("repvgg_a0", {"num_classes": 3}, ("repvgg_a0.rvgg_in1k", {"num_classes": 3, "in_chans": 3})),
        ("resnet10t", {"features_only": True, "out_indices": (1, 2)},
         ("resnet10t", {"features_only": True, "out_indices": [1, 2]})),
    ],
)  # fmt: skip
def test_a_network_that_timm_built_keeps_its_name(
    name: str, arguments: dict[str, Any], expected: tuple[str, dict[str, Any]], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, **arguments).eval()
    if "features_only" in arguments and not hasattr(model, "_model_args"):
        pytest.skip("this version of timm does not keep what it was called with")
    x = torch.randn(1, arguments.get("in_chans", 3), 64, 64)
    forms = {"training": model}
    if "features_only" not in arguments:
        forms["plain"] = refold.fold(model, x, prove=False)
        forms["unfolded"] = refold.unfold(model, "repvgg", example_input=x)
    for form, each in forms.items():
        refold.save(each, tmp_path / f"{form}.safetensors")
        card: Any = read_card(tmp_path / f"{form}.safetensors")
        assert (card.architecture, card.arguments) == expected
        loaded = refold.load(tmp_path / f"{form}.safetensors")
        with torch.no_grad():
            given, back = each(x), loaded(x)
        pairs = zip(given, back, strict=True) if isinstance(given, list) else [(given, back)]
        assert all(torch.equal(a, b) for a, b in pairs)


def test_a_network_of_timms_that_was_changed_has_no_name(tmp_path: Path) -> None:
    changed = [timm.create_model("resnet10t") for _ in range(3)]
    changed[0].layer1[0].act1 = nn.SiLU()
    changed[1].layer1[0].conv1 = nn.Conv2d(64, 64, 5, padding=2, bias=False)
    changed[2].pretrained_cfg = {"architecture": "hf-hub:timm/resnet18"}
    for model in changed:
        refold.save(model, tmp_path / "net.safetensors")
        card: Any = read_card(tmp_path / "net.safetensors")
        assert card.architecture is None
    reset = timm.create_model("resnet10t")
    reset.reset_classifier(5)
    refold.save(reset, tmp_path / "net.safetensors")
    assert refold.load(tmp_path / "net.safetensors").num_classes == 5


def test_what_is_written_can_be_read(saved: dict[str, Path], tmp_path: Path) -> None:
    model, path = refold.load(saved["training"]), tmp_path / "net.safetensors"
    for given, message in (
        ({"preprocessing": {"input_size": [3, 64.5, 64]}}, "input_size.1: Input should be a valid integer"),
        ({"preprocessing": {"mean": [float("nan")] * 3}}, "mean.0: Input should be a finite number"),
        ({"class_names": [1, 2, 3, 4]}, "class_names.0: Input should be a valid string"),
        ({"provenance": {"deep": nested(2_000)}}, "recursion"),
        ({"provenance": {"path": Path("x")}}, "PosixPath is not JSON serializable"),
    ):
        with pytest.raises(CheckpointError) as raised:
            refold.save(model, path, **given)  # type: ignore[arg-type]
        assert message in str(raised.value)
        assert not path.exists()
    refold.save(model, path, provenance={"loss": float("nan"), "time": (1, 2)})
    card: Any = read_card(path)
    assert card.provenance["loss"] != card.provenance["loss"]
    assert card.provenance["time"] == [1, 2]
