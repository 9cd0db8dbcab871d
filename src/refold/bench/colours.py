"""The colours of drawings, on light pages and on dark ones."""

from __future__ import annotations

import re

PAPER, INK, LINE, FAINT, ROOF = "#ffffff", "#1c2733", "#444444", "#c8ced6", "#c0392b"
BY_FORM = ("#7a8ca3", "#2a78b8", "#e08a2e")
OTHER = "#333333"
BY_KIND = (
    *("#1f4e79", "#2a78b8", "#8fc1e3", "#3d9a8b", "#c0392b", "#e6a09a", "#e08a2e"),
    *("#f3c14b", "#a05195", "#d45087", "#7f9c3b", "#5b4b8a", "#9aa5b1", "#d5dae0"),
)
# What is too dark, or too light, on a dark page; the others do for both.
_DARK = {
    PAPER: "#12181f",
    INK: "#e3e9ef",
    LINE: "#b4bfca",
    FAINT: "#46525e",
    OTHER: "#c3ccd5",
    "#7a8ca3": "#91a3ba",
    "#2a78b8": "#4a9ee0",
    "#1f4e79": "#5d86c4",
    "#c0392b": "#e2604f",
    "#a05195": "#bd72b2",
    "#5b4b8a": "#9483cc",
    "#d5dae0": "#6a7683",
}
_ALL = sorted({PAPER, INK, LINE, FAINT, ROOF, OTHER, *BY_FORM, *BY_KIND})


def variables(*, dark: bool) -> str:
    """The colours as CSS variables of a light or a dark page."""
    return " ".join(
        f"{_variable(colour)}: {_DARK.get(colour, colour) if dark else colour};" for colour in _ALL
    )


def themed(svg: str) -> str:
    """A drawing whose colours are variables of the page that it stands in."""
    return re.sub(
        "|".join(map(re.escape, _ALL)), lambda found: f"var({_variable(found[0])})", svg, flags=re.IGNORECASE
    )


def _variable(colour: str) -> str:
    return f"--colour-{colour.lower().removeprefix('#')}"
