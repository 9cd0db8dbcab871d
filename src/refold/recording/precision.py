"""Run any code in float64 without a second copy of its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from refold.system import c_library

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
    return _mapped(values, _widen)


def has_float64(device: torch.device) -> bool:
    """Whether the device computes in float64; Apple's does not."""
    return device.type != "mps"


def release_memory() -> None:
    """Give the memory of freed tensors back to the system, which glibc's allocator keeps otherwise."""
    trim = getattr(c_library(), "malloc_trim", None)
    if trim is not None:
        trim(0)


_CASTS = {"half", "bfloat16", "float"}


def _mapped(value: Any, of: Callable[[Any], Any]) -> Any:
    """A structure of arguments with `of` applied to its leaves; faster than torch's pytrees, which this runs in."""
    if isinstance(value, tuple):
        items = [_mapped(item, of) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, list):
        return [_mapped(item, of) for item in value]
    if type(value) is dict:
        return {key: _mapped(item, of) for key, item in value.items()}
    return of(value)


def _widen(value: Any) -> Any:
    if isinstance(value, Tensor):
        narrow = value.is_floating_point() and value.dtype != torch.float64
        return value.double() if narrow else value
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
            found = func(*args, **kwargs)
            return _widen(found) if isinstance(found, torch.dtype) else found
        if _writes(name, kwargs):  # widening would write to a copy
            return func(*args, **kwargs)
        if name in _CASTS and len(args) == 1:  # rounding inside the network is left out
            return args[0].double()
        return _mapped(func(*_mapped(args, self._argument), **_mapped(kwargs, self._argument)), _widen)

    def _argument(self, value: Any) -> Any:
        if self._exact and id(value) in self._exact:
            return self._exact[id(value)]()
        return _widen(value)


def _writes(name: str, kwargs: dict[str, Any]) -> bool:
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name == "__setitem__" or kwargs.get("out") is not None or kwargs.get("inplace") is True
