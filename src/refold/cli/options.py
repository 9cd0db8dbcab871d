"""Options of a command line from the dataclass that declares them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import wraps
from typing import Annotated, Any

import typer

from refold.training.options import Declared, declared_options

Command = Callable[..., None]


@dataclass(frozen=True)
class Given:
    """The values of options by name, and the names of those that were stated, not left at their defaults."""

    values: dict[str, Any]
    stated: frozenset[str]


def takes_options_of(
    declaration: type, *, without: Collection[str] = (), required: Collection[str] = ()
) -> Callable[[Command], Command]:
    """Let a command take the options that a dataclass declares, before its own options.

    It gets them as its first argument, `Given`. Options ``without`` are left out, ``required`` ones must be
    given.
    """
    declared = [option for option in declared_options(declaration) if option.name not in without]

    def with_options(command: Command) -> Command:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]

        @wraps(command)
        def parsed(context: typer.Context, **values: Any) -> None:
            given = {option.name: values.pop(option.name) for option in declared}
            sources = {name: context.get_parameter_source(name) for name in given}
            stated = {name for name, source in sources.items() if source and source.name != "DEFAULT"}
            command(Given(given, frozenset(stated)), **values)

        parameters = [
            inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
            *(_parameter(option, option.name in required) for option in declared),
            *(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own),
        ]
        parsed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what Typer reads
        parsed.__annotations__ = {p.name: p.annotation for p in parameters}
        return parsed

    return with_options


def _parameter(declared: Declared, is_required: bool) -> inspect.Parameter:
    said = declared.option
    name = f"--{declared.name.replace('_', '-')}"
    # A switch that is on by default needs the form that turns it off, which Typer adds where no name is given.
    names = [] if declared.default is True else [name, *([said.short] if said.short else [])]
    option = typer.Option(
        *names,
        help=said.help,
        min=said.least,
        max=said.most,
        metavar=said.metavar,
        show_default=said.shown_default or True,
    )
    return inspect.Parameter(
        declared.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if is_required else declared.default,
        annotation=Annotated[declared.type, option],
    )
