"""Runs with the rounding of an int8 file in the loop: they end with what was trained, and go on with the same bits."""

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from rich.console import Console

import refold
from refold.errors import InputError
from refold.training.module import TrainingModule
from refold.training.recipe import load_recipe
from refold.training.run import Settings, resume, train

CLASSES = ["a", "b"]


def quiet() -> Console:
    return Console(file=io.StringIO(), width=100)


@pytest.fixture
def settings(make: Callable[..., Path], tmp_path: Path) -> Callable[..., Settings]:
    """A run of two epochs of three steps, from the weights of a small network."""
    data = make(dict.fromkeys(CLASSES, 15), size=(36, 36))
    torch.manual_seed(0)
    net = refold.create_model("repghostnet_050", num_classes=2).eval()
    start = tmp_path / "start.safetensors"
    refold.save(net, start, class_names=CLASSES, preprocessing={"input_size": [3, 32, 32]})

    def told(output: str = "run", recipe: dict[str, Any] | None = None, **others: Any) -> Settings:
        values = {"epochs": 2, "batch_size": 8, "calibration_images": 20, **(recipe or {})}
        given = {"data": str(data), "network": str(start), "accelerator": "cpu", **others}
        return Settings(tmp_path / output, recipe=load_recipe("quantized", values), **given)

    return told


def answers(path: Path, images: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"image": images.numpy()})[0])


def test_a_run_ends_with_a_file_that_computes_what_was_trained(
    settings: Callable[..., Settings], call: Callable[..., Any]
) -> None:
    told = settings(recipe={"ema_decay": 0.5})
    result = train(told, quiet())
    assert result is not None
    assert result.int8 is not None
    assert result.int8["decibels_from_trained"] > 30
    assert result.int8["saturating_channels"] == 0
    # Six images and two classes: at 55 dB the last bit of either arithmetic may well make the engine the nearer one.
    assert result.int8["engine_gap"] < 1
    names = {path.name for path in told.output.iterdir()}
    assert {"int8.onnx", "README.md", "card.json", "history.csv", "last.ckpt", "run.json"} <= names
    assert not names & {"training.safetensors", "plain.safetensors", "plain.onnx"}
    # The best weights are in the state of the run; rounded, they are the file's integers.
    written = json.loads((told.output / "run.json").read_text())
    assert written["recipe"]["recipe"]["image_size"] == 32
    page = (told.output / "README.md").read_text()
    assert "int8, before training" in page
    assert "int8.onnx" in page
    image = next(Path(told.data).rglob("*.png"))
    code, out, _ = call("predict", told.output, image, "--json")
    assert code == 0
    assert {each["name"] for each in json.loads(out)[0]["classes"]} == set(CLASSES)
    code, _, err = call("fold", told.output, "-o", "plain.safetensors")
    assert code == 2
    assert "gave an int8 file; name" in err


@pytest.mark.slow
def test_an_interrupted_run_with_rounding_goes_on_with_the_same_bits(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = settings("whole", {"ema_decay": 0.5})
    train(whole, quiet())
    step = TrainingModule.training_step
    stops = {(1, 1)}

    def interrupted(module: TrainingModule, batch: Any, batch_idx: int) -> Any:
        if (module.current_epoch, batch_idx) in stops:
            raise KeyboardInterrupt
        return step(module, batch, batch_idx)

    monkeypatch.setattr(TrainingModule, "training_step", interrupted)
    parts = settings("parts", {"ema_decay": 0.5})
    with pytest.raises(KeyboardInterrupt):
        train(parts, quiet())
    assert (parts.output / "int8.onnx").is_file()
    stops.clear()
    resume(parts.output, quiet())
    files = [(folder / "int8.onnx").read_bytes() for folder in (whole.output, parts.output)]
    assert files[0] == files[1]
    images = torch.from_numpy(np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype("f4"))
    found = [answers(folder / "int8.onnx", images) for folder in (whole.output, parts.output)]
    assert torch.equal(*found)
    with pytest.raises(InputError, match="weight_bits is 8 in this run and cannot become 4"):
        resume(parts.output, quiet(), recipe_changes={"weight_bits": 4})


@pytest.mark.parametrize(
    ("others", "sentence"),
    [
        (
            {"network": "repghostnet_050"},
            "Rounding is learnt from trained weights, and repghostnet_050 has none",
        ),
        ({"unfold": "repvgg"}, "which has no branches; leave unfold out"),
        ({"precision": "64-true"}, "rounding to int8 is computed in float32; give 32-true"),
        ({"data": "digits"}, "answers with 2 numbers and the data has 10 classes"),
    ],
)
def test_what_does_not_go_with_rounding_is_said(
    settings: Callable[..., Settings], others: dict[str, Any], sentence: str
) -> None:
    told = settings(**others)
    with pytest.raises(InputError, match=sentence):
        train(told, quiet())
    assert not told.output.exists() or not list(told.output.iterdir())


def test_other_classes_than_the_networks_are_refused(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    net = refold.create_model("repghostnet_050", num_classes=2).eval()
    refold.save(net, tmp_path / "other.safetensors", class_names=["b", "a"])
    with pytest.raises(InputError, match="has other classes than the data, or another order"):
        train(dataclasses.replace(settings(), network=str(tmp_path / "other.safetensors")), quiet())
