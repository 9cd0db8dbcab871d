"""Carry a fold out: choose and prove rewrites, write them into a copy, and give up those alone that do not work."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from refold.errors import NotFoldable, first_line
from refold.folding.answers import shared_copy
from refold.folding.changes import Change, apply
from refold.folding.planning import Planner
from refold.folding.reasons import reason_left
from refold.folding.rewrite import Memory, NewLayer, Rewrite, make
from refold.folding.writing import CannotWrite, changes_of
from refold.recording.arguments import Arguments, copy_tensors, plain_mode, tensors_in
from refold.recording.cost import Cost, Counting
from refold.recording.operators import is_batch_norm
from refold.recording.precision import release_memory
from refold.recording.recording import path_of

Pass = Callable[[Planner], list[Rewrite]]
"""From a recorded model to what may be computed in another way in it."""

_KEPT_BYTES = 32 * 2**20
"""How much of the new layers in float64 is kept from their own proof to that of the network."""


@dataclass
class Attempt:
    """A fold of one recorded model: the rewrites that are in effect, the plain model, and what it answers and costs."""

    planner: Planner
    original: nn.Module
    tolerance: float | None
    """To which rewrites are proved; None for not at all."""
    rewrites: list[Rewrite] = field(default_factory=list)
    proved: dict[int, float] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    model: nn.Module = field(default_factory=nn.Identity)
    answers: list[Tensor] = field(default_factory=list)
    cost: Cost | None = None
    _plan: tuple[Sequence[Rewrite], list[Change]] = field(default_factory=lambda: ((), []))
    _made: dict[object, Rewrite] = field(default_factory=dict)
    _memory: Memory = field(default_factory=lambda: Memory(_KEPT_BYTES))

    def carry_out(self, passes: Sequence[Pass], *, may_cost: bool) -> None:
        """Put into effect as much of what the passes find as can be proved and written, runs, and costs no more."""
        self.rewrites = self._writable(passes)
        before = self.planner.recorded.cost
        try:
            self._write(self.rewrites, simplify=True)
        except _DoesNotRun:
            self.rewrites = self._running(self.rewrites)
        if not may_cost and self.cost is not None and self.cost.macs > before.macs:
            self.notes.append(
                f"less was folded: it would have taken {self.cost.macs:,} multiply-accumulates, not {before.macs:,}"
            )
            self.rewrites = self._no_dearer(self.rewrites, before.macs)

    def layers(self) -> list[NewLayer]:
        """All new layers that are in effect."""
        return [layer for rewrite in self.rewrites for layer in rewrite.layers]

    def settle(self) -> None:
        """Give the plain model tensors of its own, new ones frozen and laid out in memory as those they replace."""
        last = _channels_last(self.original)
        for rewrite in self.rewrites:
            frozen = _frozen(self.planner, rewrite)
            for layer in rewrite.layers:
                for value in layer.module.parameters():
                    value.requires_grad_(not frozen)
                    if last and value.dim() == 4:
                        value.data = value.data.contiguous(memory_format=torch.channels_last)
        shared = {id(parameter) for parameter in self.original.parameters()}
        copies: dict[int, nn.Parameter] = {}
        for module in self.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) in shared:
                    module._parameters[name] = copies.setdefault(id(parameter), copy.deepcopy(parameter))

    def left(self) -> list[tuple[str, str]]:
        """Every batch norm that stays, and every module whose code is not looked across, with the reason."""
        planner, recording = self.planner, self.planner.recording
        reasons = [
            (scope[-1].path or "the whole model", reason)
            for scope, reason in recording.guarded.items()
            if scope[-1].path or not scope[-1].hooks  # around the model nothing is folded anyway
        ]
        reasons += [
            (str(n.target), "it is compiled (TorchScript)")
            for n in planner.graph.nodes
            if n.op == "call_module" and isinstance(planner.use(n).module, torch.jit.ScriptModule)
        ]
        folded = {node for rewrite in self.rewrites for node in rewrite.operators}
        norms = [n for n in planner.graph.nodes if n in recording.varying and is_batch_norm(planner.use(n))]
        reasons += [(_name(n), reason_left(n, planner)) for n in norms if n not in folded]
        seen = {_name(node) for node in norms} | set(recording.readers)
        seen |= {str(n.target) for n in planner.graph.nodes if n.op == "call_module"}
        for name, module in self.original.named_modules():
            around = {name[:i] for i, letter in enumerate(name) if letter == "."}
            if name and isinstance(module, _BatchNorm) and name not in seen and not around & seen:
                reasons.append((name, "it does not run on the example input"))
        reasons += [(n, "its weights are changed while the network runs") for n in self._written_layers()]
        return list(dict.fromkeys(reasons))

    def _written_layers(self) -> list[str]:
        called = {str(node.target) for node in self.planner.graph.nodes if node.op == "call_module"}
        owners = {name.rpartition(".")[0] for name in self.planner.recording.written}
        return sorted(called & owners)

    def _writable(self, passes: Sequence[Pass]) -> list[Rewrite]:
        """The rewrites that hold their proof and can be written; where one is refused, the next best in its place."""
        barred: set[object] = set()
        while True:
            planned = [rewrite for find in passes for rewrite in find(self.planner)]
            found, refused = self._proved([rewrite for rewrite in planned if rewrite.key not in barred])
            if not refused:
                try:
                    self._plan = (found, changes_of(self.planner, found, simplify=True))
                    return found
                except CannotWrite as error:
                    refused = {rewrite.key: error.reason for rewrite in error.rewrites}
                    for rewrite in error.rewrites:
                        self._refuse(rewrite, error.reason)
            # Where nothing else is planned in its place, what was refused before is not asked for again.
            barred |= refused.keys() & self.planner.excluded
            self.planner.excluded |= refused.keys()
            self.planner.forget(refused)

    def _proved(self, rewrites: list[Rewrite]) -> tuple[list[Rewrite], dict[object, str]]:
        found, refused = list[Rewrite](), dict[object, str]()
        # From the end on, where layers are largest as a rule: little else is in memory then.
        for rewrite in reversed(rewrites):
            place = (rewrite.key, tuple(rewrite.operators), tuple(rewrite.steps))
            if place in self._made:
                found.append(self._made[place])
                continue
            try:
                distance = make(rewrite, self.planner.constants, self.tolerance, self._memory)
            except NotFoldable as refusal:
                refused[rewrite.key] = str(refusal)
                self._refuse(rewrite, str(refusal))
                continue
            self._made[place] = rewrite
            if distance is not None:
                self.proved[id(rewrite)] = distance
            found.append(rewrite)
            release_memory()
        return found[::-1], refused

    def _refuse(self, rewrite: Rewrite, reason: str) -> None:
        self.planner.refusals.update(dict.fromkeys(rewrite.operators, reason))

    def _write(self, rewrites: Sequence[Rewrite], *, simplify: bool) -> None:
        """Write rewrites into a fresh copy and run it. Raises _DoesNotRun, and CannotWrite."""
        known, planned = self._plan
        if not simplify or rewrites is not known:
            planned = changes_of(self.planner, rewrites, simplify=simplify)
        self.changes = [*self._without_training_only(), *planned]
        self._say_what_runs_apart()
        model = shared_copy(self.original).eval()
        self.model = model = apply(model, self.changes)
        self.answers, self.cost = run_counted(model, self.planner.recording.arguments)

    def _without_training_only(self) -> list[Change]:
        """Leave out what modules call their ``training_only`` parts, where it did not run."""
        ran = {str(node.target) for node in self.planner.graph.nodes if node.op == "call_module"}
        parts = [
            f"{path}.{name}".lstrip(".")
            for path, module in self.original.named_modules()
            for name in getattr(module, "training_only", ())
            if next(module.get_submodule(name).parameters(), None) is not None
        ]
        unused = [part for part in parts if not any(f"{name}.".startswith(f"{part}.") for name in ran)]
        if unused:
            note = f"left out, since it runs in training only: {', '.join(unused)}"
            self.notes += [note] if note not in self.notes else []
        return [Change(part, layer=nn.Identity()) for part in unused]

    def _say_what_runs_apart(self) -> None:
        """Note the parts that modules call ``runs_apart``, of which the forward pass is not made."""
        parts = [
            f"{path}.{name}".lstrip(".")
            for path, module in self.original.named_modules()
            for name in getattr(module, "runs_apart", ())
        ]
        if parts:
            note = f"left as it is, since it runs behind the forward pass: {', '.join(parts)}"
            self.notes += [note] if note not in self.notes else []

    def _running(self, rewrites: list[Rewrite]) -> list[Rewrite]:
        """As many rewrites as leave a network that runs: code around a folded block may ask for what is gone."""
        good: list[Rewrite] = []
        waiting = [rewrites]
        while waiting:
            chunk = waiting.pop()
            try:
                self._write([*good, *chunk], simplify=False)
                good += chunk
            except (_DoesNotRun, CannotWrite) as error:
                if len(chunk) > 1:
                    waiting += [chunk[len(chunk) // 2 :], chunk[: len(chunk) // 2]]
                elif chunk:
                    note = f"less was folded: the rewritten network did not run ({error})"
                    self.notes += [note] if note not in self.notes else []
                    self._refuse(chunk[0], f"the network does not run with it folded ({error})")
        self._write(good, simplify=False)
        return good

    def _no_dearer(self, rewrites: list[Rewrite], macs: int) -> list[Rewrite]:
        """Those rewrites, in their order, with which the network takes no more multiply-accumulates than before."""
        good: list[Rewrite] = []
        for rewrite in rewrites:
            self._write([*good, rewrite], simplify=True)
            assert self.cost is not None
            if self.cost.macs <= macs:
                good.append(rewrite)
            else:
                self._refuse(rewrite, "it would take more multiply-accumulates")
        self._write(good, simplify=True)
        return good


class _DoesNotRun(Exception):
    """The rewritten network does not run on the example."""


def run_counted(model: nn.Module, arguments: Arguments) -> tuple[list[Tensor], Cost]:
    """What a copy of the model answers, and what that costs. Raises _DoesNotRun."""
    counting = Counting()
    copied = shared_copy(model).eval()
    try:
        with plain_mode(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            args, kwargs = copy_tensors(arguments)
            with counting:
                result = copied(*args, **kwargs)
        return tensors_in(result), counting.cost(model)
    except Exception as error:
        raise _DoesNotRun(first_line(error)) from error


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else path_of(node) or "the whole model"


def _channels_last(model: nn.Module) -> bool:
    maps = [value for value in model.parameters() if value.dim() == 4]
    last = all(value.is_contiguous(memory_format=torch.channels_last) for value in maps)
    return last and any(not value.is_contiguous() for value in maps)


def _frozen(planner: Planner, rewrite: Rewrite) -> bool:
    """Whether none of the parameters that a rewrite takes up was to be trained."""
    recording, found = planner.recording, list[nn.Parameter]()
    waiting, seen = list(rewrite.nodes | set(rewrite.steps)), set[fx.Node]()
    while waiting:
        node = waiting.pop()
        if node.op == "call_module":
            found += recording.attribute(str(node.target)).parameters()
        elif node.op == "get_attr" and isinstance(recording.attribute(str(node.target)), nn.Parameter):
            found.append(recording.attribute(str(node.target)))
        for value in node.all_input_nodes:
            if value not in recording.varying and value not in seen:
                seen.add(value)
                waiting.append(value)
    return bool(found) and not any(value.requires_grad for value in found)
