"""What a benchmark found: rows that can be compared, kept in a file, resumed and merged."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from refold.bench.machine import Machine
from refold.bench.timing import Timing
from refold.bench.ways import CHANNELS_FIRST, CPU, EAGER, Device, Execution, Measured, MemoryFormat, Way
from refold.errors import InputError
from refold.export.request import FLOAT32
from refold.files import PathLike, write_text

FORMAT = "refold benchmark 1"
# What a baseline may name of a configuration.
_COMPARED = ("model", "form", "engine", "precision", "execution", "memory_format")


@dataclass(frozen=True)
class Configuration:
    """What is measured: a model in one form, on images of one size, in one of the ways to run it (see `Way`)."""

    model: str
    form: str
    engine: str
    batch_size: int
    threads: int
    input_size: tuple[int, ...]
    precision: Measured = FLOAT32
    device: Device = CPU
    execution: Execution = EAGER
    memory_format: MemoryFormat = CHANNELS_FIRST

    def __str__(self) -> str:
        return f"{self.model}, {self.form}, {self.way}, batch {self.batch_size}, threads {self.threads}"

    @property
    def way(self) -> Way:
        """How the model is run."""
        return Way(self.engine, self.precision, self.device, self.execution, self.memory_format)


@dataclass(frozen=True)
class Work:
    """What one call must do at least: `flops` and `bytes` moved, for the whole batch, and the `floor` in
    milliseconds that a machine at its roofs would need, None where the roofs were not measured."""

    flops: int
    bytes: int
    floor: float | None = None


@dataclass(frozen=True)
class Measurement:
    """One row: a configuration on a machine, and what was measured.

    `samples` are milliseconds a call in the order measured; rows of the same `run` took turns, so their samples
    are pairs. `parameters`, `macs` (of one image) and `operators` are those of the PyTorch model in this form.
    `peak_memory` are the bytes that model and engine added to their process, None where the system does not tell.
    `breakdown` gives milliseconds a call by kind of operator. `error` says why there are no samples.
    """

    machine: str
    configuration: Configuration
    run: str
    samples: tuple[float, ...] = ()
    parameters: int | None = None
    macs: int | None = None
    operators: int | None = None
    peak_memory: int | None = None
    breakdown: dict[str, float] | None = None
    work: Work | None = None
    error: str | None = None

    @property
    def latency(self) -> Timing:
        """The samples as a `Timing`; raises `InputError` where there are none."""
        if not self.samples:
            raise InputError(f"{self.configuration} was not measured: {self.error or 'interrupted before'}.")
        return Timing(self.samples)

    @property
    def throughput(self) -> float:
        """Images a second at the median latency."""
        return 1000 * self.configuration.batch_size / self.latency.median

    @property
    def floor(self) -> float | None:
        """Milliseconds that a machine at its roofs would need; None where that was not measured."""
        return None if self.work is None else self.work.floor

    @property
    def of_roof(self) -> float | None:
        """The share of the roofs that is reached: the floor divided by the median latency."""
        return self.floor / self.latency.median if self.floor is not None and self.samples else None

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Measurement:
        """The row that `dataclasses.asdict` and JSON made `row` of."""
        given = row["configuration"]
        work = row.get("work")
        return cls(
            **{
                **row,
                "configuration": Configuration(**{**given, "input_size": tuple(given["input_size"])}),
                "samples": tuple(row["samples"]),
                "work": None if work is None else Work(**work),
            }
        )


@dataclass(frozen=True)
class Ratio:
    """A latency divided by the baseline's; `paired` where the two took turns in the same run."""

    value: float
    paired: bool


@dataclass
class Benchmark:
    """All rows of a benchmark, of one machine or of several.

    `baseline` names what every row is compared with: a model, form, engine, precision, execution or memory format, or
    several separated by commas ("training"; "ghostnet_100,plain"). A row is compared with the row that has these and
    is otherwise the same. `accuracies` are top-1 shares or per cents by model name, or by "model,form".
    """

    machines: dict[str, Machine] = field(default_factory=dict)
    rows: list[Measurement] = field(default_factory=list)
    baseline: str | None = None
    accuracies: dict[str, float] = field(default_factory=dict)

    @property
    def measured(self) -> list[Measurement]:
        """The rows that have samples."""
        return [row for row in self.rows if row.samples]

    def put(self, row: Measurement) -> None:
        """Add a row, or put it in the place of the one with the same machine and configuration."""
        for place, known in enumerate(self.rows):
            if (known.machine, known.configuration) == (row.machine, row.configuration):
                self.rows[place] = row
                return
        self.rows.append(row)

    def find(self, machine: str, configuration: Configuration) -> Measurement | None:
        """The row of a configuration on a machine."""
        wanted = (machine, configuration)
        return next((row for row in self.rows if (row.machine, row.configuration) == wanted), None)

    def add_machine(self, name: str, machine: Machine) -> str:
        """Enter a machine, and return the name that its rows carry.

        Machines are the same where all facts but the measured roofs are; another machine, or the same after an
        update, of a name that is taken gets a number behind it.
        """
        entered, number = name, 1
        while entered in self.machines and self.machines[entered] != machine:
            number += 1
            entered = f"{name} ({number})"
        known = self.machines.get(entered)
        roofs = {**(known.roofs if known else {}), **machine.roofs}
        self.machines[entered] = dataclasses.replace(machine, roofs=roofs)
        return entered

    def accuracy(self, row: Measurement) -> float | None:
        """The accuracy given for a row's model in its form, else for its model."""
        configuration = row.configuration
        by_model = self.accuracies.get(configuration.model)
        return self.accuracies.get(f"{configuration.model},{configuration.form}", by_model)

    def reference(self, row: Measurement) -> Measurement | None:
        """The row that a row is compared with; None without a baseline or where it was not measured."""
        if self.baseline is None:
            return None
        changes = parse_baseline(self.baseline, [other.configuration for other in self.rows])
        wanted = Configuration(**{**vars(row.configuration), **changes})
        found = self.find(row.machine, wanted)
        return found if found is not None and found.samples else None

    def ratio(self, row: Measurement) -> Ratio | None:
        """A row's latency relative to the baseline's.

        Where the two took turns it is the median of the ratios of neighbouring samples, else the ratio of the
        medians.
        """
        reference = self.reference(row)
        if reference is None or not row.samples:
            return None
        if reference.run == row.run and len(reference.samples) == len(row.samples):
            return Ratio(row.latency.ratio_to(reference.latency), paired=True)
        return Ratio(row.latency.ratio_of_medians(reference.latency), paired=False)

    def merged(self, *others: Benchmark) -> Benchmark:
        """A new benchmark with the rows of all; of two rows for the same, the one of the later benchmark that has
        samples is kept."""
        result = Benchmark(baseline=self.baseline)
        for part in (self, *others):
            result.baseline = result.baseline or part.baseline
            result.accuracies |= part.accuracies
            names = {name: result.add_machine(name, machine) for name, machine in part.machines.items()}
            for row in part.rows:
                renamed = dataclasses.replace(row, machine=names[row.machine])
                known = result.find(renamed.machine, renamed.configuration)
                if known is None or renamed.samples or not known.samples:
                    result.put(renamed)
        return result

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON-able values."""
        return {"format": FORMAT, **dataclasses.asdict(self)}

    def save(self, path: PathLike) -> None:
        """Write all of the benchmark as .json, for `load`.

        Raises `InputError` where the name ends otherwise or the file cannot be written.
        """
        if Path(path).suffix.lower() != ".json":
            raise InputError(
                f"'{path}' does not end in .json; refold.bench.save_benchmark writes .csv and .md as well."
            )
        write_text(path, json.dumps(self.to_dict(), indent=1))

    @classmethod
    def load(cls, path: PathLike) -> Benchmark:
        """Read what `save` wrote as .json; raises `InputError` where it is no such file."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content.pop("format") != FORMAT:
                raise ValueError("it has another format")
            return cls(
                machines={name: Machine.from_dict(facts) for name, facts in content["machines"].items()},
                rows=[Measurement.from_dict(row) for row in content["rows"]],
                baseline=content["baseline"],
                accuracies=content["accuracies"],
            )
        except OSError as error:
            raise InputError(f"'{path}' cannot be read: {error.strerror or error}.") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"'{path}' holds no benchmark of this version of refold ({error}); give a .json file that "
                "refold bench wrote."
            ) from error


def parse_baseline(text: str, configurations: Iterable[Configuration]) -> dict[str, str]:
    """What a baseline fixes of a configuration: model, form, engine, precision, execution or memory format, or several.

    Raises `InputError` where a part names none of those that occur, or two parts the same kind.
    """
    found: dict[str, str] = {}
    occurring: dict[str, set[str]] = {kind: set() for kind in _COMPARED}
    for configuration in configurations:
        for kind, names in occurring.items():
            names.add(getattr(configuration, kind))
    for part in (part.strip() for part in text.split(",")):
        kinds = [kind for kind, names in occurring.items() if part in names]
        if not kinds:
            choice = ", ".join(sorted(set().union(*occurring.values())))
            raise InputError(f"The baseline '{part}' was not measured; choose among: {choice}.")
        if kinds[0] in found:
            raise InputError(f"The baseline '{text}' names two of one kind ({kinds[0]}); name one.")
        found[kinds[0]] = part
    return found


def read_accuracies(path: PathLike) -> dict[str, float]:
    """Read accuracies by model name, from JSON (an object) or CSV (lines of name and number, a heading allowed).

    Raises `InputError` where the file has another content.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"'{path}' cannot be read: {error}.") from error
    advice = (
        f"'{path}' holds no accuracies; give JSON such as {{\"repvgg_a0\": 72.41}} or CSV lines name,accuracy"
    )
    if Path(path).suffix.lower() == ".json":
        try:
            content = json.loads(text)
        except ValueError as error:
            raise InputError(f"{advice}: {error}.") from error
        if not isinstance(content, Mapping):
            raise InputError(f"{advice}.")
        pairs = list(content.items())
    else:
        lines = [line for line in csv.reader(text.splitlines()) if line]
        # A name may hold a comma before the form; the number is the last field.
        pairs = [(",".join(part.strip() for part in line[:-1]), line[-1]) for line in lines]
        if pairs and not _is_number(pairs[0][1]):
            pairs = pairs[1:]
    wrong = next((f"{name}: {value}" for name, value in pairs if not _is_number(value)), None)
    if wrong is not None or not pairs:
        raise InputError(f"{advice}" + (f"; found '{wrong}'." if wrong else "."))
    return {str(name): float(value) for name, value in pairs}


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True
