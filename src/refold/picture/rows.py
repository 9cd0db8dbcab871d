"""One row of a card: the operators of a part as small boxes, an arrow, and the layer that took their place."""

from __future__ import annotations

from refold.picture.blocks import Part
from refold.picture.pieces import DEEP, INK, MARGIN, PAPER, SOFT, WIDTH, Piece, wrapped

_LEFT, _ARROW, _RIGHT = MARGIN + 10, 190, 212
_END = WIDTH - MARGIN - 10
_LINE, _LABEL_LINE = 17, 14
_ROOM_FOR_SYMBOLS, _WIDEST_SYMBOL = 52, 12


def draw_part(piece: Piece, part: Part) -> None:
    """Draw the row below what the piece has so far."""
    piece.y += 7
    label = wrapped(part.label, _END - _LEFT, 11, mono=True)
    if wrapped(part.label, _ARROW - _LEFT, 11, mono=True) != label or len(label) > 1:
        _label(piece, label, piece.y)
        piece.y += _LABEL_LINE * len(label) + 2
        label = []
    words = _operator_lines(part)
    left = _LABEL_LINE * len(label) + _LINE * sum(len(lines) for _, _, lines in words)
    kind = wrapped(part.kind, _END - _RIGHT - 16, 12, bold=True)
    details = wrapped(part.details, _END - _RIGHT - 16, 11.5)
    right = 15.5 * len(kind + details) + 11
    middle = piece.y + max(left, right) / 2
    _label(piece, label, middle - left / 2)
    _operators(piece, part, words, middle - left / 2 + _LABEL_LINE * len(label))
    piece.path(f"M{_ARROW} {middle:g}h14m-5 -5l5 5l-5 5", stroke=INK, width=2)
    _layer(piece, kind, details, middle - right / 2, right)
    piece.y += max(left, right) + 8


def _label(piece: Piece, lines: list[str], top: float) -> None:
    for index, line in enumerate(lines):
        piece.text(_LEFT, top + 10 + _LABEL_LINE * index, line, 11, mono=True, fill=SOFT)


def _layer(piece: Piece, kind: list[str], details: list[str], top: float, height: float) -> None:
    piece.box(_RIGHT, top, _END - _RIGHT, height, fill=DEEP, stroke="none")
    for index, line in enumerate(kind + details):
        bold = index < len(kind)
        place = top + 17 + 15.5 * index
        piece.text(_RIGHT + 8, place, line, 12 if bold else 11.5, bold=bold, fill=PAPER)


def _pitch(part: Part) -> float:
    """How far apart the small boxes are, so that those of the most frequent operator fit."""
    return min(_WIDEST_SYMBOL, _ROOM_FOR_SYMBOLS / max(count for _, count in part.operators))


def _words_at(part: Part) -> float:
    return _LEFT + _pitch(part) * max(count for _, count in part.operators) + 4


def _operator_lines(part: Part) -> list[tuple[str, int, list[str]]]:
    room = _ARROW - 4 - _words_at(part)
    return [(word, count, wrapped(f"{count}× {word}", room, 12)) for word, count in part.operators]


def _operators(piece: Piece, part: Part, words: list[tuple[str, int, list[str]]], top: float) -> None:
    pitch = _pitch(part)
    for word, count, lines in words:
        for index in range(count):
            _symbol(piece, word, _LEFT + index * pitch, top + 8.5, pitch * 0.8)
        for line in lines:
            piece.text(_words_at(part), top + 13, line)
            top += _LINE


def _symbol(piece: Piece, word: str, x: float, middle: float, size: float) -> None:
    """A small box for one operator; without colours they are dark, middle and white."""
    y = middle - size / 2
    if word in ("convolution", "linear"):
        piece.box(x, y, size, size, fill=DEEP, stroke=DEEP, radius=1.5)
        return
    if word == "batch norm":
        piece.box(x, y, size, size, fill="#f2b04c", stroke="#8a5a00", radius=1.5)
        return
    piece.box(x, y, size, size, stroke=INK, radius=size / 2 if word in ("add", "multiply") else 1.5)
    x, arm = x + size / 2, size * 0.28
    if word == "add":
        cross = f"M{x - arm:.2f} {middle:.2f}h{2 * arm:.2f}m{-arm:.2f} {-arm:.2f}v{2 * arm:.2f}"
        piece.path(cross, stroke=INK, width=1.2)
    elif word == "multiply":
        arm *= 0.8
        cross = f"M{x - arm:.2f} {middle - arm:.2f}l{2 * arm:.2f} {2 * arm:.2f}"
        piece.path(f"{cross}m0 {-2 * arm:.2f}l{-2 * arm:.2f} {2 * arm:.2f}", stroke=INK, width=1.2)
