"""The exceptions that refold raises: each message says what was wrong, what was expected and what to do next."""

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager

_SHOWN = 3


class RefoldError(Exception):
    """Base of every error that refold raises for bad input or a failed proof."""


class NotFoldable(RefoldError):
    """Two linear operations have no exact common convolution; the message is the reason."""


class NotEquivalent(RefoldError):
    """Two networks that should compute the same function do not; carries the measured distances as `proof`."""

    def __init__(self, message: str, proof: object = None) -> None:
        super().__init__(message)
        self.proof = proof


class UnknownModel(RefoldError):
    """No model has the requested name; the message lists the nearest names."""


class CheckpointError(RefoldError):
    """A checkpoint cannot be read, does not fit the network, or has the wrong form.

    ``on_command_line`` is the message where its advice must name options instead of arguments.
    """

    def __init__(self, message: str, on_command_line: str | None = None) -> None:
        super().__init__(message)
        self.on_command_line = on_command_line or message


class InputError(RefoldError):
    """An argument, file or folder given by the user cannot be used."""


class RecipeError(InputError):
    """A training recipe is not understood: an unknown recipe, key or value; the message names the nearest."""


def first_line(error: BaseException) -> str:
    """The first sentence of an error's message, without its full stop, or the error's name where it has none."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    # PyTorch puts the place in its source before the words where memory runs out.
    line = re.sub(r"^\[enforce fail at [^]]*\] [^.]*\. ", "", line)
    return line.split(". ")[0].rstrip(".")


def printable(text: object) -> str:
    """A text in one line for a terminal: control characters, of which file names may hold any, are written out."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in str(text))


@contextmanager
def naming_packages(wanted: str) -> Iterator[None]:
    """Around imports: where a package is missing, the error says what needs it and how it is installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "refold"):
            raise
        raise ModuleNotFoundError(
            f"{wanted} needs the package {package}, which is not installed; fold and verify run without. "
            "Install all that refold uses: pip install refold",
            name=error.name,
        ) from error


def some(names: Collection[str]) -> str:
    """The first few of many names, and how many more there are."""
    shown = ", ".join(list(names)[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else shown
