"""`fold` and `verify`: the whole way from any model to a plain one that is proved to compute the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from refold.errors import InputError, first_line
from refold.folding.attempt import Attempt, Finder
from refold.folding.cost import count
from refold.folding.edits import Extent
from refold.folding.proof import (
    LARGEST_DISTANCE,
    Proof,
    outputs,
    own_distances,
    prove_float64,
    require_close,
    require_same,
    require_stable,
    sensitivity,
    shared_copy,
)
from refold.folding.regions import region_candidates
from refold.folding.report import FoldReport
from refold.folding.rewrites import SHORTCUT, Chosen, Judge, by_name, finders
from refold.folding.shortcuts import shortcut_candidates
from refold.folding.tracing import Arguments, copy_tensors, plain_mode

Objective = Literal["macs", "operators"]
Shortcuts = Literal["keep", "fold"]

_NO_SHORTCUT = (
    "no shortcut was folded: none leads around a chain of convolutions through the same activations"
)


def fold(
    model: nn.Module,
    example_input: Any,
    *,
    prove: bool = True,
    objective: Objective = "macs",
    shortcuts: Shortcuts = "keep",
    rewrites: Judge | Sequence[str] = (),
) -> nn.Module:
    """A plain network that computes what `model` computes in evaluation mode, every linear part one layer.

    `example_input` is what the model is called with: a tensor, `[batch, channels, *size]` as a rule, or the tuple of
    positional arguments. The model is left untouched; the result keeps its class, dtype, device and methods, is in
    evaluation mode, and carries a `FoldReport` as `fold_report`. With `prove` (the default) every region is proved in
    float64, borders included, at two sizes, and then the whole network.

    No fold may raise the multiply-accumulates, unless the `objective` is "operators": then those of depthwise
    convolutions, which memory holds up rather than arithmetic, do not count, and depthwise kernels of several sizes,
    each for a part of the channels, become one (RepNeXt, eq. 2).
    `shortcuts="fold"` also takes each shortcut around a chain of convolutions into them, wherever it passes through
    the chain's activations, at the price of more channels (RepNeXt, eq. 5 to 8).

    `rewrites` chooses among exact rewrites that pay on some engines only (`refold.folding.rewrites`): a function that
    is shown every alternative, or the names of those to take. `refold.fold(objective="latency")` passes a function
    that measures them.

    Raises `InputError` where the model does not run on the example or an option is unknown, `NotEquivalent` where the
    proof fails.
    """
    _require_option("objective", objective, get_args(Objective))
    _require_option("shortcuts", shortcuts, get_args(Shortcuts))
    arguments = as_arguments(example_input)
    find = partial(region_candidates, depthwise_counts=objective == "macs")
    with plain_mode():
        _require_runs(model, arguments)
        plain, report = _fold(model, arguments, find, prove, may_cost=objective == "operators")
        if shortcuts == "fold":
            folded, second = _fold(plain, arguments, shortcut_candidates, prove, may_cost=True)
            report = _joined(report, second, model, folded, arguments)
            plain = folded
            if not second.regions:
                report.notes.append(_NO_SHORTCUT)
        # What was chosen by name was proved when it was chosen.
        chosen = Chosen(rewrites, prove) if callable(rewrites) else Chosen(by_name(rewrites), prove=False)
        for kind, finder in finders(chosen).items() if rewrites else ():
            if (kind == SHORTCUT and shortcuts == "fold") or not _plans_anything(plain, arguments, finder):
                continue
            folded, second = _fold(plain, arguments, finder, prove, may_cost=True)
            report = _joined(report, second, model, folded, arguments)
            plain = folded
    report.options = {"objective": objective, "shortcuts": shortcuts}
    if chosen.names:
        report.options["rewrites"] = chosen.names
    plain.fold_report = report  # type: ignore[assignment]  # nn.Module types its attributes as tensors and modules
    return plain


def verify(reference: nn.Module, candidate: nn.Module, example_input: Any) -> Proof:
    """Measure how far `candidate` is from `reference`, both in evaluation mode, on `example_input` (as for `fold`).

    Two float64 networks must agree to 1e-9 of the largest output; in lower precision the candidate may be no further
    from the float64 result than 4 times the distance of the reference run in the same dtype.

    Raises `NotEquivalent`, which carries the proof, where they do not; `InputError` where one of them does not run.
    """
    with plain_mode():
        return _verify(reference, candidate, as_arguments(example_input))


def as_arguments(example_input: Any) -> Arguments:
    """The call that an example input stands for."""
    return (example_input if isinstance(example_input, tuple) else (example_input,)), {}


def _require_option(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InputError(f"{name} is {value!r}; choose {' or '.join(map(repr, known))}.")


def _fold(
    model: nn.Module, arguments: Arguments, find: Finder, prove: bool, *, may_cost: bool
) -> tuple[nn.Module, FoldReport]:
    before = count(shared_copy(model), arguments[0])
    extents, notes = iter(Extent), _notes(model)
    while True:
        attempt = _runnable_attempt(model, arguments, find, prove, extents, notes)
        proof = _prove_whole(model, attempt, arguments, notes) if prove else None
        attempt.settle(model)
        after = count(shared_copy(attempt.model), arguments[0])
        if may_cost or after.macs <= before.macs:
            break
        notes.append(
            f"less was folded: it would have taken {after.macs:,} multiply-accumulates, not {before.macs:,}"
        )
    if proof is not None:
        original, folded = _own_distances(model, attempt.model, arguments)
        proof = replace(proof, original_distance=original, folded_distance=folded)
        require_close(proof)
    name = type(model).__name__
    if after.batch_norms and not attempt.left:
        attempt.left.append(
            (name, f"{after.batch_norms} batch norms run as operators that are not recognised")
        )
    return attempt.model, FoldReport(name, attempt.folded, attempt.left, before, after, proof, notes)


def _plans_anything(model: nn.Module, arguments: Arguments, find: Finder) -> bool:
    """Whether there is something to fold, so that no proof is needed where there is nothing."""
    attempt = Attempt(shared_copy(model).eval(), arguments, find, False, Extent.EVERYTHING)
    attempt.plan()
    return any(edits.applied for _, edits in attempt.outcomes)


def _joined(
    first: FoldReport, second: FoldReport, model: nn.Module, folded: nn.Module, arguments: Arguments
) -> FoldReport:
    """The account of two folds, one after the other; the distances in the model's own dtype are those of both."""
    proof = None
    if first.proof is not None and second.proof is not None:
        original, own = _own_distances(model, folded, arguments)
        proof = replace(
            first.proof,
            distance_float64=max(first.proof.distance_float64, second.proof.distance_float64),
            regions=first.proof.regions + second.proof.regions,
            worst_region=max(first.proof.worst_region, second.proof.worst_region),
            original_distance=original,
            folded_distance=own,
        )
        require_close(proof)
    notes = list(dict.fromkeys([*first.notes, *second.notes]))
    return replace(
        first, regions=first.regions + second.regions, after=second.after, proof=proof, notes=notes
    )


def _verify(reference: nn.Module, candidate: nn.Module, arguments: Arguments) -> Proof:
    for model in (reference, candidate):
        _require_runs(model, arguments)
    if not outputs(reference, arguments):
        raise InputError(f"{type(reference).__name__} returns no tensor that could be compared.")
    inputs = _proof_inputs(reference, arguments)
    distance = prove_float64(reference, candidate, inputs)
    original, folded = _own_distances(reference, candidate, arguments)
    proof = Proof(distance, _shapes(inputs), original, folded)
    if original is None:
        require_same(proof)
    require_stable(proof)
    require_close(proof)
    return proof


def _require_runs(model: nn.Module, arguments: Arguments) -> None:
    name = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            f"{name} is a TorchScript module, which nobody can look into; fold it before it is compiled."
        )
    try:
        shared_copy(model)
    except Exception as error:
        raise InputError(
            f"{name} cannot be copied: {first_line(error)}; remove from the model what cannot be copied."
        ) from error
    try:
        outputs(model, arguments)
    except Exception as error:
        shapes = (
            ", ".join(str(tuple(v.shape)) for v in tree_leaves(arguments) if isinstance(v, Tensor)) or "none"
        )
        raise InputError(
            f"{name} cannot run on the example input (shape {shapes}): {first_line(error)}; "
            "give an input that its forward pass accepts."
        ) from error


def _notes(model: nn.Module) -> list[str]:
    if any(module.training for module in model.modules()):
        return ["the model was in training mode; what it computes in evaluation mode was folded"]
    return []


def _prove_whole(model: nn.Module, attempt: Attempt, arguments: Arguments, notes: list[str]) -> Proof:
    """Prove the network in float64, the new layers as they were before they were rounded."""
    inputs = _proof_inputs(model, arguments)
    exact = {identity: compute for layer in attempt.made for identity, compute in layer.exact().items()}
    distance = prove_float64(model, attempt.model, inputs, exact)
    proof = Proof(
        distance, _shapes(inputs), regions=len(attempt.proved), worst_region=max([0.0, *attempt.proved])
    )
    if distance > LARGEST_DISTANCE:
        proof = replace(proof, sensitivity=sensitivity(model, inputs))
        notes.append(
            f"the network amplifies rounding: the last bit of its input changes its output by {proof.sensitivity:.0e}, "
            "so that only its regions, one by one, can be proved to better than that"
        )
    if not outputs(model, arguments):
        notes.append("the network returns no tensor that could be compared: only its regions were proved")
    require_same(proof)
    return proof


def _proof_inputs(reference: nn.Module, arguments: Arguments) -> list[Arguments]:
    """The example, and random input of another size where the network accepts one."""
    for axis in (-2, -1):
        other = _another_size(arguments, axis)
        try:
            outputs(reference, other)
        except Exception:  # many networks accept one size only
            continue
        return [arguments, other]
    return [arguments]


def _shapes(inputs: list[Arguments]) -> tuple[str, ...]:
    def named(arguments: Arguments) -> str:
        return " ".join("×".join(map(str, v.shape)) for v in tree_leaves(arguments) if isinstance(v, Tensor))

    return tuple(named(arguments) for arguments in inputs)


def _another_size(arguments: Arguments, axis: int) -> Arguments:
    """Random input about three quarters as large along one axis, in steps of 32 for networks with five halvings."""
    generator = torch.Generator().manual_seed(1)

    def resized(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        shape = list(value.shape)
        if value.dim() >= 3:
            step = 32 if shape[axis] > 64 else 1
            shape[axis] = max(step, shape[axis] * 3 // 4 // step * step)
        return torch.randn(shape, generator=generator).to(value)

    return tree_map(resized, copy_tensors(arguments))  # type: ignore[no-any-return]  # tree_map keeps the structure


def _own_distances(
    reference: nn.Module, candidate: nn.Module, arguments: Arguments
) -> tuple[float | None, float | None]:
    return own_distances(reference, candidate, arguments) or (None, None)


def _runnable_attempt(
    model: nn.Module,
    arguments: Arguments,
    find: Finder,
    prove: bool,
    extents: Iterator[Extent],
    notes: list[str],
) -> Attempt:
    """Fold as much as leaves a network that runs: code around a folded block may ask for what is no longer there."""
    for extent in extents:
        attempt = Attempt(shared_copy(model).eval(), arguments, find, prove, extent)
        attempt.plan()
        try:
            attempt.write()
            outputs(attempt.model, arguments, float64=True)
            break
        except Exception as error:
            if extent is not Extent.EVERYTHING:
                notes.append(f"less was folded: the rewritten network did not run ({first_line(error)})")
    return attempt
