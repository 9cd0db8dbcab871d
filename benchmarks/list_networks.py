"""Measure every network of refold in both forms and write the table of docs/models.md.

    python benchmarks/list_networks.py --json list_networks.jsonl

Each network is built with random weights and folded without the proof; its parameters, multiply-accumulates and
activations are counted for one image. The JSON file has one line a network; networks that it already has are not
measured again. The figures of the papers are those of `refold.list_papers`. The table goes between two marks in the
Markdown file, and nothing else of it changes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
DOCUMENT = _HERE.parent / "docs" / "models.md"
BEGIN, END = "<!-- networks: begin -->", "<!-- networks: end -->"

_QUANTITIES = ("parameters", "macs", "activations")
# What the papers measure at, and enough to fold at.
_PIXELS, _FOLDED_PIXELS = 224, 64


@dataclass(frozen=True)
class Figure:
    """What tables print for one form of one network; the note says how the network differs, if it does."""

    network: str
    sources: tuple[str, ...]
    form: str
    printed: tuple[str, ...]
    note: str | None


def read_figures() -> list[Figure]:
    """All published sizes of refold's networks as they are built by default, in the order of the papers."""
    from refold import list_models, list_papers

    found: dict[tuple[str, str, tuple[str, ...]], Figure] = {}
    own = set(list_models())
    for exhibit in list_papers():
        columns = exhibit.columns_of(*_QUANTITIES, "macs_and_norms")
        for row in exhibit.rows:
            is_default = not row.arguments and row.pixels is None and row.form in ("training", "plain")
            printed = tuple(
                f"{row.values[place]} {column.unit}{' with norms' * (column.quantity == 'macs_and_norms')}"
                for place, column in columns
                if row.values[place]
            )
            if row.network not in own or not is_default or not printed:
                continue
            key = (row.network, row.form, printed)
            earlier = found[key].sources if key in found else ()
            found[key] = Figure(row.network, (*earlier, exhibit.source), row.form, printed, row.note)
    return list(found.values())


def measure(name: str) -> dict[str, Any]:
    """The counts of one network in both forms: the facts of its row."""
    import torch

    from refold import create_model, fold
    from refold.folding import count

    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = create_model(name).eval()
    channels, own, _ = network.pretrained_cfg["input_size"]  # type: ignore[index, misc]
    pixels = min(own, _PIXELS)
    start = time.perf_counter()
    plain = fold(network, torch.zeros(1, channels, *[min(pixels, _FOLDED_PIXELS)] * 2), prove=False)
    record: dict[str, Any] = {"name": name, "pixels": pixels, "seconds": time.perf_counter() - start}
    for form, model in (("training", network), ("plain", plain)):
        cost = count(model.to("meta"), torch.empty(1, channels, pixels, pixels, device="meta"))
        record[form] = {quantity: getattr(cost, quantity) for quantity in _QUANTITIES}
        record[form]["batch norms"] = cost.batch_norms
    return record


def table(records: Iterable[Mapping[str, Any]], figures: Sequence[Figure]) -> str:
    """The Markdown table of the records, sorted by name, and what its notes say."""
    lines = [
        "| network | pixels | training form | MACs (M) | activations (M) | plain form | MACs (M) | activations (M) "
        "| published: parameters, MACs, activations |",
        f"|---|{'--:|' * 7}---|",
    ]
    notes = []
    for record in sorted(records, key=lambda record: record["name"]):
        name = record["name"]
        own = [figure for figure in figures if figure.network == name]
        notes += [f"- `{name}`, {_sources(figure)}: {figure.note}." for figure in own if figure.note]
        counts = [cell for form in ("training", "plain") for cell in _cells(record[form])]
        published = "<br>".join(_published(figure) for figure in own) or "–"
        lines.append(f"| `{name}` | {record['pixels']} | {' | '.join(counts)} | {published} |")
    return "\n".join([*lines, "", "Where the network is not what is printed (≠):", "", *notes])


def _cells(counts: Mapping[str, int]) -> Iterator[str]:
    yield f"{counts['parameters']:,}"
    yield f"{counts['macs'] / 1e6:,.1f}"
    yield f"{counts['activations'] / 1e6:.2f}"


def _published(figure: Figure) -> str:
    mark = "≠ " if figure.note else ""
    return f"{mark}{', '.join(figure.printed)} ({figure.form}; {_sources(figure)})"


def _sources(figure: Figure) -> str:
    return "; ".join(figure.sources)


def write_between_marks(document: Path, text: str) -> None:
    """Replace what stands between the marks of a Markdown file. Raises ValueError where it has none."""
    from refold.files import write_text

    before, begin, rest = document.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{document} has no lines {BEGIN} and {END}; put them where the table belongs.")
    write_text(document, f"{before}{BEGIN}\n{text}\n{END}{after}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=DOCUMENT, help="the Markdown file with the marks")
    parser.add_argument("--json", type=Path, default=Path("list_networks.jsonl"), help="one line a network")
    options = parser.parse_args(arguments)
    from refold import list_models

    lines = options.json.read_text().splitlines() if options.json.exists() else []
    records = {record["name"]: record for record in map(json.loads, lines)}
    names = list_models()
    for name in names:
        if name not in records:
            records[name] = measure(name)
            with options.json.open("a") as file:
                file.write(json.dumps(records[name]) + "\n")
            print(f"{name}: {records[name]['seconds']:.1f} s", flush=True)
    write_between_marks(options.output, table((records[name] for name in names), read_figures()))


if __name__ == "__main__":
    main()
