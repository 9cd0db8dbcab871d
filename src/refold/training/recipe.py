"""How to train, as data: the papers' recipes, each value with its source, and the user's own values over them."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from refold.errors import RecipeError
from refold.files import PathLike
from refold.training.options import Option, declared_options

_PACKAGED = files("refold.training") / "recipes"

NotNegative = Annotated[float, Option(least=0)]
Share = Annotated[float, Option(least=0, most=1)]
OptionalShare = Annotated[float | None, Option(least=0, most=1)]


@dataclass(frozen=True)
class Recipe:
    """Everything about a training run that decides what is learnt, apart from network, data and seed.

    ``batch_size`` is the number of images that one optimiser step sees, over all processes and accumulated
    batches. ``learning_rate`` is that of ``learning_rate_batch_size`` images; `scaled_learning_rate` is what a
    run uses. Epochs count from 0; ``milestones`` are the epochs at which a "multistep" schedule multiplies the
    rate by ``decay_rate``. ``dropout`` and ``drop_path`` None leave the network's own value. ``crop_scale`` and
    ``crop_ratio`` are timm's random resized crop; ``crop_padding`` pixels instead pad the resized image and cut
    the input size out of it at random. ``auto_augment`` is a policy in timm's notation, such as "original" or
    "rand-m9-mstd0.5". ``alpha`` and ``temperature`` count only with a teacher (GhostNetV3, eq. 3 and 4), as do
    ``feature_weight`` and ``relation_weight``, those of two losses beside eq. 3 (`distillation.feature_loss` and
    `distillation.relation_loss`).
    """

    epochs: Annotated[int, Option(least=1)]
    batch_size: Annotated[int, Option(least=2)]
    optimizer: str
    learning_rate: NotNegative
    learning_rate_batch_size: Annotated[int, Option(least=1)]
    weight_decay: NotNegative
    learning_rate_scaling: Literal["linear", "square_root", "none"] = "linear"
    momentum: float = 0.9
    decay_norms_and_biases: bool = False
    gradient_clip: float | None = None
    schedule: Literal["cosine", "multistep", "poly", "none"] = "cosine"
    minimum_learning_rate: NotNegative = 0.0
    milestones: tuple[int, ...] = ()
    decay_rate: float = 0.1
    warm_up_epochs: Annotated[int, Option(least=0)] = 0
    warm_up_learning_rate: float = 0.0
    label_smoothing: Share = 0.0
    dropout: OptionalShare = None
    drop_path: OptionalShare = None
    ema_decay: OptionalShare = None
    ema_warm_up: bool = True
    image_size: Annotated[int, Option(least=8)] = 224
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    crop_padding: int | None = None
    horizontal_flip: Share = 0.5
    color_jitter: float = 0.0
    auto_augment: str | None = None
    random_erasing: Share = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    alpha: Share = 0.5
    temperature: Annotated[float, Option(least=1e-6)] = 1.0
    feature_weight: NotNegative = 0.0
    relation_weight: NotNegative = 0.0

    @property
    def scaled_learning_rate(self) -> float:
        """The learning rate of ``batch_size`` images.

        "linear": the rate is proportional to the batch (Goyal et al. 2017), the rule for SGD; "square_root": to
        the root of the batch, the rule for optimisers that divide by the size of the gradient.
        """
        ratio = self.batch_size / self.learning_rate_batch_size
        power: float = {"linear": 1.0, "square_root": 0.5, "none": 0.0}[self.learning_rate_scaling]
        return self.learning_rate * float(ratio**power)


_FIELDS = {entry.name: entry for entry in dataclasses.fields(Recipe)}
_TYPES: dict[str, Any] = typing.get_type_hints(Recipe)
DEFAULT_SOURCE = "default"


@dataclass(frozen=True)
class ResolvedRecipe:
    """A recipe with its name, its title and where each value comes from."""

    name: str
    title: str
    recipe: Recipe
    sources: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Values and sources as plain JSON-able values."""
        described: dict[str, Any] = dataclasses.asdict(self)
        return described

    @classmethod
    def from_dict(cls, described: Mapping[str, Any]) -> ResolvedRecipe:
        """What `to_dict` gave; raises `RecipeError` where a key or a value is not understood."""
        name = described["name"]
        values = {key: _checked(key, value, name) for key, value in described["recipe"].items()}
        return cls(name, described["title"], Recipe(**values), dict(described["sources"]))

    def override(self, overrides: Mapping[str, Any], source: str) -> ResolvedRecipe:
        """The same recipe with other values; raises `RecipeError` where a key or a value is not understood."""
        values = {key: _checked(key, value, self.name) for key, value in overrides.items()}
        recipe = dataclasses.replace(self.recipe, **values)
        _check_together(recipe, self.name)
        return dataclasses.replace(
            self, recipe=recipe, sources={**self.sources, **dict.fromkeys(values, source)}
        )


def list_recipes() -> list[str]:
    """The names of the recipes that come along."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _PACKAGED.iterdir() if ".yaml" in entry.name)


def load_recipe(name: PathLike, overrides: Mapping[str, Any] | None = None) -> ResolvedRecipe:
    """Read a recipe by its name, or from a YAML file of the user's, and put ``overrides`` over its values.

    A value is given plainly (``epochs: 30``) or with its source
    (``epochs: {value: 30, source: "section 4.1"}``); ``extends`` names a recipe to start from.
    Raises `RecipeError` where the recipe, a key or a value is not understood; the message names the nearest
    key.
    """
    resolved = _read(str(name), seen=())
    return resolved.override(overrides, "given") if overrides else resolved


def parse_overrides(settings: list[str]) -> dict[str, Any]:
    """Turn ``key=value`` texts into values, read as YAML; raises `RecipeError` where one has no ``=``."""
    overrides = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise RecipeError(f"'{setting}' is no setting; give key=value, such as epochs=30.")
        try:
            overrides[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise RecipeError(f"The value of '{setting}' is not understood ({_one_line(error)}).") from error
    return overrides


def _read(name: str, seen: tuple[str, ...]) -> ResolvedRecipe:
    document = _parse(name)
    title = str(document.pop("title", Path(name).stem))
    base = document.pop("extends", None)
    values, sources = {}, {}
    for key, given in document.items():
        if isinstance(given, Mapping):
            strangers = sorted(given.keys() - {"value", "source"})
            if strangers or "value" not in given:
                raise RecipeError(
                    f"'{key}' of the recipe '{name}' holds {sorted(given)}; expected 'value' and 'source'."
                )
            source, given = str(given.get("source", name)), given["value"]
        else:
            source = name
        values[key], sources[key] = _checked(key, given, name), source
    if base is not None:
        if base in seen:
            raise RecipeError(f"The recipe '{name}' extends itself through '{base}'; name another.")
        start = _read(str(base), (*seen, name))
        recipe = dataclasses.replace(start.recipe, **values)
        sources = {**start.sources, **sources}
    else:
        missing = [
            key
            for key, entry in _FIELDS.items()
            if entry.default is dataclasses.MISSING and key not in values
        ]
        if missing:
            raise RecipeError(
                f"The recipe '{name}' lacks {', '.join(missing)}; add them, or extend a recipe that comes along "
                f"(extends: {list_recipes()[0]})."
            )
        recipe = Recipe(**values)
    _check_together(recipe, name)
    named = {key: sources.get(key, DEFAULT_SOURCE) for key in _FIELDS}
    return ResolvedRecipe(Path(name).stem, title, recipe, named)


def _parse(name: str) -> dict[str, Any]:
    path = Path(name)
    if path.suffix in {".yaml", ".yml"}:
        if not path.is_file():
            raise RecipeError(f"There is no recipe file '{path}'; check the path.")
        text = path.read_text(encoding="utf-8")
    elif name in list_recipes():
        text = (_PACKAGED / f"{name}.yaml").read_text(encoding="utf-8")
    else:
        raise RecipeError(
            f"There is no recipe '{name}'{_nearest(name, list_recipes())}; choose one of "
            f"{', '.join(list_recipes())}, or give a .yaml file."
        )
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"The recipe '{name}' is no YAML ({_one_line(error)}); correct it.") from error
    if not isinstance(document, dict):
        raise RecipeError(f"The recipe '{name}' holds no keys; write one 'key: value' a line.")
    return document


def _checked(key: str, value: Any, recipe: str) -> Any:
    """The value as its field's type; YAML's lists become tuples, and ``5e-3`` (a text in YAML) a number."""
    if key not in _FIELDS:
        raise RecipeError(
            f"The recipe '{recipe}' has no key '{key}'{_nearest(key, list(_FIELDS))}; "
            "`refold train --dry-run` shows all keys."
        )
    expected = _TYPES[key]
    try:
        return _converted(value, expected)
    except (TypeError, ValueError):
        raise RecipeError(
            f"'{key}' is {value!r} in the recipe '{recipe}'; expected {_described(expected)}."
        ) from None


def _converted(value: Any, expected: Any) -> Any:
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin is types.UnionType:
        return None if value is None else _converted(value, arguments[0])
    if origin is Literal:
        # YAML reads a bare `none` as text, but `null` and `~` as nothing.
        if value not in arguments:
            raise ValueError
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple) or (arguments[-1] is not ... and len(value) != len(arguments)):
            raise ValueError
        return tuple(_converted(entry, arguments[0]) for entry in value)
    if expected is bool or isinstance(value, bool):
        if expected is not bool or not isinstance(value, bool):
            raise ValueError
        return value
    converted = expected(value)
    if expected is int and converted != float(value):
        raise ValueError
    if expected is str and not isinstance(value, str):
        raise ValueError
    return converted


def _described(expected: Any) -> str:
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin is types.UnionType:
        return f"{_described(arguments[0])} or null"
    if origin is Literal:
        return "one of " + ", ".join(arguments)
    if origin is tuple:
        return f"a list such as {[0, 1] if arguments[0] is int else [0.5, 1.0]}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return names[expected]


def _check_together(recipe: Recipe, name: str) -> None:
    for declared in declared_options(Recipe):
        key, least, most = declared.name, declared.option.least, declared.option.most
        value = getattr(recipe, key)
        if value is None or least is None:
            continue
        if most is None and not value >= least:
            raise RecipeError(f"'{key}' is {value} in the recipe '{name}'; give at least {least}.")
        if most is not None and not least <= value <= most:
            raise RecipeError(
                f"'{key}' is {value} in the recipe '{name}'; give a number from {least} to {most}."
            )
    if recipe.schedule == "multistep" and not recipe.milestones:
        raise RecipeError(
            f"The recipe '{name}' has a multistep schedule without milestones; give some epochs."
        )


def _nearest(key: str, known: list[str]) -> str:
    near = get_close_matches(key, known, n=1, cutoff=0.4)
    return f" (did you mean '{near[0]}'?)" if near else ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
