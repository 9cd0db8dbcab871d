"""The picture as one HTML page that needs nothing else, with the report in words below it."""

from __future__ import annotations

from xml.sax.saxutils import escape

from refold.folding import FoldReport
from refold.picture.blocks import Drawing, Part, before_words, drawings, shortened
from refold.picture.layout import pieces
from refold.picture.pieces import MONO, SANS, framed, readable, stacked
from refold.picture.words import left_by_reason, remarks, summary, totals, verdict

_STYLE = f"""
body {{ margin: 0 auto; max-width: 600px; padding: 0 0 2em; background: #fff; color: #1b1f24;
  font: 15px/1.45 {SANS}; }}
section {{ padding: 0 14px; }}
svg {{ break-inside: avoid; }}
h2 {{ font-size: 1.15em; margin: 1.6em 0 .4em; break-after: avoid; }}
table {{ border-collapse: collapse; width: 100%; font-size: 13px; table-layout: fixed; }}
th, td {{ text-align: left; vertical-align: top; padding: 4px 8px 4px 0; border-top: 1px solid #c9d1d9;
  overflow-wrap: anywhere; }}
th {{ font-weight: 600; }}
tr {{ break-inside: avoid; }}
.left tr {{ break-inside: auto; }}
.left th:first-child {{ width: 4.5em; }}
.parts th:first-child {{ width: 44%; }}
.costs :is(th, td):not(:first-child) {{ text-align: right; }}
code {{ font: 12px {MONO}; }}
@media print {{
  @page {{ margin: 12mm; }}
  body {{ max-width: none; print-color-adjust: exact; -webkit-print-color-adjust: exact; }}
  main {{ columns: 2; column-gap: 6mm; }}
  table, code {{ font-size: 10px; }}
}}
"""


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
    found += _table("costs", ["", "before", "after"], numbers)
    rows = [
        [
            _places(drawing, part),
            _text(before_words(part.operators)),
            _text(f"{part.kind}, {part.details}".rstrip(", ")),
        ]
        for drawing in drawings(report.regions)
        for part in drawing.parts
    ]
    if rows:
        found += "<h2>What became what</h2>\n" + _table("parts", ["where", "before", "after"], rows)
    left = [
        [f"{len(names)}×", f"{_text(reason)}<br><code>{_text(shortened(names))}</code>"]
        for reason, names in left_by_reason(report)
    ]
    if left:
        found += "<h2>Left as it was</h2>\n" + _table("left", ["how many", "why, and what"], left)
    notes = "".join(f"<li>{_text(note)}</li>" for note in remarks(report))
    return found + (f"<h2>Notes</h2>\n<ul>{notes}</ul>\n" if notes else "")


def _places(drawing: Drawing, part: Part) -> str:
    count = f"×{len(drawing.paths)} " if len(drawing.paths) > 1 else ""
    inside = f"<br>{_text(part.label)}" if part.label else ""
    return f"{count}<code>{_text(shortened(drawing.paths))}{inside}</code>"


def _table(kind: str, heads: list[str], rows: list[list[str]]) -> str:
    lines = [_cells("th", heads), *(_cells("td", row) for row in rows)]
    return f'<table class="{kind}">\n{"".join(lines)}</table>\n'


def _cells(tag: str, cells: list[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{cell}</{tag}>' for cell in cells)}</tr>\n"


def _text(words: str) -> str:
    return escape(readable(words))
