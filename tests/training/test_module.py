"""Schedules and averages against closed forms."""

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from timm.utils import ModelEmaV3
from torch import nn

from refold.errors import RecipeError
from refold.training import run as running
from refold.training.images import Images, LabelledImages
from refold.training.module import TrainingModule, _warm_up_power, make_optimizer
from refold.training.recipe import load_recipe
from refold.training.run import Settings, train
from refold.training.tasks import task_for

PREPROCESSING = {
    "input_size": [3, 8, 8], "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0,
}  # fmt: skip


@pytest.fixture
def module() -> Callable[..., TrainingModule]:
    def make(name: str, images: int = 40, **overrides: Any) -> TrainingModule:
        sources = [Image.new("RGB", (8, 8))] * images
        part = Images(sources, [0, 1] * (images // 2))
        labelled = LabelledImages("grey", ["a", "b"], part, part, mirror=True)
        net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.LazyLinear(2))
        net(torch.zeros(2, 3, 8, 8))
        recipe = load_recipe(name, {"image_size": 8, **overrides}).recipe
        return TrainingModule(net, recipe, labelled, PREPROCESSING, task_for(labelled, recipe), seed=0)

    return make


def rates(module: TrainingModule) -> list[float]:
    """The learning rate of every step of a run."""
    configured = module.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    steps = module.steps * module.recipe.epochs
    seen = []
    for step in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        scheduler.step_update(step + 1)
    return seen


def test_the_cosine_falls_from_the_papers_rate_to_zero(module: Callable[..., TrainingModule]) -> None:
    seen = rates(module("ghostnetv3", epochs=5, batch_size=8, learning_rate_scaling="none"))
    assert len(seen) == 25
    expected = [0.005 * (1 + math.cos(math.pi * step / 25)) / 2 for step in range(25)]
    assert seen == pytest.approx(expected, rel=1e-12)


def test_the_warm_up_is_linear_and_part_of_the_schedule(module: Callable[..., TrainingModule]) -> None:
    recipe = {
        "epochs": 10,
        "warm_up_epochs": 5,
        "batch_size": 8,
        "warm_up_learning_rate": 1e-6,
        "minimum_learning_rate": 0,
    }
    seen = rates(module("repghost", **recipe))
    rate = 0.6 * 8 / 1024
    assert seen[:25] == pytest.approx([1e-6 + step * (rate - 1e-6) / 25 for step in range(25)], rel=1e-9)
    cosine = [rate * (1 + math.cos(math.pi * step / 50)) / 2 for step in range(25, 50)]
    assert seen[25:] == pytest.approx(cosine, rel=1e-12)


def test_steps_and_lines(module: Callable[..., TrainingModule]) -> None:
    seen = rates(module("cifar", epochs=4, batch_size=8, milestones=[1, 3], learning_rate_scaling="none"))
    # timm's milestones count the step to come: they lie one step before the epoch.
    assert seen == pytest.approx([0.1] * 4 + [0.01] * 10 + [0.001] * 6, rel=1e-12)
    seen = rates(module("ghostnet", epochs=4, batch_size=8, learning_rate_scaling="none"))
    assert seen == pytest.approx([0.4 * (1 - step / 20) for step in range(20)], rel=1e-12)
    seen = rates(module("ghostnet", epochs=2, batch_size=8, schedule="none", learning_rate_scaling="none"))
    assert seen == [0.4] * 10


def test_a_set_smaller_than_a_batch_is_one_batch(module: Callable[..., TrainingModule]) -> None:
    small = module("repghost", images=40, epochs=2, warm_up_epochs=0)
    assert (small.steps, small.batch_images) == (1, 40)
    assert rates(small)[0] == pytest.approx(0.6 * 40 / 1024, rel=1e-12)


def test_optimisers_are_the_recipes(module: Callable[..., TrainingModule]) -> None:
    spared = module("repvgg")
    groups = make_optimizer(spared.net, spared.recipe).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert [decay[id(p)] for p in spared.net.parameters()] == [1e-4, 0, 0, 0, 1e-4, 0]
    assert {group["momentum"] for group in groups} == {0.9}
    everything = module("cifar")
    groups = make_optimizer(everything.net, everything.recipe).param_groups
    assert [group["weight_decay"] for group in groups] == [1e-4]
    assert not groups[0]["nesterov"]
    lamb = module("ghostnetv3", momentum=0.8)
    assert {g["betas"] for g in make_optimizer(lamb.net, lamb.recipe).param_groups} == {(0.8, 0.999)}
    with pytest.raises(RecipeError, match="'optimizer' is 'adamm'"):
        module("repvgg", optimizer="adamm").configure_optimizers()


def test_the_average_is_that_of_equation_5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GhostNetV3, eq. 5, over weights and batch norm statistics of every step; its start is the first step's."""
    monkeypatch.setattr(running, "finish", lambda *_: None)
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(10):
            pixels = generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{index}.png")
    expected: dict[str, torch.Tensor] = {}
    end = TrainingModule.on_train_batch_end

    def follow(module: TrainingModule, *arguments: Any) -> None:
        for key, value in module.net.state_dict().items():
            if not expected or key not in expected:
                expected[key] = value.double().clone()
            else:
                expected[key] = 0.8 * expected[key] + 0.2 * value.double()
        end(module, *arguments)

    monkeypatch.setattr(TrainingModule, "on_train_batch_end", follow)
    recipe = {"epochs": 2, "batch_size": 4, "image_size": 32, "ema_decay": 0.8, "ema_warm_up": False}
    settings = Settings(
        tmp_path / "run", str(tmp_path / "data"), "repghostnet_050", load_recipe("small_images", recipe)
    )
    train(settings, Console(file=io.StringIO()))
    state = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["state_dict"]
    prefix = "average.module."
    averaged = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    assert averaged.keys() == expected.keys()
    assert any("running_var" in key for key in averaged)
    for key, value in averaged.items():
        if value.is_floating_point():
            assert torch.allclose(value.double(), expected[key], rtol=1e-4, atol=1e-6)
            assert not torch.equal(value, state[f"net.{key}"]) or not value.any()


def test_a_step_schedule_divides_the_rate_every_so_many_epochs(module: Callable[..., TrainingModule]) -> None:
    trained = module("resnet", images=32, epochs=7, batch_size=8, decay_epochs=3)
    seen = rates(trained)
    base = trained.recipe.scaled_learning_rate
    assert seen[:: trained.steps] == pytest.approx([base] * 3 + [base / 10] * 3 + [base / 100])


@pytest.mark.parametrize("steps", [100, 10_000, 375_000])
def test_an_average_warms_up_as_far_as_the_run_allows(steps: int) -> None:
    def reached(decay: float, step: int) -> float:
        average = ModelEmaV3(
            nn.Linear(1, 1), decay, use_warmup=True, warmup_power=_warm_up_power(decay, steps)
        )
        return float(average.get_decay(step))

    decays = [0.99, 0.9999, 0.99995, 0.99999]
    for decay in decays:
        fits = 1 / (1 - decay) <= 1 + steps / 2
        assert (reached(decay, steps // 2 + 2) == pytest.approx(decay, rel=1e-6)) == fits
        assert reached(decay, 1) < 0.6
    if steps == 375_000:  # that of GhostNetV3, figure 4, which compares such decays
        assert len({reached(decay, steps) for decay in decays}) == len(decays)
