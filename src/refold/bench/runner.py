"""Measuring models side by side: every configuration takes its turn, round after round."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

from torch import nn

from refold.bench.breakdown import PROFILERS
from refold.bench.machine import Roof, clocks_now, this_machine
from refold.bench.results import (
    Benchmark,
    Configuration,
    Measurement,
    parse_baseline,
)
from refold.bench.roofline import least_work
from refold.bench.subjects import TRAINING, Files, Forms, Subject, subjects_of
from refold.bench.turns import TimingFailed, WorkerProcess, interleave, open_worker
from refold.bench.ways import CHANNELS_FIRST, CPU, EAGER, Way, ways
from refold.bench.worker import PYTORCH
from refold.errors import InputError, RefoldError, first_line
from refold.export.request import FLOAT32
from refold.files import PathLike, check_writable

# Called with what happens now, and the share of the work that is done.
BenchmarkProgress = Callable[[str, float], None]

# Every process holds an engine of its own; more at a time would crowd the memory.
_MOST_AT_ONCE = 24
_BYTES_OF_ONE = 3 * 2**28
_BYTES_OF_ONE_ON_A_CARD = 5 * 2**30


class BenchmarkInterrupted(KeyboardInterrupt):
    """Ctrl-C during a benchmark; `result` holds what was measured."""

    def __init__(self, result: Benchmark) -> None:
        super().__init__("interrupted")
        self.result = result


def benchmark(
    models: str | nn.Module | Iterable[str | nn.Module] | Mapping[str, str | nn.Module],
    *,
    forms: Forms = None,
    engine: str | Sequence[str] = "onnxruntime",
    batch_sizes: Sequence[int] = (1,),
    threads: Sequence[int] = (1,),
    precisions: Sequence[str] = (FLOAT32,),
    device: str = CPU,
    executions: Sequence[str] = (EAGER,),
    memory_formats: Sequence[str] = (CHANNELS_FIRST,),
    input_size: Sequence[int] | None = None,
    rounds: int = 30,
    warm_up: int = 5,
    baseline: str | None = None,
    breakdown: bool = False,
    roofline: bool = False,
    output: PathLike | None = None,
    resume: bool = False,
    machine: str | None = None,
    note: str = "",
    time_limit: float = 120.0,
    on_progress: BenchmarkProgress | None = None,
) -> Benchmark:
    """Measure models x forms x engines x precisions x batch sizes x threads, each in its own process, taking turns.

    `models` are names, modules, or a mapping from the name to show to either. `forms` are of "training",
    "plain" and "shortcut-folded" (`refold.fold` with `shortcuts="fold", objective="operators"`), or such a list
    for each model by name; by default a name is measured in the first two and a module as it is. `engine` is
    one or several of "pytorch" and those of `refold.export`, or "all", `precisions` of "float32", "float16",
    "int8" (ranges of random images: what `refold.quantize` is for shows in time and memory alone here) and, on a
    card, "tf32". PyTorch runs on the `device` "cpu" or "cuda", with `executions` of "eager", "compiled"
    (`torch.compile`) and "graphs" (CUDA graphs), and `memory_formats` of "channels_first" and "channels_last".
    `input_size` is (channels, height, width), by default the model's own. After `warm_up` rounds, `rounds`
    rounds are measured in which every configuration has one turn of about 10 ms. `baseline` is what the rows
    are compared with (see `Benchmark`), by default the training form if it is measured. `breakdown` adds the
    time by kind of operator, `roofline` the roofs of the machine and the floor of every model. `machine` is the
    name under which the results stand, by default the processor's or the card's; `note` is kept with its facts.

    `output` is a .json file that is written as the run goes; with `resume` what it holds already is not measured
    again. A configuration that cannot be prepared, crashes, or is silent for `time_limit` seconds becomes a row
    with the reason as its `error`, and the run goes on.

    Raises `InputError` for arguments that make no sense, `BenchmarkInterrupted` (a `KeyboardInterrupt`) with what
    was measured on Ctrl-C.

    Examples:
        >>> import refold
        >>> found = refold.benchmark("repghostnet_050", engine="pytorch", input_size=(3, 32, 32), rounds=3)
        >>> [row.configuration.form for row in found.rows]
        ['training', 'plain']
    """
    for name, value, least in (("rounds", rounds, 1), ("warm_up", warm_up, 0), ("time_limit", time_limit, 1)):
        if value < least:
            raise InputError(f"{name} is {value}; give at least {least}.")
    for name, values in (("batch_sizes", batch_sizes), ("threads", threads)):
        if not values or min(values) < 1:
            raise InputError(f"{name} is {list(values)}; give one or more numbers from 1 on.")
    chosen = ways(engine, precisions, device, executions, memory_formats)
    if roofline and device != CPU:
        raise InputError("The roofline is that of the processor; leave it out, or choose the device cpu.")
    if output is not None and Path(output).suffix.lower() != ".json":
        raise InputError(f"The results are kept in a .json file as the run goes, not in '{output}'.")
    if output is not None:
        check_writable(output)
    if resume and output is None:
        raise InputError(
            "There is nothing to resume from; name the .json file of the run that was interrupted."
        )
    subjects = subjects_of(models, forms)
    size = None if input_size is None else tuple(input_size)
    plan = _Plan(subjects, chosen, tuple(batch_sizes), tuple(threads), size)
    result = (
        Benchmark.load(output) if resume and output is not None and Path(output).exists() else Benchmark()
    )
    has_training_form = any(TRAINING in subject.forms for subject in subjects)
    result.baseline = baseline or result.baseline or (TRAINING if has_training_form else None)
    run = _Run(
        result=result,
        machine="",
        plan=plan,
        rounds=rounds,
        warm_up=warm_up,
        breakdown=breakdown,
        roofline=roofline,
        output=output,
        time_limit=time_limit,
        report=on_progress or (lambda text, share: None),
    )
    if result.baseline is not None:
        parse_baseline(result.baseline, run.named())
    facts = this_machine(note, device)
    run.machine = result.add_machine(machine or facts.name, facts)
    try:
        run.everything()
    except KeyboardInterrupt:
        raise BenchmarkInterrupted(result) from None
    return result


def _configuration(
    subject: Subject, form: str, way: Way, batch_size: int = 0, threads: int = 0, size: tuple[int, ...] = ()
) -> Configuration:
    return Configuration(
        subject.name, form, batch_size=batch_size, threads=threads, input_size=size, **vars(way)
    )


@dataclass(frozen=True)
class _Plan:
    subjects: list[Subject]
    ways: tuple[Way, ...]
    batch_sizes: tuple[int, ...]
    threads: tuple[int, ...]
    input_size: tuple[int, ...] | None


@dataclass
class _Run:
    """One call of `benchmark`."""

    result: Benchmark
    machine: str
    plan: _Plan
    rounds: int
    warm_up: int
    breakdown: bool
    roofline: bool
    output: PathLike | None
    time_limit: float
    report: BenchmarkProgress

    def named(self) -> list[Configuration]:
        """What is measured in this run and what was before, for the names that occur."""
        names = [
            _configuration(subject, form, way)
            for subject in self.plan.subjects
            for form in subject.forms
            for way in self.plan.ways
        ]
        return names + [row.configuration for row in self.result.rows]

    def everything(self) -> None:
        """Measure group by group; what takes turns has the same batch size and threads."""
        self._measure_roofs()
        groups = list(self._groups())
        steps = sum(len(group) * self._steps for group in groups)
        done = 0
        with Files() as files:
            for group in groups:
                _Group(self, files, group, partial(self._report_step, done, steps)).measure()
                done += len(group) * self._steps
        self.keep()
        self.report("measured", 1.0)

    @property
    def _steps(self) -> int:
        # One to prepare, one to ask for memory and breakdown, and the turns between.
        return 2 + self.warm_up + self.rounds

    def _report_step(self, before: int, all_steps: int, step: int, text: str) -> None:
        self.report(text, (before + step) / all_steps)

    def keep(self) -> None:
        """Write what there is."""
        if self.output is not None:
            self.result.save(self.output)

    def roof(self, threads: int) -> Roof | None:
        """The roofs with this many threads, None where they are not asked for."""
        return self.result.machines[self.machine].roofs.get(threads) if self.roofline else None

    def _measure_roofs(self) -> None:
        roofs = self.result.machines[self.machine].roofs
        for threads in self.plan.threads if self.roofline else ():
            if threads in roofs:
                continue
            self.report(
                f"measuring the roofline peaks with {threads} thread{'s' if threads > 1 else ''}", 0.0
            )
            worker = WorkerProcess(threads, self.time_limit)
            try:
                measured = worker.ask("roof", threads=threads)
            finally:
                worker.close()
            roofs[threads] = Roof.from_dict(measured)

    def _groups(self) -> Iterator[list[tuple[Subject, Configuration]]]:
        for threads, batch_size in product(self.plan.threads, self.plan.batch_sizes):
            # Engine by engine: where a group is too large for one run, engines are parted rather than forms.
            wanted = [
                (subject, key)
                for way in self.plan.ways
                for subject in self.plan.subjects
                for size in [self._size_of(subject)]
                for form in subject.forms
                if not self._is_complete(key := _configuration(subject, form, way, batch_size, threads, size))
            ]
            at_once = self._at_once()
            for start in range(0, len(wanted), at_once):
                yield wanted[start : start + at_once]

    def _at_once(self) -> int:
        machine = self.result.machines[self.machine]
        fitting = (machine.memory or _MOST_AT_ONCE * _BYTES_OF_ONE) // _BYTES_OF_ONE
        if machine.gpu is not None:
            fitting = min(fitting, machine.gpu.memory // _BYTES_OF_ONE_ON_A_CARD)
        return max(2, min(_MOST_AT_ONCE, fitting))

    def note_clocks(self) -> None:
        """Ask the card for its clocks while the processes that kept it busy still hold it."""
        machine = self.result.machines[self.machine]
        if machine.gpu is not None:
            gpu = dataclasses.replace(machine.gpu, clocks=clocks_now())
            self.result.machines[self.machine] = dataclasses.replace(machine, gpu=gpu)

    def _size_of(self, subject: Subject) -> tuple[int, ...]:
        try:
            return subject.input_size(self.plan.input_size)
        except (RuntimeError, MemoryError):
            # A model that the memory has no room for; its row will say so.
            return self.plan.input_size or ()

    def _is_complete(self, key: Configuration) -> bool:
        row = self.result.find(self.machine, key)
        if row is None or len(row.samples) < self.rounds:
            return False
        tells = key.engine in PROFILERS or (key.engine == PYTORCH and key.execution == EAGER)
        told_apart = row.breakdown is not None or not tells
        has_floor = row.floor is not None
        return (told_apart or not self.breakdown) and (has_floor or not self.roofline)


class _Group:
    """Configurations that take turns with each other, from opening to closing."""

    def __init__(
        self,
        run: _Run,
        files: Files,
        members: Sequence[tuple[Subject, Configuration]],
        on_step: Callable[[int, str], None],
    ) -> None:
        self._run, self._files = run, files
        self._subjects = {key: subject for subject, key in members}
        self._on_step = on_step
        self._step = 0
        self._failures: dict[Configuration, str] = {}
        self._workers: dict[Configuration, WorkerProcess] = {}
        self._rows = self._begun()
        self._samples = {key: list(row.samples) for key, row in self._rows.items()}

    def _begun(self) -> dict[Configuration, Measurement]:
        """The rows of an interrupted run of the same configurations, else empty rows of a new one."""
        machine, find = self._run.machine, self._run.result.find
        found = {key: row for key in self._subjects if (row := find(machine, key)) is not None}
        if len(found) == len(self._subjects) and len({(r.run, len(r.samples)) for r in found.values()}) == 1:
            return found
        name = f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {os.urandom(2).hex()}"
        return {key: Measurement(machine, key, name) for key in self._subjects}

    def measure(self) -> None:
        """Prepare, take turns, ask for the rest; what was measured becomes rows however this ends."""
        run = self._run
        rounds = max(0, run.rounds - min(map(len, self._samples.values())))
        try:
            for key in self._subjects:
                self._say(f"preparing {key}")
                self._guarded(key, self._prepare)
            text = f"{len(self._workers)} in turn, batch {key.batch_size}, threads {key.threads}"
            interleave(
                self._workers,
                rounds=rounds,
                warm_up=run.warm_up if rounds else 1,
                samples=self._samples,
                failures=self._failures,
                on_round=lambda: self._say(text, len(self._subjects)),
            )
            run.note_clocks()
            for key in set(self._workers) - set(self._failures):
                self._say(f"asking {key}")
                self._guarded(key, self._ask)
        finally:
            for worker in self._workers.values():
                worker.close()
            self._enter()
            run.keep()

    def _guarded(self, key: Configuration, action: Callable[[Configuration], None]) -> None:
        try:
            action(key)
        except TimingFailed as error:
            self._failures.setdefault(key, str(error))
        except (RefoldError, RuntimeError, MemoryError) as error:
            self._failures.setdefault(key, f"it cannot be prepared: {first_line(error)}")

    def _prepare(self, key: Configuration) -> None:
        subject, run = self._subjects[key], self._run
        images = subject.example(key.form, key.batch_size, key.input_size)
        cost = subject.cost(key.form, key.input_size)
        model = subject.model(key.form, key.input_size)
        self._rows[key] = dataclasses.replace(
            self._rows[key],
            parameters=cost.parameters,
            macs=cost.macs,
            operators=cost.operator_count,
            work=least_work(model, images, run.roof(key.threads)) if run.roofline else None,
        )
        path = self._files.path(subject, key.form, key.engine, images, key.way.stored)
        self._workers[key] = open_worker(
            key.engine,
            path,
            threads=key.threads,
            shape=tuple(images.shape),
            dtype=str(images.dtype).removeprefix("torch."),
            time_limit=run.time_limit,
            **key.way.of_pytorch,
        )

    def _ask(self, key: Configuration) -> None:
        worker = self._workers[key]
        # Before the breakdown, whose records take memory too.
        self._rows[key] = dataclasses.replace(self._rows[key], peak_memory=worker.ask("memory"))
        if self._run.breakdown:
            self._rows[key] = dataclasses.replace(self._rows[key], breakdown=worker.ask("breakdown"))

    def _enter(self) -> None:
        for key, row in self._rows.items():
            error = self._failures.get(key)
            samples = tuple(round(sample, 5) for sample in self._samples[key])
            if samples or error is not None:
                # A breakdown that fails leaves the latency valid.
                self._run.result.put(dataclasses.replace(row, samples=samples, error=error))

    def _say(self, text: str, steps: int = 1) -> None:
        self._on_step(self._step, text)
        self._step += steps
