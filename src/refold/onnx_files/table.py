"""The table of ONNX operators while it is filled: what an entry is, and how one is put in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from refold.onnx_files.node import OnnxNode


@dataclass(frozen=True)
class Call:
    """A function and what it is called with, values of the graph (`ir.Value`) in the place of tensors."""

    run: Callable[..., Any]
    operator: str
    """Its name in the registry of operators; empty for what is never more than itself."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


Entry = Callable[[OnnxNode], Call | None]
TABLE: dict[str, Entry] = {}


def entry(*names: str) -> Callable[[Entry], Entry]:
    """Put the function into the table, for operators of these names."""

    def keep(made: Entry) -> Entry:
        TABLE.update(dict.fromkeys(names, made))
        return made

    return keep
