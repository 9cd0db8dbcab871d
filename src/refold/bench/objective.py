"""The latency on an engine as an objective of folding: exact rewrites are measured, and those that pay are kept."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from refold.bench.timing import Timing
from refold.bench.turns import TimedNetwork, TimingFailed, WorkerProcess, interleave
from refold.bench.ways import engine_names
from refold.bench.worker import PYTORCH
from refold.errors import InputError, first_line
from refold.export import FORMATS, Request, get_engine
from refold.folding import Decision, fold
from refold.folding.alternatives import Alternative
from refold.folding.fold import Shortcuts

Progress = Callable[[str], None]

_MARGIN = 0.01
"""What a rewrite must gain, beyond twice the standard error of the ratio, to be kept."""
_ROUNDS, _WARM_UP = 24, 3
_UNDONE = "all was undone"
_CHANNELS_LAST = (PYTORCH, "aotinductor")
"""The engines that take the memory layout of the network's weights."""


class Stopwatch(Protocol):
    """Times networks side by side."""

    def __call__(self, networks: Sequence[nn.Module], example: Tensor) -> tuple[Timing, ...]:
        """One timing for each; raises `TimingFailed` where one cannot be written for the engine or run."""


class EngineStopwatch:
    """Times networks in one engine, each in a worker process, which the next to be timed takes over."""

    def __init__(
        self, engine: str, *, threads: int = 1, rounds: int = _ROUNDS, time_limit: float = 120.0
    ) -> None:
        self.engine, self.threads = engine, threads
        self._rounds, self._time_limit = rounds, time_limit
        self._workers: list[WorkerProcess] = []

    def __enter__(self) -> EngineStopwatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.close()

    def __call__(self, networks: Sequence[nn.Module], example: Tensor) -> tuple[Timing, ...]:
        """Export the networks for inputs of the example's shape and let them take turns."""
        with tempfile.TemporaryDirectory(prefix="refold-latency-") as folder:
            files = []
            for index, network in enumerate(networks):
                place = Path(folder) / str(index)
                place.mkdir()
                files.append(_written(network, place, self.engine, example))
            while len(self._workers) < len(networks):
                self._workers.append(WorkerProcess(self.threads, self._time_limit))
            workers: dict[int, TimedNetwork] = dict(enumerate(self._workers[: len(networks)]))
            try:
                return self._timed(workers, files, example)
            except TimingFailed:
                for worker in self._workers:  # some may have ended
                    worker.close()
                self._workers.clear()
                raise

    def _timed(
        self, workers: dict[int, TimedNetwork], files: list[Path], example: Tensor
    ) -> tuple[Timing, ...]:
        shape, dtype = list(example.shape), str(example.dtype).removeprefix("torch.")
        for worker, path in zip(self._workers, files, strict=False):
            given = {"path": str(path), "threads": self.threads, "shape": shape, "dtype": dtype}
            worker.ask("open", engine=self.engine, **given)
        samples: dict[int, list[float]] = {index: [] for index in workers}
        failures: dict[int, str] = {}
        interleave(workers, rounds=self._rounds, warm_up=_WARM_UP, samples=samples, failures=failures)
        if failures:
            raise TimingFailed(next(iter(failures.values())))
        return tuple(Timing(tuple(samples[index])) for index in workers)


@dataclass
class LatencyJudge:
    """Chooses by the clock, and keeps the account."""

    time: Stopwatch
    report: Progress = lambda text: None
    decisions: list[Decision] = field(default_factory=list)
    _known: dict[str, tuple[Timing, ...] | str] = field(default_factory=dict)
    """What was measured, or why it was not, by what the parts compute."""

    def __call__(self, alternatives: Sequence[Alternative]) -> Alternative | None:
        """The fastest of several ways to compute the same part where it pays, None where none does."""
        first = alternatives[0]
        self.report(f"{first.kind} in {first.path or 'the whole network'}: {first.change}")
        found: Alternative | None = None
        best = math.inf
        measured = [self._timings(alternative) for alternative in alternatives]
        for alternative, timings in zip(alternatives, measured, strict=True):
            if isinstance(timings, str):
                continue
            before, after = timings
            if after.pays(before, _MARGIN) and after.ratio_to(before) < best:
                found, best = alternative, after.ratio_to(before)
        for alternative, timings in zip(alternatives, measured, strict=True):
            own = (alternative.path, alternative.kind, alternative.change)
            if isinstance(timings, str):
                self.decisions.append(Decision(*own, kept=False, note=timings))
            else:
                self.decisions.append(Decision(*own, alternative is found, *_figures(*timings)))
        return found

    def _timings(self, alternative: Alternative) -> tuple[Timing, ...] | str:
        networks = [alternative.before(), alternative.after()]
        key = f"{alternative.shape} {alternative.dtype} {[fingerprint(network) for network in networks]}"
        if key not in self._known:
            try:
                self._known[key] = self.time(networks, _random(alternative.shape, alternative.dtype))
            except TimingFailed as error:
                self._known[key] = str(error)
        return self._known[key]


@dataclass(frozen=True)
class Latency:
    """The time that one call of a network takes on an engine, as the objective of a fold.

    `refold.fold(model, example, objective=Latency("onnxruntime", threads=1))` rewrites the plain network further,
    exactly and proved, wherever that is faster on `engine` ("pytorch" and those of `refold.export`) with `threads`
    threads: shortcuts are folded, concatenations sink into the convolutions behind them, 1x1 convolutions of one pixel
    and linear layers take each other's place. Each is measured by itself, on the size of the example, a single batch
    of images, and kept where it gains more than 1% and noise; at the end the whole network is measured, and if it is
    not faster all is undone. `fold_report.decisions` has the figures. Measuring takes minutes; `on_progress` is told
    what is measured, and what does not answer within `time_limit` seconds is left as it was. `stopwatch` times
    networks in another way than in the engine.

    Raises `InputError` where the engine is unknown or not installed.

    Examples:
        >>> import torch, refold
        >>> net = refold.create_model("ghostnet_050", num_classes=2)
        >>> objective = refold.Latency("pytorch", threads=1)
        >>> plain = refold.fold(net, torch.randn(1, 3, 32, 32), objective=objective)
    """

    engine: str = "onnxruntime"
    threads: int = 1
    time_limit: float = 120.0
    on_progress: Progress = lambda text: None
    stopwatch: Stopwatch | None = None

    def __post_init__(self) -> None:
        (name, *others) = engine_names(self.engine)
        if others:
            raise InputError("The latency can be that of one engine only; name one.")
        if name != PYTORCH:
            get_engine(name)

    def fold(
        self, model: nn.Module, example_input: Any, *, prove: bool, shortcuts: Shortcuts, tolerance: float
    ) -> nn.Module:
        """The plain network with what pays on the engine; `refold.fold` calls it."""
        if self.stopwatch is not None:
            return self._fold(model, example_input, self.stopwatch, prove, shortcuts, tolerance)
        with EngineStopwatch(self.engine, threads=self.threads, time_limit=self.time_limit) as stopwatch:
            return self._fold(model, example_input, stopwatch, prove, shortcuts, tolerance)

    def _fold(
        self,
        model: nn.Module,
        example_input: Any,
        time: Stopwatch,
        prove: bool,
        shortcuts: Shortcuts,
        tolerance: float,
    ) -> nn.Module:
        image = _one_image(example_input)
        judge = LatencyJudge(time, self.on_progress)
        options: dict[str, Any] = {"shortcuts": shortcuts, "tolerance": tolerance}
        found = fold(model, image, prove=prove, rewrites=judge, **options)
        account: Any = found.fold_report
        if account.options.get("rewrites"):
            self.on_progress("the whole network")
            plain = fold(model, image, prove=False, **options)
            whole = _whole(time, [plain, found], image, "all that was kept")
            judge.decisions.append(whole)
            if not whole.kept:
                found = fold(model, image, prove=prove, **options)
                account = found.fold_report
                account.notes.append(f"{_UNDONE}: the whole network was not faster")
                judge.decisions = [
                    replace(d, kept=False, note=_UNDONE) if d.kept else d for d in judge.decisions
                ]
        if self.engine in _CHANNELS_LAST:
            self.on_progress("channels last")
            last = copy.deepcopy(found).to(memory_format=torch.channels_last)
            whole = _whole(time, [found, last], image, "channels last in memory")
            judge.decisions.append(whole)
            found = last if whole.kept else found
            account = found.fold_report
        account.decisions = judge.decisions
        account.measured = {"engine": self.engine, "threads": self.threads}
        return found


def _written(network: nn.Module, folder: Path, engine: str, example: Tensor) -> Path:
    """A file for the engine, not compared with PyTorch: the parts are proved, and no file outlives its measurement."""
    path = folder / f"net{'.pt' if engine == PYTORCH else FORMATS[engine].suffix}"
    try:
        if engine == PYTORCH:
            torch.save(network, path)
        else:
            get_engine(engine).write(network, Request((example,), path))
    except Exception as error:  # converters and pickle raise what they like; the part is left as it was
        raise TimingFailed(f"it cannot be written for {engine}: {first_line(error)}") from error
    return path


def _whole(time: Stopwatch, networks: Sequence[nn.Module], image: Tensor, change: str) -> Decision:
    try:
        before, after = time(networks, image)
    except TimingFailed as error:
        return Decision("", "whole network", change, kept=False, note=str(error))
    kept = after.ratio_to(before) < 1 and after.pays(before, margin=0.0)
    return Decision("", "whole network", change, kept, *_figures(before, after))


def _figures(before: Timing, after: Timing) -> tuple[float, float, float]:
    return before.median, after.median, after.ratio_to(before)


def _one_image(example_input: Any) -> Tensor:
    values = example_input if isinstance(example_input, tuple) else (example_input,)
    if len(values) != 1 or not isinstance(values[0], Tensor):
        raise InputError(
            f"The latency can be measured where the model takes one tensor; the example has {len(values)} arguments. "
            "Fold with objective='macs'."
        )
    return values[0]


def _random(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def fingerprint(network: nn.Module) -> str:
    """The operators of a traced network and the shapes of their weights: equal for parts that take equally long."""
    if not isinstance(network, fx.GraphModule):
        return f"{id(network)}"
    order = {node: index for index, node in enumerate(network.graph.nodes)}
    lines = []
    for node in network.graph.nodes:
        what = str(getattr(node.target, "__name__", node.target))
        if node.op == "call_module":
            what = repr(network.get_submodule(what))
        given = fx.node.map_arg((node.args, node.kwargs), lambda value: f"%{order[value]}")
        lines.append(f"{node.op} {what if node.op != 'get_attr' else ''} {given}")
    return "\n".join(lines)
