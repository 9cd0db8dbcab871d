"""What the papers print, read from published.toml: papers, their tables and figures, rows and values."""

from __future__ import annotations

import difflib
import fnmatch
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from refold.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # the same, before Python had it

_PUBLISHED = Path(__file__).with_name("published.toml")

Size = Literal["parameters", "macs", "macs_and_norms", "activations", "winograd_multiplications"]
Time = Literal["latency", "throughput"]
Accuracy = Literal[
    "top-1",
    "top-5",
    "mAP",
    "mAP of boxes",
    "mAP of masks",
    "mAP of small boxes",
    "mAP of medium boxes",
    "mAP of large boxes",
]
KernelError = Literal["MSE of d=1", "MSE of d=3", "MSE of d=5", "MSE of d=7"]
Quantity = Literal[Size, Time, Accuracy, KernelError]
# The forms that `refold.benchmark` knows; its module takes seconds to import.
PaperForm = Literal["training", "plain", "shortcut-folded"]
SIZES: tuple[Size, ...] = get_args(Size)
TIMES: tuple[Time, ...] = get_args(Time)
ACCURACIES: tuple[Accuracy, ...] = get_args(Accuracy)
ERRORS: tuple[KernelError, ...] = get_args(KernelError)
# What stands beside the sizes as it is printed.
QUOTED = (*ACCURACIES, *ERRORS)
# No network of use, but the operators that networks are compared by.
OPERATORS = "refold/ghost_operators"
_UNITS = {"M": 10**6, "10M": 10**7, "B": 10**9}
_UNITS_OF: dict[Quantity, tuple[str, ...]] = {
    **dict.fromkeys(SIZES, tuple(_UNITS)),
    "latency": ("ms", "s"),
    "throughput": ("images/s",),
    **dict.fromkeys(ACCURACIES, ("%",)),
    **dict.fromkeys(ERRORS, ("10⁻³",)),
}


@dataclass(frozen=True)
class Paper:
    """A source of published values: `key` in names such as repghost/table-4, `name` in running text."""

    key: str
    name: str
    title: str
    authors: str


@dataclass(frozen=True)
class PaperColumn:
    """What one value of each row is: a quantity in a unit, for a time also the device and the batch size."""

    quantity: Quantity
    unit: str
    on: str = ""
    batch_size: int = 1

    def __post_init__(self) -> None:
        if self.quantity not in get_args(Quantity):
            raise ValueError(f"there is no quantity '{self.quantity}'")
        if self.unit not in _UNITS_OF[self.quantity]:
            raise ValueError(f"'{self.unit}' is no unit of {self.quantity}")
        if bool(self.on) != (self.quantity in TIMES):
            raise ValueError(f"{self.quantity}: a time, and nothing else, names the device it is measured on")

    def scaled(self, value: float) -> float:
        """A measured size (a count) in this column's unit."""
        return value / _UNITS[self.unit]

    def is_printed_as(self, value: float, text: str) -> bool:
        """Whether a measured size, rounded or cut off to the printed digits, is what is printed."""
        digits = len(text.partition(".")[2])
        scaled = self.scaled(value)
        return float(text) in (round(scaled, digits), int(scaled * 10**digits) / 10**digits)


@dataclass(frozen=True)
class PaperRow:
    """One line of a table: its printed values, one a column ("" where nothing is printed), and our network.

    `network` is None where it cannot be built here. The printed sizes are those of `form`, the printed times those
    of `timed`. `linear` computes the folded network's 1x1 convolutions as linear layers; `unfold` is the plan whose
    branches the network gets. `against` is the row that this row's time is compared with, `minus` the row whose
    time is subtracted from its own, `reference` the row that its accuracy is compared with where both are trained
    here. `pixels` is the side of the images, by default the network's own; `note` says why the network is not what
    is printed. A row with a `recipe` was trained by the exhibit's with these changes, and by the `teacher`, if it
    has one.
    """

    model: str
    values: tuple[str, ...]
    network: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    form: PaperForm = "training"
    timed: PaperForm = "plain"
    linear: bool = False
    against: str | None = None
    minus: str | None = None
    pixels: int | None = None
    note: str | None = None
    unfold: str | None = None
    recipe: Mapping[str, Any] | None = None
    teacher: str | None = None
    reference: str | None = None

    @property
    def has_size(self) -> bool:
        """Whether it is a network, whose size says something."""
        return self.network not in (None, OPERATORS)

    @property
    def subject(self) -> str:
        """The network with its arguments, as one name."""
        arguments = [f"{key}={value}" for key, value in self.arguments.items()]
        if self.linear:
            arguments.append("linear")
        if self.unfold:
            arguments.append(f"unfold={self.unfold}")
        return f"{self.network}({', '.join(arguments)})" if arguments else str(self.network)

    @property
    def training(self) -> str:
        """What its training has beside its exhibit's recipe, as options of `refold train` and `refold distill`."""
        if self.recipe is None:
            return ""
        told = [] if self.teacher is None else [f"--teacher {self.teacher}"]
        return " ".join([*told, *(f"--set {key}={value}" for key, value in self.recipe.items())])


@dataclass(frozen=True)
class Exhibit:
    """A table or figure of a paper. `settings` says how its times were measured; with `breakdown` it shows where the
    time of a network goes. `recipe` is the one that its rows with a recipe were trained by, `command` what measures it
    in another way than `refold paper`."""

    paper: Paper
    number: str
    title: str
    columns: tuple[PaperColumn, ...]
    rows: tuple[PaperRow, ...]
    settings: str = ""
    breakdown: bool = False
    recipe: str = ""
    command: str = ""

    @property
    def name(self) -> str:
        """Its name on the command line, such as repghost/table-4."""
        return f"{self.paper.key}/{self.number.replace(' ', '-')}"

    @property
    def source(self) -> str:
        """Where its values are printed, such as "RepGhost, table 4"."""
        return f"{self.paper.name}, {self.number}"

    def columns_of(self, *quantities: Quantity) -> list[tuple[int, PaperColumn]]:
        """The columns of some quantities, each with its place among the values of a row."""
        return [(place, column) for place, column in enumerate(self.columns) if column.quantity in quantities]

    @property
    def measures(self) -> list[str]:
        """What it compares: "sizes", "latency", "operators", and what is quoted."""
        found = ["sizes"] if any(row.has_size for row in self.rows) else []
        if self.columns_of(*TIMES):
            found.append("latency")
        if self.breakdown:
            found.append("operators")
        if self.columns_of(*ACCURACIES):
            found.append(
                "accuracy (quoted, trained with --accuracy)" if self.trained else "accuracy (quoted)"
            )
        if self.columns_of(*ERRORS):
            found.append("errors (quoted)")
        return found

    @property
    def trained(self) -> tuple[PaperRow, ...]:
        """The rows whose accuracies are compared: those with a reference, and their references."""
        compared = [row for row in self.rows if row.reference and row.network]
        names = {name for row in compared for name in (row.model, row.reference)}
        return tuple(row for row in self.rows if row.model in names)

    def row(self, model: str) -> PaperRow:
        """The row of this name."""
        return next(row for row in self.rows if row.model == model)

    def only(self, patterns: tuple[str, ...]) -> Exhibit:
        """The exhibit with the rows whose model or network matches a pattern, and those that they refer to.

        Raises `InputError` where none does.
        """
        chosen = {
            row.model
            for row in self.rows
            for pattern in patterns
            if any(fnmatch.fnmatchcase(name, pattern) for name in (row.model, row.network or ""))
        }
        if not chosen:
            networks = [row.network for row in self.rows if row.network]
            raise InputError(
                f"No row of {self.name} matches '{', '.join(patterns)}'; its networks are "
                f"{', '.join(dict.fromkeys(networks))}."
            )
        chosen |= {
            other for row in self.rows if row.model in chosen for other in (row.against, row.minus) if other
        }
        return replace(self, rows=tuple(row for row in self.rows if row.model in chosen))


@cache
def exhibits() -> tuple[Exhibit, ...]:
    """Every table and figure that can be measured here, paper by paper, in the order of the file.

    Raises `ValueError` where the file is not as it describes itself.
    """
    content = tomllib.loads(_PUBLISHED.read_text(encoding="utf-8"))
    papers = {key: Paper(key, **facts) for key, facts in content["paper"].items()}
    found = tuple(_exhibit(papers, entry) for entry in content["exhibit"])
    if len({exhibit.name for exhibit in found}) < len(found):
        raise ValueError("published.toml has two exhibits of the same name")
    return tuple(sorted(found, key=lambda exhibit: list(papers).index(exhibit.paper.key)))


def _exhibit(papers: Mapping[str, Paper], entry: dict[str, Any]) -> Exhibit:
    entry = dict(entry)
    shared = {
        key: entry.pop(key) for key in ("form", "timed", "pixels", "reference", "teacher") if key in entry
    }
    rows = tuple(
        PaperRow(**{**shared, **row, "values": tuple(row["values"])})  # a row's own go before
        for row in entry.pop("rows")
    )
    columns = tuple(PaperColumn(**column) for column in entry.pop("columns"))
    exhibit = Exhibit(papers[entry.pop("paper")], columns=columns, rows=rows, **entry)
    _check(exhibit)
    return exhibit


def _check(exhibit: Exhibit) -> None:
    names = [row.model for row in exhibit.rows]
    for row in exhibit.rows:
        where = f"{exhibit.name}, {row.model}"
        if names.count(row.model) > 1:
            raise ValueError(f"{where}: two rows have this name")
        if len(row.values) != len(exhibit.columns):
            raise ValueError(f"{where}: {len(row.values)} values for {len(exhibit.columns)} columns")
        if not {row.form, row.timed} <= set(get_args(PaperForm)):
            raise ValueError(f"{where}: its forms are not of {', '.join(get_args(PaperForm))}")
        if row.recipe is not None and not exhibit.recipe:
            raise ValueError(f"{where}: the exhibit has no recipe that its recipe could change")
        for other in (row.against, row.minus, row.reference):
            if other is not None and exhibit.row(other).network is None:
                raise ValueError(f"{where}: '{other}' is not measured")
        for value in filter(None, row.values):
            float(value)


def list_papers(pattern: str = "") -> list[Exhibit]:
    """The tables and figures that can be measured here, paper by paper.

    `pattern` is a shell-style wildcard for their names, such as ``repghost/*``; empty for all.
    """
    return [exhibit for exhibit in exhibits() if fnmatch.fnmatch(exhibit.name, pattern or "*")]


def find_exhibit(name: str) -> Exhibit:
    """The exhibit of this name; raises `InputError` with the nearest names where there is none."""
    known = {exhibit.name: exhibit for exhibit in exhibits()}
    wanted = name.strip().lower().replace(" ", "-")
    if wanted in known:
        return known[wanted]
    paper, _, number = wanted.partition("/")
    keys = list(dict.fromkeys(exhibit.paper.key for exhibit in exhibits()))
    if paper in keys:
        own = [exhibit.name for exhibit in exhibits() if exhibit.paper.key == paper]
        nearest = difflib.get_close_matches(wanted, own, n=4, cutoff=0.0) if number else own
        what = f"There is no '{number}' of {paper} that can be measured" if number else f"'{name}' is a paper"
        raise InputError(f"{what}; name one of its tables and figures, such as {', '.join(nearest)}.")
    near = difflib.get_close_matches(paper, keys, n=2, cutoff=0.5) or keys
    own = [exhibit.name for exhibit in exhibits() if exhibit.paper.key in near]
    nearest = difflib.get_close_matches(f"{near[0]}/{number}", own, n=4, cutoff=0.0)
    raise InputError(
        f"There is no paper '{paper}'; the nearest names are {', '.join(nearest)}, and `refold paper list` shows all."
    )
