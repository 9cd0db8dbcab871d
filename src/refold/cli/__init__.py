"""The command ``refold``: parse, call, print."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from refold.cli.engines import bench, export_command
from refold.cli.networks import fold_command, list_command, profile, verify
from refold.cli.papers import paper_command
from refold.cli.runs import distill_command, predict, quickstart, train_command
from refold.cli.shared import console
from refold.cli.unfolding import unfold_command
from refold.errors import RefoldError, printable

__all__ = ["app", "console", "main"]

app = typer.Typer(
    help="Convolutional networks that train with many branches and run with one.",
    no_args_is_help=True,
    # Its tables cut long option names off at 80 columns.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line; every error of refold's is one line on stderr and exit code 2."""
    try:
        app()
    except RefoldError as error:
        print("refold:", printable(" ".join(str(error).split())), file=sys.stderr)
        sys.exit(2)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
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
    "bench": bench,
    "paper": paper_command,
    "train": train_command,
    "distill": distill_command,
    "predict": predict,
}
for _name, _command in _COMMANDS.items():
    # Without it, only the first words of a command's sentence would be listed.
    app.command(_name, short_help=(inspect.getdoc(_command) or "").split("\n\n")[0])(_command)
