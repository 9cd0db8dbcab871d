"""The command ``refold``: parse, call, print."""

from __future__ import annotations

import inspect
import signal
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from refold.cli.engines import bench, export_command
from refold.cli.maps import maps_command
from refold.cli.networks import fold_command, list_command, profile, push_command, verify
from refold.cli.papers import paper_command
from refold.cli.quantizing import quantize_command
from refold.cli.runs import check_data, distill_command, predict, quickstart, train_command
from refold.cli.shared import console
from refold.cli.unfolding import unfold_command
from refold.errors import RefoldError, first_line, printable

__all__ = ["app", "console", "main"]

_DEBUG = "--debug"
_INTERRUPTED = 130

app = typer.Typer(
    help="Convolutional networks that train with many branches and run with one.",
    no_args_is_help=True,
    # Its tables cut long option names off at 80 columns.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line: whatever goes wrong is one line on stderr and exit code 2, an interrupt 130.

    ``--debug``, anywhere among the arguments, shows where an error comes from; SIGTERM ends as Ctrl-C does.
    """
    arguments = sys.argv[1:]
    debug = _DEBUG in arguments
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = app([each for each in arguments if each != _DEBUG] or ["--help"], standalone_mode=False) or 0
        if code == _INTERRUPTED:  # Typer makes it of an interrupt
            raise KeyboardInterrupt
        sys.exit(code)
    except Exception as error:  # the last resort: nobody is helped by a page of traceback
        if debug:
            raise
        print("refold:", printable(" ".join(_said(error, arguments).split())), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("refold: stopped", file=sys.stderr)
        sys.exit(_INTERRUPTED)


def _said(error: Exception, arguments: list[str]) -> str:
    if isinstance(error, RefoldError):
        return str(error)
    # What Typer says of options and arguments; its classes have moved from version to version.
    of_usage: Callable[[], str] | None = getattr(error, "format_message", None)
    if of_usage is not None:
        words = ["refold", *([arguments[0]] if arguments and arguments[0] in _COMMANDS else []), "--help"]
        return f"{of_usage().rstrip('.')}{_given(error, arguments)}; {' '.join(words)} names all options."
    return _unexpected(error)


def _given(error: Exception, arguments: list[str]) -> str:
    """The value that an option was given, where an error is about an option."""
    names = getattr(getattr(error, "param", None), "opts", ())
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        if name in names:
            return f" (given: '{value if equals else following}')"
    return ""


def _unexpected(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "The memory does not suffice for this; give smaller images, batches or networks."
    if isinstance(error, OSError) and error.filename is not None:
        return f"'{error.filename}' cannot be used: {error.strerror}."
    return f"{type(error).__name__}: {first_line(error)}; {_DEBUG} shows where it comes from."


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option(_DEBUG, help="Show where an error comes from.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        print(f"refold {installed('refold')}")
        raise typer.Exit


# In the order of the help page.
_COMMANDS: dict[str, Callable[..., None]] = {
    "quickstart": quickstart,
    "list": list_command,
    "profile": profile,
    "unfold": unfold_command,
    "fold": fold_command,
    "verify": verify,
    "export": export_command,
    "quantize": quantize_command,
    "bench": bench,
    "paper": paper_command,
    "maps": maps_command,
    "train": train_command,
    "distill": distill_command,
    "check-data": check_data,
    "push": push_command,
    "predict": predict,
}
for _name, _command in _COMMANDS.items():
    # Without it, only the first words of a command's sentence would be listed.
    app.command(_name, short_help=(inspect.getdoc(_command) or "").split("\n\n")[0])(_command)
