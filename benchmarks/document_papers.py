"""The section of ``docs/results.md`` on the papers' accuracy tables that `refold paper NAME --accuracy` trained."""

from __future__ import annotations

from typing import Any


def papers_section(tables: list[dict[str, Any]]) -> list[str]:
    """The papers' accuracy tables that were trained here at the reduced scale."""
    first = next(iter(tables[0]["runs"].values()))
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    lines = [
        "## The papers' accuracy tables, trained small",
        "",
        "What `refold paper NAME --accuracy` gave ([how](benchmarking.md#the-papers-accuracies)): narrow networks, few "
        f"epochs, CIFAR-10 in part, one thread of an AMD EPYC processor ({versions}). A relation that holds here shows "
        "in the first epochs already; of one that cannot be told, or is reversed, these runs say nothing about "
        "converged networks on ImageNet.",
    ]
    for table in tables:
        images = {(run["training_images"], run["held_out_images"]) for run in table["runs"].values()}
        ((trained, measured),) = images
        lines += [
            "",
            f"### {table['source']}",
            "",
            f"`refold paper {table['name']} --accuracy`, {trained:,} training and {measured:,} test images of "
            f"CIFAR-10, as many of each class, {table['recipe']['epochs']} epochs.",
            "",
            table["report"].rstrip(),
            "",
            _relations(table["rows"]),
        ]
    return lines


def _relations(rows: list[dict[str, Any]]) -> str:
    """Which relations of a table hold, in a sentence."""
    told: dict[str, list[str]] = {}
    for row in rows:
        if row["relation"] is not None:
            told.setdefault(row["relation"], []).append(f"“{row['model']}” to “{row['reference']}”")
    return "In short: " + "; ".join(f"{verdict}: {', '.join(names)}" for verdict, names in told.items()) + "."
