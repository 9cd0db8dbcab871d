"""Prove that a network computes what another computes: the numbers, and what of them is allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from refold.errors import NotEquivalent
from refold.folding.answers import Answers, Comparison, answers, compare
from refold.folding.comparing import LARGEST_RATIO, TOLERANCE, distance, spread
from refold.recording.arguments import Arguments, shapes_named
from refold.recording.precision import Exact


@dataclass(frozen=True)
class Proof:
    """How far a network is from its reference.

    `distance_float64` is the largest difference of any output, relative to the largest output, both networks
    computed in float64; `inputs` are the shapes they were run on. `original_distance` and `folded_distance` are the
    distances (relative, root mean square) of both, run in their own dtype, from the float64 result of the reference;
    None where that dtype is float64. `regions` is how many parts were proved one by one, `worst_region` their largest
    distance. `sensitivity`, measured where `distance_float64` is more than rounding, is how far the reference moves
    when the last bit of its input changes. `compared` is how many numbers were compared, `not_finite` how many were
    not because they are no finite numbers, and `decided` how many outputs were compared through the tensors by which
    sorting, thresholds, top-k, suppression or rounding decided them.
    """

    distance_float64: float
    inputs: tuple[str, ...]
    original_distance: float | None = None
    folded_distance: float | None = None
    regions: int = 0
    worst_region: float = 0.0
    sensitivity: float | None = None
    compared: int = 0
    not_finite: int = 0
    decided: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The same numbers as plain JSON-able values; None for those that are not finite."""
        numbers = {k: v for k, v in asdict(self).items() if not isinstance(v, float) or math.isfinite(v)}
        return {**dict.fromkeys(asdict(self)), **numbers, "inputs": list(self.inputs)}

    def notes(self) -> list[str]:
        """What the numbers do not cover, each in one line."""
        found = []
        if not self.compared:
            found.append(
                "nothing was compared: the network returned no finite number; only its regions were proved"
            )
        elif self.not_finite:
            found.append(f"{self.not_finite:,} outputs are no finite numbers and were not compared")
        if self.decided:
            found.append(
                f"{self.decided} outputs are decided by sorting, thresholds or suppression: they were compared "
                "through the tensors that these look at"
            )
        return found


@dataclass
class Truth:
    """The float64 answers of a reference on several inputs, computed once."""

    reference: nn.Module
    inputs: Sequence[Arguments]
    answers: list[Answers]

    def proof_of(self, candidate: nn.Module, tolerance: float, exact: Exact | None = None) -> Proof:
        """How far a candidate is; `exact` are the float64 values of those of its parameters that are rounded."""
        result = Comparison()
        for arguments, expected in zip(self.inputs, self.answers, strict=True):
            found = answers(candidate, arguments, float64=True, exact=exact, decisions=True)
            result.add(compare(expected, found, tolerance))
        shapes = tuple(shapes_named(arguments) for arguments in self.inputs)
        return Proof(
            result.distance,
            shapes,
            compared=result.compared,
            not_finite=result.not_finite,
            decided=result.decided,
        )

    def with_own(self, proof: Proof, own: list[Tensor], candidate: list[Tensor]) -> Proof:
        """The proof with the distances of both networks in their own dtype, on the first input."""
        if all(value.dtype == torch.float64 or not value.is_floating_point() for value in own):
            return proof
        truth = self.answers[0].outputs
        pairs = (
            list(zip(truth, own, candidate, strict=True)) if len(truth) == len(own) == len(candidate) else []
        )
        # What is decided may be longer or shorter for reasons of rounding alone.
        alike = [(t, o, c) for t, o, c in pairs if t.shape == o.shape == c.shape]
        if not alike or (len(alike) < len(pairs) and not self.answers[0].decided):
            return replace(proof, original_distance=float("inf"), folded_distance=float("inf"))
        truth, own, candidate = ([each[i] for each in alike] for i in range(3))
        return replace(proof, original_distance=spread(truth, own), folded_distance=spread(truth, candidate))

    def sensitivity(self) -> float:
        """How far the outputs move, in float64, when each input value moves by its last bit.

        No rewriting can come closer: an unstable network turns any rounding into a visible difference.
        """
        generator = torch.Generator().manual_seed(2)

        def nudged(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            return value.cpu().double() * (1 + torch.finfo(torch.float64).eps * noise)

        worst = 0.0
        for arguments, expected in zip(self.inputs, self.answers, strict=True):
            moved = tree_map(nudged, arguments)
            on = next((v.device for v in self.reference.parameters()), torch.device("cpu"))
            moved = tree_map(
                lambda v, on=on: v.to(on) if isinstance(v, Tensor) and on.type != "mps" else v, moved
            )
            found = answers(self.reference, moved, float64=True).outputs
            if len(found) == len(expected.outputs):
                worst = max([worst, *(distance(e, f) for e, f in zip(expected.outputs, found, strict=True))])
        return worst

    def unsettled(self, proof: Proof) -> Proof:
        """The proof with the original's distance as far as it moves when each input value moves by its last bit: an
        original may be close to the truth by luck."""

        def nudged(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            signs = torch.randn(value.shape, generator=torch.Generator().manual_seed(3)).sign()
            return (value.cpu() * (1 + torch.finfo(value.dtype).eps * signs)).to(value)

        found = answers(self.reference, tree_map(nudged, self.inputs[0])).outputs
        truth = self.answers[0].outputs
        alike = [(t, f) for t, f in zip(truth, found, strict=False) if t.shape == f.shape]
        moved = spread([t for t, _ in alike], [f for _, f in alike]) if alike else 0.0
        return replace(proof, original_distance=max(moved, proof.original_distance or 0.0))


def truth_of(reference: nn.Module, inputs: Sequence[Arguments]) -> Truth:
    """Run a reference in float64."""
    found = [answers(reference, arguments, float64=True, decisions=True) for arguments in inputs]
    return Truth(reference, inputs, found)


def require_same(proof: Proof, tolerance: float = TOLERANCE) -> None:
    """Raise NotEquivalent where two networks differ in float64 by more than rounding explains."""
    allowed = max(tolerance, 10 * (proof.sensitivity or 0.0))
    if not proof.distance_float64 <= allowed:
        raise NotEquivalent(
            f"the networks differ by {proof.distance_float64:.1e} of the largest output in float64, "
            f"more than {allowed:.0e}: they do not compute the same function.",
            proof,
        )


def require_finite(proof: Proof) -> None:
    """Raise NotEquivalent where there was nothing finite to compare."""
    if not proof.compared and proof.not_finite:
        raise NotEquivalent(
            f"all {proof.not_finite:,} outputs are infinite or no numbers (NaN), so that nothing can be said; look for "
            "the first layer whose weights or statistics are not finite.",
            proof,
        )


def require_stable(proof: Proof) -> None:
    """Raise NotEquivalent where the reference is too unstable in its own dtype for a comparison to mean anything."""
    if proof.original_distance is not None and not proof.original_distance <= 0.5:
        raise NotEquivalent(
            f"the first network in its own dtype is {proof.original_distance:.1e} from its float64 result, so that "
            "nothing can be said about the second; compare them in float64 (model.double()).",
            proof,
        )


def is_close(proof: Proof) -> bool:
    """Whether the second network, in its own dtype, is about as near to the truth as the first."""
    try:
        require_close(proof)
    except NotEquivalent:
        return False
    return True


def require_close(proof: Proof) -> None:
    """Raise NotEquivalent where the second network, in its own dtype, is much further from the truth than the first."""
    if proof.original_distance is None or proof.folded_distance is None:
        return
    # The floor is for an original that happens to be exact: one rounding step of float32.
    allowed = LARGEST_RATIO * max(proof.original_distance, torch.finfo(torch.float32).eps)
    if not proof.folded_distance <= allowed:
        raise NotEquivalent(
            f"the second network is {proof.folded_distance:.1e} from the float64 result, more than "
            f"{LARGEST_RATIO:g} times the {proof.original_distance:.1e} of the first: "
            "they do not compute the same function.",
            proof,
        )
