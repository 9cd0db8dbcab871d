"""Pieces of a picture: marks of SVG with a height, that know how wide text may get in any common font."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

WIDTH, MARGIN = 390, 14
SANS = "system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,'DejaVu Sans',sans-serif"
MONO = "ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace"
INK, SOFT, LINE, PAPER, DEEP = "#1b1f24", "#57606a", "#c9d1d9", "#ffffff", "#1d4f91"

_BREADTHS = {
    letter: breadth
    for letters, breadth in (
        (" !',.:;I[]`ijl|", 0.32),
        ("()-/\\frt", 0.42),
        ('"*_csz–', 0.56),
        ("#$0123456789?abdeghknopquvxy", 0.64),
        ("ABCDEFGHJKLNOPQRSTUVXYZ&~{}", 0.79),
        ("+<=>^→×", 0.84),
        ("%@MWmw", 0.99),
    )
    for letter in letters
}


@dataclass
class Piece:
    """Part of the picture over its whole width, drawn from the top down; `y` is where the next mark begins."""

    y: float = 0
    marks: list[str] = field(default_factory=list)

    def text(
        self,
        x: float,
        y: float,
        words: str,
        size: float = 12,
        *,
        bold: bool = False,
        mono: bool = False,
        fill: str = INK,
        anchor: str = "start",
    ) -> None:
        """One line of text, its baseline at `y`."""
        family = f' font-family="{MONO}"' if mono else ""
        weight = ' font-weight="700"' if bold else ""
        place = "" if anchor == "start" else f' text-anchor="{anchor}"'
        self.marks.append(
            f'<text x="{x:.5g}" y="{y:.6g}" font-size="{size:g}" fill="{fill}"{family}{weight}{place}>'
            f"{escape(readable(words))}</text>"
        )

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        *,
        fill: str = PAPER,
        stroke: str = LINE,
        radius: float = 5,
    ) -> None:
        """A rectangle with round corners."""
        self.marks.append(
            f'<rect x="{x:.5g}" y="{y:.6g}" width="{width:.4g}" height="{height:.6g}" rx="{radius:g}" fill="{fill}" '
            f'stroke="{stroke}"/>'
        )

    def path(self, commands: str, *, stroke: str = SOFT, width: float = 1.6) -> None:
        """A line of SVG's path commands."""
        self.marks.append(
            f'<path d="{commands}" fill="none" stroke="{stroke}" stroke-width="{width:g}" '
            'stroke-linecap="round" stroke-linejoin="round"/>'
        )

    def paragraph(
        self,
        words: str,
        x: float = MARGIN,
        *,
        size: float = 12,
        bold: bool = False,
        mono: bool = False,
        fill: str = INK,
    ) -> None:
        """Text from `y` down, wrapped before the right margin."""
        for line in wrapped(words, WIDTH - MARGIN - x, size, bold=bold, mono=mono):
            self.y += size * 1.35
            self.text(x, round(self.y - size * 0.3, 1), line, size, bold=bold, mono=mono, fill=fill)


def stacked(pieces: Iterable[Piece]) -> tuple[str, float]:
    """The pieces below each other, and their height together."""
    marks, top = [], 0.0
    for piece in pieces:
        marks.append(f'<g transform="translate(0 {top:g})">{"".join(piece.marks)}</g>')
        top = round(top + piece.y, 1)
    return "\n".join(marks), top


def framed(marks: str, height: float, label: str) -> str:
    """The whole SVG: as wide as there is room, on white."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="100%" role="img" '
        f'style="display:block;max-width:600px;margin:0 auto" font-family="{SANS}">\n'
        f"<title>{escape(readable(label))}</title>\n"
        f'<rect width="{WIDTH}" height="{height:g}" fill="{PAPER}"/>\n{marks}\n</svg>\n'
    )


def readable(words: str) -> str:
    """The text without characters that XML cannot hold, and in one line."""
    return re.sub(r"[^\x20-\uD7FF\uE000-\uFFFD\U00010000-\U0010FFFF]", " ", words)


def wrapped(words: str, width: float, size: float, *, bold: bool = False, mono: bool = False) -> list[str]:
    """Lines that are no wider than `width` in any common font; a long word breaks behind a dot, or anywhere."""
    room = width / size / (1.12 if bold and not mono else 1)
    lines: list[str] = []
    for word in words.split():
        if lines and _breadth(f"{lines[-1]} {word}", mono) <= room:
            lines[-1] += f" {word}"
            continue
        while _breadth(word, mono) > room:
            fitting = next((end for end in range(len(word), 1, -1) if _breadth(word[:end], mono) <= room), 1)
            cut = word.rfind(".", 0, fitting) + 1 or fitting
            lines.append(word[:cut])
            word = word[cut:]
        if word:
            lines.append(word)
    return lines


def _breadth(text: str, mono: bool) -> float:
    """How wide the text is in units of its size, in DejaVu Sans, the widest of the common fonts."""
    return sum(0.61 if mono and letter.isascii() else _BREADTHS.get(letter, 1.0) for letter in text)
