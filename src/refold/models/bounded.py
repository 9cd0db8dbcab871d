"""Building what a file describes without taking the file's word for how large it is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from refold.errors import CheckpointError

_FACTORIES = {"empty", "zeros", "ones", "full", "rand", "randn", "empty_strided", "new_empty", "new_zeros"}
# No training form has a hundred times the numbers or the tensors of its plain form.
_RATIO = 100
_SPARE_NUMBERS, _SPARE_TENSORS = 10_000_000, 1_000


@contextmanager
def bounded(numbers: int, tensors: int, described: str) -> Iterator[None]:
    """Let the block make tensors in proportion to a file that holds so many ``numbers`` in so many ``tensors``.

    Raises `CheckpointError`, which begins with what is ``described``, before a tensor out of proportion is made.
    """
    with _Bounds(numbers * _RATIO + _SPARE_NUMBERS, tensors * _RATIO + _SPARE_TENSORS, described):
        yield


class _Bounds(TorchDispatchMode):
    def __init__(self, numbers: int, tensors: int, described: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self._numbers, self._tensors, self._described = numbers, tensors, described

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func._schema.name.removeprefix("aten::") in _FACTORIES:
            size = next((value for value in args if isinstance(value, list | tuple | torch.Size)), ())
            self._numbers -= math.prod(size)
            self._tensors -= 1
            if min(self._numbers, self._tensors) < 0:
                raise CheckpointError(
                    f"{self._described} describes a network that is far larger than its weights; it is damaged or was "
                    "made to do harm: get it again."
                )
        return func(*args, **(kwargs or {}))
