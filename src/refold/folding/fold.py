"""`fold` and `verify`: the whole way from any model to a plain one that is proved to compute the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from torch import Tensor, nn

from refold.errors import InputError, NotEquivalent, first_line
from refold.folding.alternatives import SHORTCUT, Chosen, Judge, by_name, passes
from refold.folding.answers import outputs, shared_copy
from refold.folding.attempt import Attempt, Pass
from refold.folding.changes import to_data
from refold.folding.commuting import commuting_norms
from refold.folding.comparing import TOLERANCE
from refold.folding.planning import Planner
from refold.folding.proof import (
    Proof,
    Truth,
    is_close,
    require_close,
    require_finite,
    require_same,
    require_stable,
    truth_of,
)
from refold.folding.regions import linear_regions
from refold.folding.remarks import remarks, unseen_turns
from refold.folding.report import FoldReport
from refold.folding.rewrite import Rewrite
from refold.folding.shortcuts import folded_shortcuts
from refold.folding.unwrapping import unwrapped
from refold.recording.arguments import (
    Arguments,
    as_arguments,
    other_sizes,
    plain_mode,
    shapes_listed,
)
from refold.recording.surroundings import Recorded, record_twice

Shortcuts = Literal["keep", "fold"]
Named = Literal["macs", "operators"]


@runtime_checkable
class Objective(Protocol):
    """A value that says what a fold is to lower, and carries what is needed to find out."""

    def fold(
        self, model: nn.Module, example_input: Any, *, prove: bool, shortcuts: Shortcuts, tolerance: float
    ) -> nn.Module:
        """The plain network, chosen by this objective."""


_NO_SHORTCUT = (
    "no shortcut was folded: none leads around a chain of convolutions through the same activations"
)


def fold(
    model: nn.Module,
    example_input: Any,
    *,
    prove: bool = True,
    objective: Named | Objective = "macs",
    shortcuts: Shortcuts = "keep",
    rewrites: Judge | Sequence[str] = (),
    tolerance: float = TOLERANCE,
) -> nn.Module:
    """A plain network that computes what `model` computes in evaluation mode, every linear part one layer.

    `example_input` is what the model is called with: a tensor, `[batch, channels, *size]` as a rule, a tuple of
    positional arguments, or a dictionary, by keyword where the forward pass has parameters of all its names. The model
    is left untouched; the result keeps its class, dtype, device, hooks and methods, is in evaluation mode, and carries
    a `FoldReport` as `fold_report`. With `prove` (the default) every region is proved in float64, borders included, at
    two sizes, and then the whole network; `tolerance` is the largest difference, relative to the largest output, that
    counts as rounding.

    No fold may raise the multiply-accumulates, unless the `objective` is "operators": then those of depthwise
    convolutions, which memory holds up rather than arithmetic, do not count, and depthwise kernels of several sizes,
    each for a part of the channels, become one (RepNeXt, eq. 2). `refold.Latency("onnxruntime")` as objective
    measures on an engine which exact rewrites pay there.
    `shortcuts="fold"` also takes each shortcut around a chain of convolutions into them, wherever it passes through
    the chain's activations, at the price of more channels (RepNeXt, eq. 5 to 8).
    `rewrites` chooses among exact rewrites that pay on some engines only (`refold.folding.alternatives`): a function
    that is shown every alternative, or the names, in `fold_report.options`, of those to take.

    Raises `InputError` where the model does not run on the example or an option is unknown, `NotEquivalent` where the
    proof fails.

    Examples:
        >>> import torch, refold
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> plain = refold.fold(net, torch.randn(1, 3, 32, 32))
        >>> plain.fold_report.after.operators
        {'convolution': 1, 'activation': 1}
    """
    _require_option("shortcuts", shortcuts, get_args(Shortcuts))
    if not isinstance(objective, str):
        if rewrites:
            raise InputError(
                "rewrites were given and the objective would choose others; leave out one of them."
            )
        return objective.fold(model, example_input, prove=prove, shortcuts=shortcuts, tolerance=tolerance)
    if str(objective) == "latency":
        raise InputError(
            'objective is "latency", of what? Give it with its engine: refold.Latency("onnxruntime").'
        )
    _require_option("objective", objective, get_args(Named))
    model, notes = unwrapped(model)
    arguments = as_arguments(model, example_input)
    limit = tolerance if prove else None
    regions: list[Pass] = [partial(linear_regions, depthwise_counts=objective == "macs"), _commuting]
    with plain_mode():
        stage = _Stage(model, arguments, limit)
        plain, report = stage.fold(regions, may_cost=objective == "operators")
        if shortcuts == "fold":
            plain, report, count = stage.again(plain, report, [folded_shortcuts])
            if not count:
                report.notes.append(_NO_SHORTCUT)
        # What was chosen by name was proved when it was chosen.
        chosen = Chosen(rewrites, limit) if callable(rewrites) else Chosen(by_name(rewrites), None)
        for kind, find in passes(chosen).items() if rewrites else ():
            if kind != SHORTCUT or shortcuts != "fold":
                plain, report, _ = stage.again(plain, report, [find])
    report.notes[:0] = notes
    report.options = {"objective": objective, "shortcuts": shortcuts}
    if chosen.names:
        report.options["rewrites"] = chosen.names
    plain.fold_report = report  # type: ignore[assignment]  # nn.Module types its attributes as tensors and modules
    return plain


def apply_passes(
    model: nn.Module,
    example_input: Any,
    passes: Sequence[Pass],
    *,
    tolerance: float | None = TOLERANCE,
    may_cost: bool = False,
) -> nn.Module:
    """A network in which what `passes` find is in effect, proved to `tolerance` (None: not at all) as every fold is.

    A pass is a function from a planned model (`refold.folding.planning.Planner`) to rewrites. Where the network takes
    more multiply-accumulates than before, rewrites are taken back unless it `may_cost` more.

    Raises `InputError` where the model does not run on the example, `NotEquivalent` where the proof fails.
    """
    model, notes = unwrapped(model)
    with plain_mode():
        stage = _Stage(model, as_arguments(model, example_input), tolerance)
        plain, report = stage.fold(passes, may_cost=may_cost)
    report.notes[:0] = notes
    plain.fold_report = report  # type: ignore[assignment]  # nn.Module types its attributes as tensors and modules
    return plain


def verify(
    reference: nn.Module, candidate: nn.Module, example_input: Any, *, tolerance: float = TOLERANCE
) -> Proof:
    """Measure how far `candidate` is from `reference`, both in evaluation mode, on `example_input` (as for `fold`).

    Two float64 networks must agree to `tolerance` of the largest output; in lower precision the candidate may be no
    further from the float64 result than 4 times the distance of the reference run in the same dtype. Outputs that
    sorting, thresholds or suppression decide, and that differ, are compared through the tensors that these look at.

    Raises `NotEquivalent`, which carries the proof, where they do not; `InputError` where one of them does not run.

    Examples:
        >>> import torch, refold
        >>> net = refold.create_model("repghostnet_050", num_classes=10)
        >>> image = torch.randn(1, 3, 64, 64)
        >>> refold.verify(net, refold.fold(net, image), image).distance_float64 < 1e-9
        True
    """
    with plain_mode():
        reference, candidate = unwrapped(reference)[0], unwrapped(candidate)[0]
        arguments = as_arguments(reference, example_input)
        own = [_answers(model, arguments) for model in (reference, candidate)]
        if not own[0]:
            raise InputError(f"{type(reference).__name__} returns no tensor that could be compared.")
        truth = truth_of(reference, _inputs(reference, arguments))
        shapes = [[tuple(value.shape) for value in outputs] for outputs in own]
        if shapes[0] != shapes[1] and not truth.answers[0].decided:
            raise NotEquivalent(
                f"the networks answer with other shapes, {_in_words(shapes[0])} and {_in_words(shapes[1])}; compare "
                "networks of the same classes and outputs."
            )
        proof = truth.with_own(truth.proof_of(candidate, tolerance), *own)
        if proof.original_distance is not None and not is_close(proof):
            proof = truth.unsettled(proof)
    require_finite(proof)
    if proof.original_distance is None:
        require_same(proof, tolerance)
    require_stable(proof)
    require_close(proof)
    return proof


def _in_words(shapes: list[tuple[int, ...]]) -> str:
    return " and ".join(map(str, shapes)) or "none"


def _commuting(planner: Planner) -> list[Rewrite]:
    return commuting_norms(planner, planner.taken)


class _Stage:
    """Folds of one model, one after the other: the float64 answers of the original are computed once."""

    def __init__(self, model: nn.Module, arguments: Arguments, tolerance: float | None) -> None:
        self._model, self._arguments, self._tolerance = model, arguments, tolerance
        self._truth: Truth | None = None
        self._own: list[Tensor] = []

    def fold(self, find: Sequence[Pass], *, may_cost: bool) -> tuple[nn.Module, FoldReport]:
        recorded = _recorded(self._model, self._arguments)
        self._own = recorded.first.outputs
        attempt = self._carried_out(self._model, recorded, find, may_cost=may_cost)
        notes = [*remarks(self._model, recorded), *unseen_turns(recorded, attempt.rewrites), *attempt.notes]
        proof = self._proof(attempt, recorded, notes)
        left = attempt.left()
        assert attempt.cost is not None
        name = type(self._model).__name__
        if attempt.cost.batch_norms and not left:
            left = [
                (name, f"{attempt.cost.batch_norms} batch norms run as operators that are not recognised")
            ]
        regions = [region for rewrite in attempt.rewrites for region in rewrite.folded]
        report = FoldReport(
            name, regions, left, recorded.cost, attempt.cost, proof, notes, record=to_data(attempt.changes)
        )
        return attempt.model, report

    def again(
        self, plain: nn.Module, report: FoldReport, find: Sequence[Pass]
    ) -> tuple[nn.Module, FoldReport, int]:
        """Fold what was folded once more; the model, the account of all, and how many regions were added."""
        recorded = _recorded(plain, self._arguments)
        attempt = self._carried_out(plain, recorded, find, may_cost=True)
        if not attempt.rewrites:
            return plain, report, 0
        notes = list(dict.fromkeys([*report.notes, *attempt.notes]))
        proof = self._proof(attempt, recorded, notes)
        if proof is not None and report.proof is not None:
            proof = replace(
                proof,
                regions=report.proof.regions + proof.regions,
                worst_region=max(report.proof.worst_region, proof.worst_region),
                distance_float64=max(report.proof.distance_float64, proof.distance_float64),
            )
        assert attempt.cost is not None
        added = [region for rewrite in attempt.rewrites for region in rewrite.folded]
        written = to_data(attempt.changes)
        joined = replace(
            report,
            regions=report.regions + added,
            after=attempt.cost,
            proof=proof,
            notes=notes,
            record=None if written is None or report.record is None else report.record + written,
        )
        return attempt.model, joined, len(added)

    def _carried_out(
        self, model: nn.Module, recorded: Recorded, find: Sequence[Pass], *, may_cost: bool
    ) -> Attempt:
        attempt = Attempt(Planner(recorded), model, self._tolerance)
        attempt.carry_out(find, may_cost=may_cost)
        return attempt

    def _proof(self, attempt: Attempt, recorded: Recorded, notes: list[str]) -> Proof | None:
        """Prove the network in float64, the new layers as they were before they were rounded, and settle it."""
        if self._tolerance is None:
            attempt.settle()
            return None
        inputs = recorded.sizes
        if self._truth is None:
            self._truth = truth_of(self._model, inputs)
        truth = self._truth if attempt.original is self._model else truth_of(attempt.original, inputs)
        exact = {
            identity: compute for layer in attempt.layers() for identity, compute in layer.exact().items()
        }
        proof = truth.proof_of(attempt.model, self._tolerance, exact)
        for layer in attempt.layers():
            layer.kept = None
        distances = [attempt.proved[id(r)] for r in attempt.rewrites if id(r) in attempt.proved]
        proof = replace(proof, regions=len(distances), worst_region=max([0.0, *distances]))
        if proof.distance_float64 > self._tolerance:
            proof = replace(proof, sensitivity=truth.sensitivity())
            notes.append(
                f"the network amplifies rounding: the last bit of its input changes its output by "
                f"{proof.sensitivity:.0e}, so that only its regions, one by one, can be proved to better than that"
            )
        require_same(proof, self._tolerance)
        notes += proof.notes()
        attempt.settle()
        proof = self._truth.with_own(proof, self._own, attempt.answers)
        if not is_close(proof):
            proof = self._truth.unsettled(proof)
        require_close(proof)
        return proof


def _recorded(model: nn.Module, arguments: Arguments) -> Recorded:
    _require_copies(model)
    try:
        return record_twice(model, arguments, shared_copy)
    except Exception as error:
        raise _does_not_run(model, arguments, error) from error


def _answers(model: nn.Module, arguments: Arguments) -> list[Tensor]:
    _require_copies(model)
    try:
        return outputs(model, arguments)
    except Exception as error:
        raise _does_not_run(model, arguments, error) from error


def _does_not_run(model: nn.Module, arguments: Arguments, error: Exception) -> InputError:
    return InputError(
        f"{type(model).__name__} cannot run on the example input (shape {shapes_listed(arguments)}): "
        f"{first_line(error)}; give an input that its forward pass accepts."
    )


def _require_copies(model: nn.Module) -> None:
    try:
        shared_copy(model)
    except Exception as error:
        raise InputError(
            f"{type(model).__name__} cannot be copied: {first_line(error)}; "
            "remove from the model what cannot be copied."
        ) from error


def _inputs(reference: nn.Module, arguments: Arguments) -> list[Arguments]:
    """The example, and random input of another size where the network accepts one."""
    for other in other_sizes(arguments):
        try:
            outputs(reference, other)
        except Exception:  # many networks accept one size only
            continue
        return [arguments, other]
    return [arguments]


def _require_option(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InputError(f"{name} is {value!r}; choose {' or '.join(map(repr, known))}.")
