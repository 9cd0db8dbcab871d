"""How to train, as data: the papers' recipes, each value with its source, and the user's own values over them."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatch
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter

from refold.errors import RecipeError
from refold.files import PathLike
from refold.training.options import Option, declared_options

_PACKAGED = files("refold.training") / "recipes"

NotNegative = Annotated[float, Option(least=0)]
Share = Annotated[float, Option(least=0, most=1)]
OptionalShare = Annotated[float | None, Option(least=0, most=1)]
Number = Annotated[int, Option(least=1, most=10**9)]
_TINY = 1e-9


@dataclass(frozen=True)
class Recipe:
    """Everything about a training run that decides what is learnt, apart from network, data and seed.

    ``batch_size`` is the number of images that one optimiser step sees, over all processes and accumulated batches.
    ``learning_rate`` is that of ``learning_rate_batch_size`` images; `scaled_learning_rate` is what a run uses. Epochs
    count from 0; ``milestones`` are the epochs at which a "multistep" schedule multiplies the rate by ``decay_rate``;
    "step" does so every ``decay_epochs``. ``dropout`` and ``drop_path`` None leave the network's own value.
    ``crop_scale`` and ``crop_ratio`` are timm's random resized crop; ``crop_padding`` pixels instead pad the resized
    image and cut the input size out of it at random; images with boxes or masks are fitted into the input size, scaled
    by a factor from ``resize_range``, and cut or filled up. ``auto_augment`` is a policy in timm's notation, such as
    "original" or "rand-m9-mstd0.5". ``alpha`` and ``temperature`` count only with a teacher (GhostNetV3, eq. 3 and 4),
    as do ``feature_weight`` and ``relation_weight``, those of two losses beside eq. 3 (`distillation.feature_loss` and
    `distillation.relation_loss`). ``weight_bits`` puts the rounding of an int8 file into the loop, with weights of so
    many bits (None: no rounding); then ``weight_scales``, ``processor`` and ``keep_identity`` are what
    `refold.QuantizationConfig` calls weights, cpu and keep_identity, and ``calibration_images`` of the training images
    give the ranges.
    """

    epochs: Number
    batch_size: Annotated[int, Option(least=2)]
    optimizer: str
    learning_rate: NotNegative
    learning_rate_batch_size: Number
    weight_decay: NotNegative
    learning_rate_scaling: Literal["linear", "square_root", "none"] = "linear"
    momentum: Share = 0.9
    decay_norms_and_biases: bool = False
    gradient_clip: Annotated[float | None, Option(least=_TINY)] = None
    schedule: Literal["cosine", "multistep", "step", "poly", "none"] = "cosine"
    minimum_learning_rate: NotNegative = 0.0
    milestones: Annotated[tuple[int, ...], Option(least=1)] = ()
    decay_epochs: Number = 30
    decay_rate: NotNegative = 0.1
    warm_up_epochs: Annotated[int, Option(least=0)] = 0
    warm_up_learning_rate: NotNegative = 0.0
    label_smoothing: Share = 0.0
    dropout: OptionalShare = None
    drop_path: OptionalShare = None
    ema_decay: Annotated[float | None, Option(least=0, most=0.9999999)] = None
    ema_warm_up: bool = True
    image_size: Annotated[int, Option(least=8, most=4096)] = 224
    crop_scale: Annotated[tuple[float, float], Option(least=_TINY, most=1)] = (0.08, 1.0)
    crop_ratio: Annotated[tuple[float, float], Option(least=0.01, most=100)] = (0.75, 4 / 3)
    crop_padding: Annotated[int | None, Option(least=0, most=4096)] = None
    resize_range: Annotated[tuple[float, float], Option(least=0.1, most=10)] = (1.0, 1.0)
    horizontal_flip: Share = 0.5
    color_jitter: Annotated[float, Option(least=0, most=10)] = 0.0
    auto_augment: str | None = None
    random_erasing: Share = 0.0
    mixup: Annotated[float, Option(least=0, most=100)] = 0.0
    cutmix: Annotated[float, Option(least=0, most=100)] = 0.0
    alpha: Share = 0.5
    temperature: Annotated[float, Option(least=1e-6)] = 1.0
    feature_weight: NotNegative = 0.0
    relation_weight: NotNegative = 0.0
    weight_bits: Annotated[int | None, Option(least=2, most=8)] = None
    weight_scales: Literal["channel", "tensor"] = "channel"
    processor: Literal["any", "avx2", "vnni", "arm"] = "any"
    keep_identity: Literal["never", "always"] = "never"
    calibration_images: Number = 200

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
_OPTIONS = {declared.name: declared.option for declared in declared_options(Recipe)}
_DEFAULT_SOURCE = "default"
# A value of a recipe for one pattern of networks' names.
_Variants = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class ResolvedRecipe:
    """A recipe with its name, its title and where each value comes from.

    ``variants`` holds, by key, values for networks whose names match a pattern.
    """

    name: str
    title: str
    recipe: Recipe
    sources: dict[str, str] = field(default_factory=dict)
    variants: _Variants = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Values and sources as plain JSON-able values."""
        described: dict[str, Any] = dataclasses.asdict(self)
        return described

    def for_network(self, network: str) -> ResolvedRecipe:
        """The recipe with the values that it has for a network of that name, and no others."""
        values = {
            key: value
            for key, patterns in self.variants.items()
            for pattern, value in patterns.items()
            if fnmatch(network, pattern)
        }
        return dataclasses.replace(self, recipe=dataclasses.replace(self.recipe, **values), variants={})

    @classmethod
    def from_dict(cls, described: Mapping[str, Any]) -> ResolvedRecipe:
        """What `to_dict` gave; raises `RecipeError` where a key or a value is not understood."""
        name = str(described["name"])
        values = {key: _checked(key, value, name) for key, value in dict(described["recipe"]).items()}
        _check_complete(values, name)
        variants = described.get("variants") or {}
        return cls(
            name, str(described["title"]), Recipe(**values), dict(described["sources"]), dict(variants)
        )

    def override(self, overrides: Mapping[str, Any], source: str) -> ResolvedRecipe:
        """The same recipe with other values; raises `RecipeError` where a key or a value is not understood."""
        values = {key: _checked(key, value, self.name) for key, value in overrides.items()}
        recipe = dataclasses.replace(self.recipe, **values)
        _check_together(recipe, self.name)
        return dataclasses.replace(
            self,
            recipe=recipe,
            sources={**self.sources, **dict.fromkeys(values, source)},
            variants={key: value for key, value in self.variants.items() if key not in values},
        )


def list_recipes() -> list[str]:
    """The names of the recipes that come along."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _PACKAGED.iterdir() if ".yaml" in entry.name)


def load_recipe(
    name: PathLike, overrides: Mapping[str, Any] | None = None, network: str | None = None
) -> ResolvedRecipe:
    """Read a recipe by its name, or from a YAML file of the user's, and put ``overrides`` over its values.

    A value is given plainly (``epochs: 30``) or with its source (``epochs: {value: 30, source: "section 4.1"}``), and
    may be another for some networks (``networks: {repghostnet_2*: 40}``), which counts for the ``network`` given;
    ``extends`` names a recipe to start from.
    Raises `RecipeError` where the recipe, a key or a value is not understood; the message names the nearest
    key.
    """
    resolved = _read(str(name), seen=())
    if network is not None:
        resolved = resolved.for_network(network)
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
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    variants: _Variants = {}
    for key, given in document.items():
        key = str(key)
        plain, sources[key], others = _parts(key, given, name)
        values[key] = _checked(key, plain, name)
        variants[key] = {pattern: _checked(key, value, name) for pattern, value in others.items()}
    if base is not None:
        if base in seen or str(base) == name:
            raise RecipeError(f"The recipe '{name}' extends itself through '{base}'; name another.")
        start = _read(str(base), (*seen, name))
        recipe = dataclasses.replace(start.recipe, **values)
        sources, variants = {**start.sources, **sources}, {**start.variants, **variants}
    else:
        _check_complete(values, name)
        recipe = Recipe(**values)
    _check_together(recipe, name)
    named = {key: sources.get(key, _DEFAULT_SOURCE) for key in _FIELDS}
    told = {key: patterns for key, patterns in variants.items() if patterns}
    return ResolvedRecipe(Path(name).stem, title, recipe, named, told)


def _parts(key: str, given: Any, name: str) -> tuple[Any, str, dict[str, Any]]:
    """The value of a key in a recipe's file, its source, and its values for some networks."""
    if not isinstance(given, Mapping):
        return given, name, {}
    networks = given.get("networks", {})
    if (
        given.keys() - {"value", "source", "networks"}
        or "value" not in given
        or not isinstance(networks, Mapping)
    ):
        raise RecipeError(
            f"'{key}' of the recipe '{name}' holds {sorted(map(str, given))}; expected 'value' and 'source', and "
            "'networks' with a value for each pattern of their names."
        )
    return given["value"], str(given.get("source", name)), {str(k): value for k, value in networks.items()}


def _check_complete(values: Mapping[str, Any], name: str) -> None:
    required = [key for key, entry in _FIELDS.items() if entry.default is dataclasses.MISSING]
    missing = [key for key in required if key not in values]
    if missing:
        raise RecipeError(
            f"The recipe '{name}' lacks {', '.join(missing)}; add them, or extend a recipe that comes along "
            f"(extends: {list_recipes()[0]})."
        )


def _parse(name: str) -> dict[str, Any]:
    path = Path(name)
    if path.suffix in {".yaml", ".yml"}:
        if not path.is_file():
            raise RecipeError(f"There is no recipe file '{path}'; check the path.")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(
                f"The recipe file '{path}' cannot be read ({error}); save it as UTF-8."
            ) from error
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
        # Read as numbers true and false would be one and zero, and one would be true.
        if _holds_truth(value) != (expected is bool):
            raise ValueError
        return _ADAPTERS[key].validate_python(value)
    except (ValueError, RecursionError):
        shown = repr(value)
        raise RecipeError(
            f"'{key}' is {shown if len(shown) < 80 else shown[:77] + '...'} in the recipe '{recipe}'; expected "
            f"{_described(expected)}{_bounds(_OPTIONS.get(key, Option()))}."
        ) from None


def _adapter(expected: Any, option: Option) -> TypeAdapter[Any]:
    bounds: Any = Field(ge=option.least, le=option.most)
    if typing.get_origin(expected) is tuple:
        entry, *others = typing.get_args(expected)
        bounded: Any = Annotated[entry, bounds]
        expected = tuple[bounded, ...] if others == [...] else tuple[bounded, bounded]
    elif option.least is not None:
        expected = Annotated[expected, bounds]
    return TypeAdapter(expected, config=ConfigDict(allow_inf_nan=False))


_ADAPTERS = {key: _adapter(expected, _OPTIONS.get(key, Option())) for key, expected in _TYPES.items()}


def _holds_truth(value: Any) -> bool:
    return any(isinstance(entry, bool) for entry in (value if isinstance(value, list | tuple) else (value,)))


def _described(expected: Any) -> str:
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin is types.UnionType:
        return f"null or {_described(arguments[0])}"
    if origin is Literal:
        return "one of " + ", ".join(arguments)
    if origin is tuple:
        return f"a list such as {[1, 2] if arguments[0] is int else [0.5, 1.0]}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return names[expected]


def _bounds(option: Option) -> str:
    if option.least is None:
        return ""
    least = "above 0" if option.least == _TINY else f"from {option.least:,}"
    return f" {least}{'' if option.most is None else f' to {option.most:,}'}"


def _check_together(recipe: Recipe, name: str) -> None:
    """Raise `RecipeError` where values that are right alone are not together."""
    for key in ("crop_scale", "crop_ratio", "resize_range"):
        least, most = getattr(recipe, key)
        if least > most:
            raise RecipeError(
                f"'{key}' is [{least:g}, {most:g}] in the recipe '{name}'; give the lower one first."
            )
    if list(recipe.milestones) != sorted(set(recipe.milestones)):
        raise RecipeError(
            f"'milestones' are {list(recipe.milestones)} in the recipe '{name}'; give them in order, each once."
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
