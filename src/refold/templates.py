"""Pages that are filled in from the templates of a package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template


def template(package: str, name: str, filters: Mapping[str, Callable[..., Any]] | None = None) -> Template:
    """A template in the folder ``templates`` of a package; what is put into one of HTML is escaped.

    Rendering raises `jinja2.UndefinedError` for a value that the template names and that is not given.
    """
    environment = Environment(
        loader=PackageLoader(package),
        autoescape=".html." in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(filters or {})
    return environment.get_template(name)
