"""Everything that a paper's table and our side of it say, one value at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from refold.bench.papers.published import QUOTED, SIZES, TIMES, PaperColumn, PaperRow
from refold.bench.papers.results import PaperTable, TimingSetup


@dataclass(frozen=True)
class PaperValue:
    """One published or measured value, in the unit of its column, for CSV and JSON.

    `ratio` is the time (or rate) relative to that of the row it is compared with. `deviation` is ours relative to the
    published one, in percent; `met` says whether ours, rounded or cut off, has the printed digits.
    """

    model: str
    network: str | None
    quantity: str
    unit: str
    form: str
    on: str = ""
    engine: str = ""
    precision: str = ""
    device: str = ""
    execution: str = ""
    memory_format: str = ""
    threads: int | None = None
    batch_size: int | None = None
    published: str = ""
    published_ratio: float | None = None
    here: float | None = None
    first_quartile: float | None = None
    third_quartile: float | None = None
    ratio: float | None = None
    deviation: float | None = None
    met: bool | None = None
    note: str = ""


def values(table: PaperTable) -> list[PaperValue]:
    """Everything that is published or measured, one by one: sizes by form, times by device or engine, accuracies."""
    found: list[PaperValue] = []
    for row in table.exhibit.rows:
        for place, column in enumerate(table.exhibit.columns):
            text = row.values[place]
            if column.quantity in SIZES:
                found += _size_values(table, row, column, text)
            elif column.quantity in QUOTED:
                here = table.accuracies.get(row.network or "") if column.quantity == "top-1" else None
                if text or here is not None:
                    found.append(_value(row, column, row.timed, published=text, here=here))
            elif text:
                ratio = published_ratio(table, row, place)
                found.append(_value(row, column, row.timed, published=text, published_ratio=ratio))
        for setup in table.setups:
            found += _time_values(table, row, setup)
    return found


def _value(row: PaperRow, column: PaperColumn, form: str, **others: Any) -> PaperValue:
    known: dict[str, Any] = {"batch_size": column.batch_size if column.quantity in TIMES else None, **others}
    return PaperValue(
        row.model,
        row.network and row.subject,
        column.quantity,
        column.unit,
        form,
        on=column.on,
        note=row.note or "",
        **known,
    )


def _size_values(table: PaperTable, row: PaperRow, column: PaperColumn, text: str) -> Iterator[PaperValue]:
    sizes = table.sizes.get(row.model, {})
    if text and row.form not in sizes:
        yield _value(row, column, row.form, published=text)
    for form, cost in sizes.items():
        count = getattr(cost, column.quantity)
        compared = bool(text) and form == row.form
        yield _value(
            row,
            column,
            form,
            published=text if compared else "",
            here=column.scaled(count),
            deviation=deviation(column, text, count) if compared else None,
            met=column.is_printed_as(count, text) if compared else None,
        )


def _time_values(table: PaperTable, row: PaperRow, setup: TimingSetup) -> Iterator[PaperValue]:
    timing = table.timing(row, setup)
    if timing is None:
        return
    first, third = timing.quartiles
    column = PaperColumn("latency", "ms", on="here", batch_size=setup.batch_size)
    yield _value(
        row,
        column,
        row.timed,
        **asdict(setup.way),
        threads=setup.threads,
        batch_size=setup.batch_size,
        here=timing.median,
        first_quartile=first,
        third_quartile=third,
        ratio=table.ratio(row, setup),
    )


def deviation(column: PaperColumn, text: str, count: float) -> float:
    """How far a measured size is from the printed one, in percent."""
    return 100 * (column.scaled(count) / float(text) - 1)


def published_ratio(table: PaperTable, row: PaperRow, place: int) -> float | None:
    """A printed time relative to that of the row it is compared with; None where either is not printed."""
    if row.against is None or not row.values[place]:
        return None
    reference = table.exhibit.row(row.against).values[place]
    return float(row.values[place]) / float(reference) if reference else None
