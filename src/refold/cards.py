"""What a checkpoint says about its network, and what of it is believed.

A card decides nothing but shapes: it names no address, file or hub, and no code is imported because of it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from refold.errors import InputError, UnknownModel
from refold.models.images import check_input_size
from refold.models.registry import declared_arguments

Form = Literal["training", "plain"]
FORMS: tuple[Form, ...] = ("training", "plain")

_NAME = r"^([a-z0-9]+/)?[A-Za-z0-9_][A-Za-z0-9_.\-]*$"
_LONGEST_TEXT, _LONGEST_LIST, _MOST_CLASSES, _LARGEST = 200, 10_000, 1_000_000, 10**7
_DEEPEST = 4
# Keywords of timm that its constructors do not declare, and those that nearly all have.
_ALLOWED = {
    "num_classes", "in_chans", "drop_rate", "drop_path_rate", "drop_path", "global_pool", "features_only",
    "out_indices", "feature_cls", "output_stride", "output_fmt", "act_layer", "norm_layer", "aa_layer", "attn_layer",
    "img_size", "scriptable", "exportable", "no_jit", "head_init_scale", "stem_size", "depth", "depths", "width",
    "widths", "dims", "channels", "w0", "wa", "wm", "group_size", "se_ratio", "stem_width", "bottle_ratio", "bn_eps",
    "bn_momentum", "bn_tf", "pad_type",
}  # fmt: skip
# Whatever a network declares, an argument that is named so says where something comes from.
_NEVER = {
    "pretrained", "checkpoint", "cache", "url", "hub", "dir", "path", "file", "download", "source", "repo", "cfg",
}  # fmt: skip


def _has_harmless_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    for name, value in arguments.items():
        if not is_harmless(name):
            raise ValueError(f"the argument '{name[:_LONGEST_TEXT]}' is none that a file may set")
        if not _is_plain(value):
            raise ValueError(f"the value of '{name}' is no number, short text or list of them")
    counts = {name: arguments[name] for name in ("num_classes", "in_chans") if name in arguments}
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(f"{name} is {count!r:.40}, not a number of them")
    return arguments


def is_harmless(name: str) -> bool:
    """Whether an argument of that name may come from a file, if a network takes it at all."""
    return name in _ALLOWED or (name.isidentifier() and not _NEVER & set(name.lower().split("_")))


def _is_plain(value: Any, depth: int = 0) -> bool:
    if isinstance(value, str):
        return len(value) <= _LONGEST_TEXT and not re.search(r"[/\\:]", value)
    if isinstance(value, list | dict):
        inner = list(value.values()) if isinstance(value, dict) else value
        return (
            depth < _DEEPEST and len(inner) <= _LONGEST_LIST and all(_is_plain(v, depth + 1) for v in inner)
        )
    if isinstance(value, int | float):
        return math.isfinite(value) and abs(value) <= _LARGEST
    return value is None


def _is_size(size: list[int]) -> list[int]:
    try:
        check_input_size(size)
    except InputError as error:
        raise ValueError(str(error).partition(";")[0]) from error
    return size


class _Preprocessing(TypedDict, total=False):
    __pydantic_config__ = ConfigDict(extra="allow", strict=True)  # type: ignore[misc]  # how pydantic is told

    input_size: Annotated[list[int], AfterValidator(_is_size)]
    mean: _Channels
    std: _Deviations
    interpolation: Annotated[str, Field(max_length=_LONGEST_TEXT)]
    crop_pct: Annotated[float, Field(gt=0, le=10)]


_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Channels = Annotated[list[_Finite], Field(min_length=1, max_length=4096)]
_Deviations = Annotated[
    list[Annotated[float, Field(allow_inf_nan=False, gt=0)]], Field(min_length=1, max_length=4096)
]
_PREPROCESSING = TypeAdapter(_Preprocessing)


def _is_preprocessing(preprocessing: dict[str, Any] | None) -> dict[str, Any] | None:
    if preprocessing is not None:
        try:
            _PREPROCESSING.validate_python(preprocessing)
        except ValidationError as error:
            raise ValueError(_reason(error)) from error
    return preprocessing


@dataclass(frozen=True)
class Card:
    """What a checkpoint says about its network.

    ``architecture`` is a name for `refold.create_model`, with its ``arguments``, or None for a network that
    was built otherwise; ``model_class`` is its Python class, and ``built_from`` what named that on the command
    line, for messages alone. ``preprocessing`` speaks timm's terms (``input_size`` as channels, height, width;
    ``mean``, ``std``, ``interpolation``). ``fold`` is the report of the fold that made a plain network, ``unfold``
    the record of the branches that `refold.unfold` gave the architecture before that, ``provenance`` whatever the
    writer wanted to keep.
    """

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")  # as a ClassVar it stops older ones

    form: Form
    model_class: str
    architecture: Annotated[str, Field(pattern=_NAME, max_length=_LONGEST_TEXT)] | None = None
    arguments: Annotated[dict[str, Any], AfterValidator(_has_harmless_arguments)] = field(
        default_factory=dict
    )
    class_names: Annotated[list[str], Field(max_length=_MOST_CLASSES)] | None = None
    preprocessing: Annotated[dict[str, Any] | None, AfterValidator(_is_preprocessing)] = None
    fold: dict[str, Any] | None = None
    unfold: dict[str, Any] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    refold_version: str = field(default_factory=lambda: version("refold"))
    built_from: str | None = None

    @property
    def title(self) -> str:
        """The architecture's name, or the class of a network that has none."""
        return self.architecture or self.model_class


_CARD = TypeAdapter(Card)


def card_from(text: str) -> Card:
    """The card that JSON describes; raises ValueError, with the reason, where it is not understood or not believed."""
    try:
        card: Card = _CARD.validate_json(text)
    except ValidationError as error:
        raise ValueError(_reason(error)) from error
    strangers = set(card.arguments) - _ALLOWED
    if card.architecture is not None and strangers:
        try:
            strangers -= declared_arguments(card.architecture)
        except UnknownModel as error:
            raise ValueError(str(error)) from error
        if strangers:
            raise ValueError(f"{card.architecture} has no argument '{min(strangers)}'")
    return card


def is_recordable(architecture: Mapping[str, Any]) -> bool:
    """Whether a card may say that a network has this ``name`` and these ``arguments``."""
    name, arguments = architecture["name"], architecture["arguments"]
    described = {"form": "training", "model_class": "", "architecture": name, "arguments": arguments}
    try:
        card_from(json.dumps(described))
    except (TypeError, ValueError):
        return False
    return True


def _reason(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    place, said = ".".join(str(part) for part in first["loc"]), first["msg"].removeprefix("Value error, ")
    return f"{place[:_LONGEST_TEXT]}: {said}" if place else said
