"""Recipes say what the papers say, and refuse what they do not understand."""

import dataclasses
import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

import refold
from refold.errors import InputError, RecipeError
from refold.training.recipe import Recipe, ResolvedRecipe, list_recipes, load_recipe, parse_overrides

# What the papers print, typed in here from their text.
PAPERS: dict[str, dict[str, Any]] = {
    "ghostnetv3": {
        "optimizer": "lamb", "learning_rate": 5e-3, "batch_size": 2048, "epochs": 600, "schedule": "cosine",
        "minimum_learning_rate": 0.0, "weight_decay": 0.05, "momentum": 0.9, "ema_decay": 0.9999, "mixup": 0.0,
        "cutmix": 0.0, "alpha": 0.5, "temperature": 1.0, "dropout": 0.0,
    },
    "repghost": {
        "optimizer": "sgd", "momentum": 0.9, "learning_rate": 0.6, "batch_size": 1024, "epochs": 300,
        "warm_up_epochs": 5, "weight_decay": 1e-5, "dropout": 0.2, "ema_decay": 0.9999, "random_erasing": 0.2,
        "label_smoothing": 0.1, "minimum_learning_rate": 1e-5, "warm_up_learning_rate": 1e-4, "auto_augment": None,
    },
    "repnext": {
        "optimizer": "adamw", "learning_rate": 1e-3, "batch_size": 1024, "epochs": 450, "warm_up_epochs": 20,
        "schedule": "cosine", "drop_path": 0.1, "weight_decay": 0.05, "label_smoothing": 0.1,
    },
    "repnext_imagewoof": {
        "epochs": 300, "batch_size": 512, "learning_rate": 5e-4, "image_size": 224, "optimizer": "adamw",
        "warm_up_epochs": 20,
    },
    "repnext_cifar100": {
        "epochs": 600, "batch_size": 512, "learning_rate": 5e-4, "image_size": 64, "optimizer": "adamw",
        "warm_up_epochs": 20,
    },
    "resnet": {
        "epochs": 100, "batch_size": 256, "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 1e-4,
        "schedule": "step", "decay_epochs": 30, "decay_rate": 0.1, "optimizer": "momentum",
    },
    "regnet": {
        "epochs": 100, "batch_size": 1024, "learning_rate": 0.8, "momentum": 0.9, "weight_decay": 5e-5,
        "schedule": "cosine", "warm_up_epochs": 5,
    },
    "repvgg": {
        "optimizer": "momentum", "learning_rate": 0.1, "batch_size": 256, "epochs": 120, "weight_decay": 1e-4,
        "decay_norms_and_biases": False,
    },
    "repvgg_200": {
        "optimizer": "momentum", "learning_rate": 0.1, "batch_size": 256, "epochs": 200, "weight_decay": 1e-4,
        "auto_augment": "original", "label_smoothing": 0.1, "mixup": 0.2, "warm_up_epochs": 5,
    },
    "ghostnet": {"learning_rate": 0.4, "batch_size": 1024, "weight_decay": 4e-5, "schedule": "poly"},
    "cifar": {
        "learning_rate": 0.1, "batch_size": 128, "epochs": 164, "milestones": (82, 123), "decay_rate": 0.1,
        "weight_decay": 1e-4, "image_size": 32, "crop_padding": 4,
    },
    "retinanet": {
        "epochs": 12, "batch_size": 16, "learning_rate": 0.01, "momentum": 0.9, "weight_decay": 1e-4,
        "schedule": "multistep", "milestones": (8, 11), "decay_rate": 0.1, "image_size": 800,
    },
    "maskrcnn": {
        "epochs": 12, "batch_size": 16, "optimizer": "sgd", "learning_rate": 0.02, "momentum": 0.9,
        "weight_decay": 1e-4, "schedule": "multistep", "milestones": (8, 11), "decay_rate": 0.1, "image_size": 800,
    },
    "yolov3": {"epochs": 12, "batch_size": 192, "learning_rate": 0.003, "weight_decay": 5e-4, "image_size": 416},
    "dense": {"optimizer": "adamw", "learning_rate": 0.001, "weight_decay": 0.05, "resize_range": (0.5, 1.5)},
    "segmentation": {"optimizer": "sgd", "schedule": "poly", "decay_rate": 0.9, "image_size": 512},
    "small_images": {"optimizer": "adamw", "batch_size": 64, "image_size": 48},
    "photos": {"optimizer": "adamw", "batch_size": 64, "image_size": 224, "epochs": 100},
    "finetune": {"optimizer": "adamw", "batch_size": 64, "image_size": 224, "learning_rate": 1.5e-3},
    "quantized": {"optimizer": "adamw", "weight_bits": 8, "alpha": 1.0, "weight_decay": 0.0, "learning_rate": 3e-3},
}  # fmt: skip


def test_recipes_resolve_to_the_papers_numbers() -> None:
    assert list_recipes() == sorted(PAPERS)
    for name, expected in PAPERS.items():
        resolved = load_recipe(name)
        values = dataclasses.asdict(resolved.recipe)
        assert {key: values[key] for key in expected} == expected
        assert set(resolved.sources) == set(values)
        assert all(resolved.sources.values())
        # At its own batch size a recipe runs with the rate that it names.
        assert resolved.recipe.scaled_learning_rate == resolved.recipe.learning_rate
        assert ResolvedRecipe.from_dict(json.loads(json.dumps(resolved.to_dict()))) == resolved
    assert load_recipe("ghostnetv3").recipe.auto_augment.startswith("rand-")  # type: ignore[union-attr]
    assert load_recipe("ghostnetv3").recipe.random_erasing > 0


@pytest.mark.parametrize(
    ("name", "batch_size", "expected"),
    [("repghost", 256, 0.15), ("ghostnetv3", 512, 0.0025), ("repnext", 512, 5e-4), ("cifar", 256, 0.2)],
)
def test_the_learning_rate_follows_the_batch(name: str, batch_size: int, expected: float) -> None:
    resolved = load_recipe(name, {"batch_size": batch_size})
    assert resolved.recipe.scaled_learning_rate == pytest.approx(expected, rel=1e-12)
    assert resolved.sources["batch_size"] == "given"
    fixed = load_recipe(name, {"batch_size": batch_size, "learning_rate_scaling": "none"})
    assert fixed.recipe.scaled_learning_rate == load_recipe(name).recipe.learning_rate


def test_every_value_can_be_given_in_another_type_of_yaml() -> None:
    texts = [
        "epochs=30", "learning_rate=5e-3", "crop_scale=[0.5, 1]", "ema_decay=null", "milestones=[1, 2]",
        "decay_norms_and_biases=true", "schedule=multistep", "auto_augment=rand-m9-mstd0.5",
    ]  # fmt: skip
    recipe = load_recipe("cifar", parse_overrides(texts)).recipe
    assert (recipe.epochs, recipe.learning_rate, recipe.crop_scale) == (30, 0.005, (0.5, 1.0))
    assert (recipe.ema_decay, recipe.milestones, recipe.decay_norms_and_biases) == (None, (1, 2), True)
    for entry in dataclasses.fields(Recipe):
        same = {entry.name: getattr(recipe, entry.name)}
        assert load_recipe("cifar", same).recipe == dataclasses.replace(load_recipe("cifar").recipe, **same)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"epoch": 3}, r"no key 'epoch' \(did you mean 'epochs'\?\)"),
        ({"learning-rate": 3}, "did you mean 'learning_rate'"),
        ({"epochs": 2.5}, "'epochs' is 2.5 .* expected a whole number"),
        ({"epochs": 0}, "'epochs' is 0 .* a whole number from 1"),
        ({"epochs": float("inf")}, "'epochs' is inf .* a whole number from 1"),
        ({"epochs": [1]}, "expected a whole number"),
        ({"epochs": {"a": 1}}, "expected a whole number"),
        ({"epochs": 10**400}, "expected a whole number"),
        ({"epochs": True}, "expected a whole number"),
        ({"epochs": None}, "expected a whole number"),
        ({"learning_rate": "fast"}, "'learning_rate' is 'fast' .* expected a number"),
        ({"learning_rate": float("nan")}, "'learning_rate' is nan .* expected a number from 0"),
        ({"learning_rate": float("inf")}, "'learning_rate' is inf .* expected a number from 0"),
        ({"learning_rate": -1}, "'learning_rate' is -1 .* expected a number from 0"),
        ({"momentum": -0.9}, "'momentum' is -0.9 .* from 0 to 1"),
        ({"gradient_clip": 0}, "'gradient_clip' is 0 .* expected null or a number above 0"),
        ({"crop_scale": [0, 1]}, "'crop_scale' is .0, 1. .* above 0 to 1"),
        ({"crop_scale": [1, 0.5]}, "'crop_scale' is .1, 0.5. .* give the lower one first"),
        ({"crop_ratio": [-1, 1]}, "'crop_ratio' is"),
        ({"milestones": [3, 2]}, "'milestones' are .3, 2. .* in order"),
        ({"milestones": [True]}, "'milestones' is"),
        ({"image_size": 4}, "'image_size' is 4 .* from 8 to 4,096"),
        ({"image_size": 10**6}, "'image_size' is 1000000 .* from 8 to 4,096"),
        ({"mixup": -1}, "'mixup' is -1"),
        ({"mixup": 1e9}, "'mixup' is 1000000000.0 .* from 0 to 100"),
        ({"schedule": "cosin"}, "expected one of cosine, multistep, step, poly, none"),
        ({"crop_scale": [1]}, "expected a list such as"),
        ({"crop_scale": 0.5}, "expected a list such as"),
        ({"ema_decay": 1.5}, "'ema_decay' is 1.5 .* from 0 to 0.9999999"),
        ({"decay_norms_and_biases": "yes"}, "expected true or false"),
        ({"decay_norms_and_biases": 1}, "expected true or false"),
        ({"optimizer": 3}, "expected a text"),
        ({"schedule": "multistep"}, "multistep schedule without milestones"),
    ],
)
def test_what_is_not_understood_is_said(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe("repghost", overrides)
    assert isinstance(caught.value, InputError)
    assert "\n" not in str(caught.value)


def test_a_recipe_of_the_users_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        'extends: repghost\ntitle: Mine\nepochs: {value: 7, source: "a guess"}\nbatch_size: 128\n'
    )
    resolved = load_recipe(path)
    assert (resolved.name, resolved.title, resolved.recipe.epochs) == ("mine", "Mine", 7)
    assert resolved.recipe == dataclasses.replace(load_recipe("repghost").recipe, epochs=7, batch_size=128)
    assert (resolved.sources["epochs"], resolved.sources["momentum"]) == ("a guess", "section 4.1")
    for text, message in (
        ("epochs: 3\n", "lacks batch_size, optimizer, learning_rate"),
        ("epochs: {valu: 3}\n", r"holds \['valu'\]; expected 'value' and 'source'"),
        ("epochs: [3\n", "is no YAML"),
        ("3\n", "holds no keys"),
        (f"extends: {path}\n", "extends itself"),
        ("extends: repghost\nepochs: {value: 3, networks: 4}\n", "'networks' with a value for each pattern"),
        ("extends: repghost\nepochs: {value: 3, networks: {repvgg*: 0}}\n", "'epochs' is 0"),
        ("extends: repghost\n1: 3\n", "no key '1'"),
        ("extends: repghots\n", r"no recipe 'repghots' \(did you mean 'repghost'\?\)"),
    ):
        path.write_text(text)
        with pytest.raises(RecipeError, match=message):
            load_recipe(path)
    path.write_bytes(b"epochs: \xff\xfe\n")
    with pytest.raises(RecipeError, match=r"mine.yaml' cannot be read .*; save it as UTF-8"):
        load_recipe(path)
    with pytest.raises(RecipeError, match="no recipe file"):
        load_recipe(tmp_path / "missing.yaml")
    with pytest.raises(RecipeError, match="give key=value"):
        parse_overrides(["epochs"])
    with pytest.raises(RecipeError, match="is not understood"):
        parse_overrides(["epochs=[3"])


@pytest.mark.parametrize(
    ("recipe", "network", "key", "expected"),
    [
        ("repghost", "repghostnet_100", "auto_augment", None),
        ("repghost", "repghostnet_111", "auto_augment", None),
        ("repghost", "repghostnet_130", "auto_augment", "rand-m9-mstd0.5"),
        ("repghost", "repghostnet_200", "auto_augment", "rand-m9-mstd0.5"),
        ("repghost", "repghostnet_dfc_160", "auto_augment", "rand-m9-mstd0.5"),
        ("repnext", "repnext_u3_t", "drop_path", 0.1),
        ("repnext", "repnext_u1_s", "drop_path", 0.2),
        ("repnext", "repnext_u2_b", "drop_path", 0.3),
        ("repnext_cifar100", "repnext_u2_b", "drop_path", 0.3),
    ],
)
def test_a_value_may_depend_on_the_network(recipe: str, network: str, key: str, expected: Any) -> None:
    resolved = load_recipe(recipe, network=network)
    assert getattr(resolved.recipe, key) == expected
    assert resolved.variants == {}
    given = load_recipe(recipe, {key: getattr(load_recipe(recipe).recipe, key)}, network)
    assert getattr(given.recipe, key) == getattr(load_recipe(recipe).recipe, key)


def test_the_values_for_networks_belong_to_networks_that_exist() -> None:
    names = refold.list_models()
    for recipe in list_recipes():
        for patterns in load_recipe(recipe).variants.values():
            for pattern in patterns:
                assert any(fnmatch(name, pattern) for name in names), (recipe, pattern)
