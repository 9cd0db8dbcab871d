"""A class or a function of the user's own, of networks or data: `file.py:Name` or `package.module:name`."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from refold.errors import InputError, first_line

_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
# timm's own prefixes for places of networks.
_PLACES = ("hf_hub", "hf-hub", "local-dir")

# The files that were imported, with their time and size, so that one is not imported twice under one name.
_imported: dict[Path, tuple[tuple[int, int], ModuleType]] = {}


class OwnCode:
    """A class or function of the user's own, and `takes` what it takes.

    ``target`` is the text that named it. Raises `InputError` where it cannot be imported or found, is not to be called,
    or fails.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        place, _, name = target.rpartition(":")
        self._folder = Path(place).resolve().parent if place.endswith(".py") else Path.cwd()
        with _importable(self._folder):
            self._function = _found(_module(place), name, target)
        with suppress(TypeError, ValueError):  # some of C code have none
            self.__signature__ = inspect.signature(self._function)

    def made(self, **arguments: Any) -> Any:
        """What it gives for the arguments."""
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items()) or "no arguments"
        try:
            with _importable(self._folder):
                return self._function(**arguments)
        except Exception as error:  # other people's code
            raise InputError(
                f"'{self.target}' cannot be built with {given} ({_said(error)}); give it what it needs, or mend it."
            ) from error


class OwnNetwork(OwnCode):
    """What builds a network of the user's own; raises `InputError` where it builds none, too."""

    def __call__(self, **arguments: Any) -> nn.Module:
        built = self.made(**arguments)
        if not isinstance(built, nn.Module):
            raise InputError(
                f"'{self.target}' gives a {type(built).__name__}, not a torch.nn.Module; name what builds the network."
            )
        # For messages, and so that a checkpoint knows the arguments.
        built.built_from = {"name": self.target, "arguments": arguments}  # type: ignore[assignment]  # nn.Module types its attributes as tensors and modules
        return built


def takes(builder: Callable[..., Any], argument: str) -> bool:
    """Whether a class or function takes a keyword of that name; False for one that does not tell."""
    try:
        parameters = inspect.signature(builder).parameters.values()
    except (TypeError, ValueError):  # some of C code
        return False
    return any(each.name == argument or each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters)


def is_own_code(target: str) -> bool:
    """Whether a text names code, and not a model, a file or a place of timm's."""
    place, _, name = target.rpartition(":")
    if target.endswith(".py") or place.endswith(".py"):
        return True
    is_named = all(part.isidentifier() for part in name.split("."))
    return is_named and place not in _PLACES and _MODULE.fullmatch(place) is not None


def _module(place: str) -> ModuleType:
    if not place:
        raise InputError("A Python file names no network by itself; give the class in it, too: net.py:Net.")
    try:
        return _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except InputError:
        raise
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise InputError(f"'{place}' cannot be imported ({_said(error)}); install or add it.") from error
        raise InputError(
            f"There is no module '{place}' here (no '{error.name}'); check the name, or give the file: net.py:Net."
        ) from error
    except (Exception, SystemExit) as error:  # other people's code
        raise InputError(f"'{place}' cannot be imported ({_said(error)}); mend it.") from error


def _from_file(path: Path) -> ModuleType:
    path = path.resolve()
    if not path.is_file():
        raise InputError(f"There is no Python file '{path}'; check the path.")
    state = path.stat().st_mtime_ns, path.stat().st_size
    if path in _imported and _imported[path][0] == state:
        return _imported[path][1]
    spec = importlib.util.spec_from_file_location(_module_name(path), path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    _imported[path] = state, module
    return module


def _module_name(path: Path) -> str:
    """The file's own name, by which other processes find it, unless that is the name of something else."""
    try:
        known = importlib.util.find_spec(path.stem) if path.stem.isidentifier() else None
    except (ImportError, ValueError):
        known = None
    if known is not None and known.origin is not None and Path(known.origin).resolve() == path:
        return path.stem
    return f"own_{zlib.crc32(os.fsencode(path)):08x}_{path.stem}"


def _found(module: ModuleType, name: str, target: str) -> Callable[..., Any]:
    found: Any = module
    for part in name.split("."):
        if not part or not hasattr(found, part):
            known = [key for key, value in vars(found).items() if callable(value) and key[0] != "_"]
            near = difflib.get_close_matches(part, known, n=3, cutoff=0.4) or known[:3]
            hint = f"the nearest names are {', '.join(near)}" if near else "it has nothing to call"
            raise InputError(f"'{target}' is not there: {module.__name__} has no '{name}'; {hint}.")
        found = getattr(found, part)
    if not callable(found) or isinstance(found, nn.Module):
        raise InputError(
            f"'{target}' is a {type(found).__name__}; name a class, or a function that builds the network."
        )
    function: Callable[..., Any] = found
    return function


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let modules of the folder come before all others; afterwards they come last, for what imports when it runs."""
    for name, module in list(sys.modules.items()):
        origin = getattr(module, "__file__", None)
        is_others = origin is not None and Path(origin).parent in {path.parent for path in _imported} - {
            folder
        }
        if is_others and ((folder / f"{name}.py").is_file() or (folder / name).is_dir()):
            del sys.modules[name]
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        sys.path.remove(entry)
        if entry not in sys.path:
            sys.path.append(entry)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
