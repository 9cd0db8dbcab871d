"""What a network answers, in float64 or its own dtype, and what its answers are made of before it decides."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from refold.folding.comparing import distance
from refold.recording.arguments import Arguments, copy_tensors, plain_mode, tensors_in
from refold.recording.precision import Exact, has_float64, in_float64, to_float64
from refold.recording.recording import name_of

_JUMPS = {"round", "floor", "ceil", "trunc", "sign", "floor_divide", "fix"}


@dataclass
class Answers:
    """The tensors that a network returned, in order, and what it decided by on the way.

    `decided` are the places of those that come from sorting, thresholds, top-k, suppression or rounding; `basis` what
    these looked at: tensors, and numbers beside them.
    """

    outputs: list[Tensor]
    decided: set[int] = field(default_factory=set)
    basis: list[Tensor | float] = field(default_factory=list)


@dataclass
class Comparison:
    """How far answers are from others: the largest relative difference, how many numbers were compared, how many were
    not finite and so were not, and how many tensors were compared through what they were decided by."""

    distance: float = 0.0
    compared: int = 0
    not_finite: int = 0
    decided: int = 0

    def add(self, other: Comparison) -> None:
        """Take in another comparison."""
        self.distance = max(self.distance, other.distance)
        self.compared += other.compared
        self.not_finite += other.not_finite
        self.decided += other.decided


def compare(expected: Answers, found: Answers, tolerance: float) -> Comparison:
    """How far `found` is from `expected`; outputs that were decided, and differ, through what they were decided by."""
    if len(expected.outputs) != len(found.outputs):
        return Comparison(float("inf"))
    result, pending = Comparison(), 0
    for index, (e, f) in enumerate(zip(expected.outputs, found.outputs, strict=True)):
        own = distance(e, f)
        if index in expected.decided | found.decided and (own > tolerance or not e.numel()):
            pending += 1
            continue
        result.add(_counted(e, own))
    if pending and not (expected.basis and len(expected.basis) == len(found.basis)):
        return Comparison(float("inf"))
    if pending:
        for was, now in zip(expected.basis, found.basis, strict=True):
            if isinstance(was, Tensor) and isinstance(now, Tensor):
                result.add(_counted(was, distance(was, now)))
            elif was != now:
                result.distance = float("inf")
        result.decided = pending
    return result


def _counted(expected: Tensor, own: float) -> Comparison:
    finite = int(torch.isfinite(expected).sum()) if expected.numel() else 0
    return Comparison(own, finite, expected.numel() - finite)


def answers(
    model: nn.Module,
    arguments: Arguments,
    *,
    float64: bool = False,
    exact: Exact | None = None,
    decisions: bool = False,
) -> Answers:
    """What the model returns in evaluation mode; it is run as a copy, for it may keep what it computes.

    Random numbers are the same in every run. Where the device has no float64, the copy is on the CPU.
    """
    model = shared_copy(model).eval()
    watch = _Decisions() if decisions else None
    with plain_mode(), _same_chance(), _eager_attention():
        if not float64:
            return Answers(_call(model, arguments, nullcontext()))
        model, arguments, exact = _where_float64_is(model, arguments, exact or {})
        arguments = to_float64(arguments)
        try:
            with in_float64(exact):
                found = _call(model, arguments, watch or nullcontext())
        except Exception:  # code that torch functions do not pass through, such as TorchScript
            found = _call(_doubled(model, exact), arguments, nullcontext())
    if watch is None:
        return Answers(found)
    return Answers(found, {i for i, value in enumerate(found) if watch.came_from(value)}, watch.basis)


def outputs(model: nn.Module, arguments: Arguments) -> list[Tensor]:
    """The tensors that the model returns in evaluation mode, in its own dtype."""
    return answers(model, arguments).outputs


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of all modules and buffers that still holds the same parameters: it needs no second set of weights."""
    known: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    modules = list(model.modules())
    for module in modules:
        for value in vars(module).values():
            if isinstance(value, Tensor) and value.grad_fn is not None:  # computed from parameters by a hook
                known[id(value)] = value.detach().clone()
    if any(
        isinstance(module, (fx.GraphModule, torch.jit.ScriptModule)) or _copies_itself(module)
        for module in modules
    ):
        return copy.deepcopy(model, known)
    # Module by module, since a whole network's deepcopy takes longer than its forward pass.
    made = {id(module): module.__class__.__new__(module.__class__) for module in modules}
    known |= made
    for module in modules:
        own = vars(made[id(module)])
        for name, value in vars(module).items():
            if name == "_modules":
                own[name] = {key: None if child is None else made[id(child)] for key, child in value.items()}
            elif name == "_parameters":
                own[name] = dict(value)
            elif value is None or isinstance(value, _PLAIN):
                own[name] = value
            elif isinstance(value, (dict, list, set)) and not value:
                own[name] = type(value)()
            else:
                own[name] = copy.deepcopy(value, known)
    return made[id(model)]


_PLAIN = (bool, int, float, str, torch.dtype, type)


def _copies_itself(module: nn.Module) -> bool:
    special = ("__deepcopy__", "__getstate__", "__reduce__")
    return any(getattr(type(module), name, None) is not getattr(nn.Module, name, None) for name in special)


def _call(model: nn.Module, arguments: Arguments, mode: Any) -> list[Tensor]:
    args, kwargs = copy_tensors(arguments)
    with mode:
        result = model(*args, **kwargs)
    return tensors_in(result)


@contextmanager
def _same_chance() -> Iterator[None]:
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        yield


@contextmanager
def _eager_attention() -> Iterator[None]:
    """Attention layers run operator by operator, as they are counted and recorded."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _where_float64_is(
    model: nn.Module, arguments: Arguments, exact: Exact
) -> tuple[nn.Module, Arguments, Exact]:
    values = [*model.parameters(), *model.buffers(), *tensors_in(arguments)]
    if all(has_float64(value.device) for value in values):
        return model, arguments, exact
    known: dict[int, Callable[[], Tensor]] = {}
    moved = copy.deepcopy(model).cpu()
    for old, new in zip(model.parameters(), moved.parameters(), strict=True):
        if id(old) in exact:
            known[id(new)] = lambda old=old: exact[id(old)]().cpu()  # type: ignore[misc]  # bound now, called later
    moved_arguments = tree_map(lambda v: v.cpu() if isinstance(v, Tensor) else v, arguments)
    return moved, moved_arguments, known


def _doubled(model: nn.Module, exact: Exact) -> nn.Module:
    doubled = copy.deepcopy(model).double()
    for rounded, parameter in zip(model.parameters(), doubled.parameters(), strict=True):
        if id(rounded) in exact:
            parameter.data = exact[id(rounded)]()
    return doubled


class _Decisions(TorchFunctionMode):
    """Follows what depends on a decision: on a whole number made of real ones, or rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.basis: list[Tensor | float] = []
        self._tainted: dict[int, weakref.ref[Tensor]] = {}

    def came_from(self, value: Tensor) -> bool:
        """Whether a tensor depends on a decision."""
        found = self._tainted.get(id(value))
        return found is not None and found() is value

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = name_of(func)
        results = list(_leaves(out))
        if name == "__get" or not any(isinstance(value, Tensor) for value in results):
            return out
        reads = list(_leaves((args, kwargs or {})))
        tensors = [value for value in reads if isinstance(value, Tensor)]
        real = [value for value in tensors if value.is_floating_point()]
        tainted = any(self.came_from(value) for value in tensors)
        decides = bool(real) and (
            name in _JUMPS or any(not v.is_floating_point() for v in results if isinstance(v, Tensor))
        )
        if decides and not tainted:
            self.basis += [v.detach().clone() for v in real]
            self.basis += [float(v) for v in reads if isinstance(v, (int, float)) and not isinstance(v, bool)]
        if decides or tainted:
            for value in results:
                if isinstance(value, Tensor) and (tainted or name in _JUMPS or not value.is_floating_point()):
                    self._tainted[id(value)] = weakref.ref(value)
        return out


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    else:
        yield value
