"""How the picture is laid out: totals and proof, then every kind of block, then what was left."""

from __future__ import annotations

from collections.abc import Iterator

from refold.folding import FoldReport
from refold.picture.blocks import Drawing, drawings, named, shortened
from refold.picture.pieces import (
    DEEP,
    INK,
    LINE,
    MARGIN,
    PAPER,
    SOFT,
    WIDTH,
    Piece,
    framed,
    stacked,
    wrapped,
)
from refold.picture.rows import draw_part
from refold.picture.words import left_by_reason, remarks, summary, totals, verdict

_MOST_LINES = 3


def draw(report: FoldReport, title: str | None = None) -> str:
    """The picture as SVG text, as wide as there is room, headed by ``title`` or by the class of the model."""
    marks, height = stacked(pieces(report, title))
    return framed(marks, height, f"{title or report.model}: {summary(report)}")


def pieces(report: FoldReport, title: str | None = None) -> Iterator[Piece]:
    """The parts of the picture from the top down: none of them may be torn apart on paper."""
    yield _header(report, title)
    blocks = drawings(report.regions)
    if any(len(block.paths) > 1 for block in blocks):
        yield _legend()
    for block in blocks:
        yield _card(block)
    yield _footer(report)


def _header(report: FoldReport, title: str | None) -> Piece:
    piece = Piece(MARGIN)
    piece.paragraph(title or report.model, size=19, bold=True)
    if title and title != report.model:
        piece.paragraph(report.model, size=11, fill=SOFT)
    piece.paragraph(summary(report), size=13, bold=not report.regions)
    piece.y += 22
    for x, words in ((216, "before"), (300, "after")):
        piece.text(x, piece.y - 4, words, 11, fill=SOFT, anchor="end")
    for name, before, after, texts in totals(report):
        piece.path(f"M{MARGIN} {piece.y:g}H{WIDTH - MARGIN}", stroke=LINE, width=1)
        base = piece.y + 15.5
        piece.text(MARGIN, base, name)
        piece.text(216, base, texts[0], anchor="end")
        piece.text(300, base, texts[1], bold=True, anchor="end")
        piece.path(f"M225 {base - 4:g}h10m-4 -3.5l4 3.5l-4 3.5", width=1.3)
        most = max(before, after, 1)
        for value, y, fill in ((before, base - 10.5, LINE), (after, base - 3.5, DEEP)):
            if value:
                width = max(66 * value / most, 1)
                piece.box(310, y, round(width, 1), 5.5, fill=fill, stroke="none", radius=1)
        piece.y += 22
    piece.y += 6
    proved = report.proof is not None
    if proved:
        piece.path(f"M{MARGIN + 1} {piece.y + 10:g}l4 4l7 -9", stroke=DEEP, width=2.4)
    piece.paragraph(verdict(report), MARGIN + 20 if proved else MARGIN)
    piece.y += 14
    return piece


def _legend() -> Piece:
    piece = Piece()
    words = "Blocks that differ only in sizes are drawn once: 16…64 stands for sizes from 16 to 64."
    piece.paragraph(words, size=11, fill=SOFT)
    piece.y += 6
    return piece


def _card(drawing: Drawing) -> Piece:
    piece = Piece(8)
    count = len(drawing.paths)
    badge = f"×{count}" if count > 1 else ""
    start = MARGIN + 10
    if badge:
        width = 12 + 9 * len(badge)
        piece.box(start, piece.y, width, 19, fill=INK, stroke="none", radius=9.5)
        piece.text(start + width / 2, piece.y + 14, badge, 13, bold=True, fill=PAPER, anchor="middle")
        start += width + 8
    piece.y += 2
    for line in _where(drawing, WIDTH - MARGIN - 10 - start):
        piece.y += 15
        piece.text(start, piece.y - 3, line, 11.5, bold=True, mono=True)
    piece.y += 3
    for index, part in enumerate(drawing.parts):
        if index:
            piece.path(f"M{MARGIN + 10} {piece.y:g}H{WIDTH - MARGIN - 10}", stroke=LINE, width=1)
        draw_part(piece, part)
    outline = Piece()
    outline.box(MARGIN, 0.5, WIDTH - 2 * MARGIN, round(piece.y - 0.5, 1), radius=9)
    return Piece(piece.y + 8, outline.marks + piece.marks)


def _where(drawing: Drawing, width: float) -> list[str]:
    lines = wrapped(shortened(drawing.paths), width, 11.5, mono=True)
    if len(lines) > _MOST_LINES:
        lines = wrapped(f"{named(drawing.paths[0])} … {named(drawing.paths[-1])}", width, 11.5, mono=True)
    return lines


def _footer(report: FoldReport) -> Piece:
    piece = Piece()
    groups = left_by_reason(report)
    if groups:
        piece.y += 8
        piece.paragraph("Left as it was", size=14, bold=True)
        for reason, names in groups:
            piece.y += 5
            piece.text(MARGIN, piece.y + 12.6, f"{len(names)}×", bold=True)
            piece.paragraph(reason, MARGIN + 34)
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            piece.paragraph(f"{names[0]}{more}", MARGIN + 34, size=11, mono=True, fill=SOFT)
    notes = remarks(report)
    if notes:
        piece.y += 8
        piece.paragraph("Notes", size=14, bold=True)
        for note in notes:
            piece.y += 4
            piece.paragraph(note)
    piece.y += MARGIN
    return piece
