"""Fold any model into a plain one: find linear regions, plan, prove, rewrite and report."""

from refold.folding.changes import apply_data as apply_record
from refold.folding.fold import Objective, apply_passes, fold, verify
from refold.folding.proof import Proof
from refold.folding.report import Decision, FoldedRegion, FoldReport
from refold.recording.cost import Cost, count

__all__ = [
    "Cost",
    "Decision",
    "FoldReport",
    "FoldedRegion",
    "Objective",
    "Proof",
    "apply_passes",
    "apply_record",
    "count",
    "fold",
    "verify",
]
