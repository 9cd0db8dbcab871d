"""The picture as a file: SVG by itself, or in an HTML page with the report in words."""

from pathlib import Path

from refold.errors import InputError
from refold.files import PathLike, check_writable, write_text
from refold.folding import FoldReport
from refold.picture.layout import draw
from refold.picture.page import to_html

_FORMS = {".svg": draw, ".html": to_html}


def check_picture(path: PathLike) -> Path:
    """The path, if a picture can be written there; raises `InputError` where not, before long work."""
    target = check_writable(path)
    if target.suffix.lower() not in _FORMS:
        raise InputError(f"'{target}' is no name for a picture; let it end in .svg or .html.")
    return target


def save_picture(report: FoldReport, path: PathLike, *, title: str | None = None) -> None:
    """Draw what the fold did into an ``.svg`` or ``.html`` file that needs nothing else, headed by ``title``.

    The title is the class of the model where it is left out. Raises `InputError` where ``path`` has another suffix
    or cannot be written.
    """
    target = check_picture(path)
    write_text(target, _FORMS[target.suffix.lower()](report, title))
