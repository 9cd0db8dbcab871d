"""What may stand beside the weights in a pickled checkpoint: values that hold data and do nothing when made."""

import argparse
import pathlib
import types
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

Global = Callable[..., Any] | tuple[Callable[..., Any], str]


def harmless_globals() -> list[Global]:
    """For `torch.serialization.safe_globals`: command lines, paths and NumPy's numbers, which training scripts store.

    A path becomes one that knows no file system, so that those of another operating system can be read.
    """
    return [
        argparse.Namespace,
        types.SimpleNamespace,
        # Torch fills only plain dictionaries and lists.
        (_dictionary, "collections.defaultdict"),
        (_list, "collections.deque"),
        *(dict, list, tuple, int, float, bool, str, frozenset, slice),
        torch.torch_version.TorchVersion,
        *_paths(),
        *_numpy(),
    ]


def _dictionary(*_: Any) -> dict[Any, Any]:
    return {}


def _list(items: Iterable[Any] = (), *_: Any) -> list[Any]:
    return list(items)


def _paths() -> list[Global]:
    # From Python 3.13 on they name the module inside of pathlib that they come from.
    found: list[Global] = []
    for module in ("pathlib", "pathlib._local"):
        for name in ("PurePath", "Path", "PosixPath", "PurePosixPath"):
            found.append((pathlib.PurePosixPath, f"{module}.{name}"))
        for name in ("WindowsPath", "PureWindowsPath"):
            found.append((pathlib.PureWindowsPath, f"{module}.{name}"))
    return found


def _numpy() -> list[Global]:
    from numpy._core import multiarray

    # NumPy 1 and 2 keep the same functions in modules of other names.
    functions: list[Global] = [
        (getattr(multiarray, name), f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for name in ("scalar", "_reconstruct")
    ]
    numbers = {type(np.dtype(code)) for code in "?bBhHiIlLqQefdFD"}
    kinds: list[Any] = [np.ndarray, np.dtype, np.dtypes.StrDType, np.dtypes.BytesDType, *numbers]
    return [*functions, *kinds]
