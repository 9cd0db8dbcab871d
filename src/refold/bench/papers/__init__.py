"""The tables and figures of the papers, measured here and printed beside what is published."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from refold.bench.papers.published import Exhibit, find_exhibit, list_papers

if TYPE_CHECKING:
    from refold.bench.papers.figures import save_paper_plots
    from refold.bench.papers.measuring import paper
    from refold.bench.papers.results import PaperTable
    from refold.bench.papers.tables import save_paper_table, to_csv, to_dict, to_markdown, to_rich

__all__ = [
    "Exhibit",
    "PaperTable",
    "find_exhibit",
    "list_papers",
    "paper",
    "save_paper_plots",
    "save_paper_table",
    "to_csv",
    "to_dict",
    "to_markdown",
    "to_rich",
]

# Loaded when first used: a list of names needs none of what measures.
_HOME = {
    "save_paper_plots": "refold.bench.papers.figures",
    "paper": "refold.bench.papers.measuring",
    "PaperTable": "refold.bench.papers.results",
    **dict.fromkeys(
        ("save_paper_table", "to_csv", "to_dict", "to_markdown", "to_rich"), "refold.bench.papers.tables"
    ),
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'refold.bench.papers' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)
