"""The picture as one HTML page that needs nothing else, with the report in words below it."""

from __future__ import annotations

from collections.abc import Iterable
from xml.sax.saxutils import escape

from refold.folding import FoldReport
from refold.picture.blocks import Part, before_words, drawings, shortened
from refold.picture.layout import pieces
from refold.picture.pieces import MONO, SANS, framed, readable, stacked
from refold.picture.words import left_by_reason, remarks, summary, totals, verdict

_STYLE = f"""
body {{ margin: 0 auto; max-width: 600px; padding: 0 0 2em; background: #fff; color: #1b1f24;
  font: 15px/1.45 {SANS}; }}
section {{ padding: 0 14px; }}
svg {{ break-inside: avoid; }}
h2 {{ font-size: 1.15em; margin: 1.6em 0 .4em; break-after: avoid; }}
table {{ border-collapse: collapse; width: 100%; font-size: 13px; }}
th, td {{ text-align: left; vertical-align: top; padding: 4px 8px 4px 0; border-top: 1px solid #c9d1d9;
  overflow-wrap: anywhere; }}
th {{ font-weight: 600; }}
tr {{ break-inside: avoid; }}
.number {{ text-align: right; white-space: nowrap; }}
code {{ font: 12px {MONO}; }}
@media print {{
  @page {{ margin: 12mm; }}
  body {{ max-width: none; print-color-adjust: exact; -webkit-print-color-adjust: exact; }}
  main {{ columns: 2; column-gap: 6mm; }}
}}
"""

_NUMBER = ' class="number"'


def to_html(report: FoldReport, title: str | None = None) -> str:
    """The whole page. Each part of the picture is an SVG of its own, so that paper breaks between them."""
    name = _text(title or report.model)
    drawn = "".join(
        framed(*stacked([piece]), f"{title or report.model}, part {index}")
        for index, piece in enumerate(pieces(report, title), 1)
    )
    words = _tables(report)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}, folded</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<main>\n{drawn}</main>\n<section>\n{words}</section>\n</body>\n</html>\n"
    )


def _tables(report: FoldReport) -> str:
    """The report in words: the same as the picture, and what it had no room for."""
    found = f"<h2>In words</h2>\n<p>{_text(summary(report))} {_text(verdict(report))}</p>\n"
    numbers = [[_text(name), f"{old:,}", f"{new:,}"] for name, old, new, _ in totals(report)]
    found += _table(["", "before", "after"], numbers, numbers_from=1)
    rows = [
        [
            str(len(drawing.paths) * len(part.names)),
            _places(drawing.paths, part),
            _text(had),
            _text(_became(part)),
        ]
        for drawing in drawings(report.regions)
        for part in drawing.parts
        for had in [before_words(part.operators)]
    ]
    if rows:
        found += "<h2>What became what</h2>\n" + _table(["how many", "where", "before", "after"], rows)
    left = [
        [str(len(names)), f"<code>{_text(shortened(names))}</code>", _text(reason)]
        for reason, names in left_by_reason(report)
    ]
    if left:
        found += "<h2>Left as it was</h2>\n" + _table(["how many", "what", "why"], left)
    notes = "".join(f"<li>{_text(note)}</li>" for note in remarks(report))
    return found + (f"<h2>Notes</h2>\n<ul>{notes}</ul>\n" if notes else "")


def _places(paths: tuple[str, ...], part: Part) -> str:
    within = (
        f"<br>{'in each' if len(paths) > 1 else 'there'}: <code>{_text(part.label)}</code>"
        if part.label
        else ""
    )
    return f"<code>{_text(shortened(paths))}</code>{within}"


def _became(part: Part) -> str:
    return ", ".join(filter(None, (part.kind, part.details)))


def _table(heads: Iterable[str], rows: Iterable[list[str]], numbers_from: int = 99) -> str:
    def line(tag: str, cells: Iterable[str]) -> str:
        made = (
            f"<{tag}{_NUMBER if index >= numbers_from else ''}>{cell}</{tag}>"
            for index, cell in enumerate(cells)
        )
        return f"<tr>{''.join(made)}</tr>\n"

    return f"<table>\n{line('th', heads)}{''.join(line('td', row) for row in rows)}</table>\n"


def _text(words: str) -> str:
    return escape(readable(words))
