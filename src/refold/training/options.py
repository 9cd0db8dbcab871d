"""What is said of an option once, beside its name, type and default: the command line and the checks both read it."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any

from refold.errors import InputError


@dataclass(frozen=True)
class Option:
    """Stands in the ``Annotated`` type of a dataclass field and makes the field an option.

    ``least`` and ``most`` bound its value. The rest is how it looks on a command line: ``short`` a letter, ``metavar``
    what stands for the value, ``shown_default`` what is said of the default. ``given_as`` is the type of what is
    given where the field holds another, and ``default`` what an option without a value is, where the field has none.
    ``changeable`` options may be given anew to a run that goes on.
    """

    help: str = ""
    least: float | None = None
    most: float | None = None
    short: str | None = None
    metavar: str | None = None
    shown_default: str | None = None
    given_as: Any = None
    default: Any = None
    changeable: bool = False


@dataclass(frozen=True)
class Declared:
    """An option as a dataclass declares it: its name, type and default, and the `Option`."""

    name: str
    type: Any
    default: Any
    option: Option


def declared_options(declaration: type) -> list[Declared]:
    """The options of a dataclass in their order; fields without an `Option` are none."""
    hints = typing.get_type_hints(declaration, include_extras=True)
    found = []
    for entry in dataclasses.fields(declaration):
        kind, *extras = typing.get_args(hints[entry.name]) or (None,)
        option = next((extra for extra in extras if isinstance(extra, Option)), None)
        if option is None:
            continue
        kind = option.given_as or kind
        default = option.default if entry.default is dataclasses.MISSING else entry.default
        found.append(Declared(entry.name, kind if default is not None else kind | None, default, option))
    return found


def check_bounds(instance: Any) -> None:
    """Raise `InputError` where a number of a dataclass is outside the bounds of its `Option`."""
    for declared in declared_options(type(instance)):
        value, least, most = getattr(instance, declared.name), declared.option.least, declared.option.most
        if value is None or not (
            (least is not None and value < least) or (most is not None and value > most)
        ):
            continue
        bounds = f"at least {least}" if most is None else f"a number from {least} to {most}"
        raise InputError(f"{declared.name} is {value}; give {bounds}.")
