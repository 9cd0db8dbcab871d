"""Run any code in float64 without a second copy of its weights."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

Exact = Mapping[int, Callable[[], Tensor]]
"""What to compute in the place of rounded tensors, by their ids."""


@contextmanager
def in_float64(exact: Exact | None = None) -> Iterator[None]:
    """Compute every torch function in float64, lower floating-point arguments being widened as they are used.

    A tensor in `exact` is not widened but computed.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Float64(exact or {}):
            yield
    finally:
        torch.set_default_dtype(default)


def to_float64(values: Any) -> Any:
    """The same structure with every floating-point tensor in float64."""
    return tree_map(_widen, values)


def release_memory() -> None:
    """Give the memory of freed tensors back to the system, which glibc's allocator keeps otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _widen(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
        return value.double()
    return _widen_type(value)


def _widen_type(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value


class _Float64(TorchFunctionMode):
    def __init__(self, exact: Exact) -> None:
        super().__init__()
        self._exact = exact

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return _widen_type(func(*args, **kwargs))
        if _writes(name, kwargs):  # widening would write to a copy
            return func(*args, **kwargs)
        return tree_map(_widen, func(*tree_map(self._argument, args), **tree_map(self._argument, kwargs)))

    def _argument(self, value: Any) -> Any:
        return self._exact[id(value)]() if id(value) in self._exact else _widen(value)


def _writes(name: str, kwargs: dict[str, Any]) -> bool:
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name == "__setitem__" or kwargs.get("out") is not None or kwargs.get("inplace") is True
