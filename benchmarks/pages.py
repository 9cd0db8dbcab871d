"""Tables in the documentation: what a script measured stands between two comments that name the script."""

from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"


def put_table(page: str, script: str, text: str) -> None:
    """Replace what stands in a page of the documentation for a script, which the page must name already."""
    path = DOCS / page
    start, end = f"<!-- measured by benchmarks/{script} -->", "<!-- end of what was measured -->"
    before, rest = path.read_text(encoding="utf-8").split(start)
    after = rest.split(end, 1)[1]
    path.write_text(f"{before}{start}\n{text}\n{end}{after}", encoding="utf-8")
