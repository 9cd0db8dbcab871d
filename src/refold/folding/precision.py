"""Run any code in float64 without a second copy of its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map


@contextmanager
def in_float64() -> Iterator[None]:
    """Compute every torch function in float64, lower floating-point arguments being widened as they are used."""
    with _Float64():
        yield


def to_float64(values: Any) -> Any:
    """The same structure with every floating-point tensor in float64."""
    return tree_map(_widen, values)


def _widen(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
        return value.double()
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float64
    return value


class _Float64(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "__get__":
            return _widen_type(func(*args, **kwargs))
        return func(*tree_map(_widen, args), **tree_map(_widen, kwargs))


def _widen_type(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value
