"""Fold any model into a plain one: find linear regions, plan, prove, rewrite and report."""

from refold.folding.cost import Cost, count
from refold.folding.fold import fold, verify
from refold.folding.proof import Proof
from refold.folding.report import Decision, FoldedRegion, FoldReport

__all__ = ["Cost", "Decision", "FoldReport", "FoldedRegion", "Proof", "count", "fold", "verify"]
