"""Pages of the documentation site that are made from what exists elsewhere: the README, the commands, the changelog."""

import re
from pathlib import Path
from typing import Any

import typer.main
from mkdocs.structure.files import File, Files

from refold.cli import app

_ROOT = Path(__file__).resolve().parent.parent
_WIDTH = 100


def on_files(files: Files, config: Any) -> Files:
    """Add the start page, the command reference and the changelog."""
    pages = {"index.md": start_page(), "commands.md": command_reference(), "changelog.md": changelog()}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def start_page() -> str:
    """The README, with its links as they are among the pages."""
    text = (_ROOT / "README.md").read_text(encoding="utf-8")
    return _relinked(text)


def changelog() -> str:
    """The changelog, with its links as they are among the pages."""
    return _relinked((_ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))


def _relinked(text: str) -> str:
    text = text.replace("](docs/decisions)", "](decisions/0006-a-fold-is-data.md)")
    text = re.sub(r"(\]\(|src=\")docs/", r"\1", text)
    return text.replace("](CHANGELOG.md)", "](changelog.md)")


def command_reference() -> str:
    """What each command says of itself with --help."""
    group: Any = typer.main.get_command(app)
    parts = [
        "# Command line\n\nEvery command as `--help` shows it. `--debug`, anywhere, shows where an error comes from.\n"
    ]
    for name, command in group.commands.items():
        context = command.make_context(
            name, [], resilient_parsing=True, terminal_width=_WIDTH, max_content_width=_WIDTH
        )
        context.info_name = f"refold {name}"
        parts.append(f"## refold {name}\n\n```text\n{command.get_help(context).strip()}\n```\n")
    return "\n".join(parts)
