"""Training-time branches for any model, and the way back to its own architecture."""

from refold.blocks.parallel import BranchComputation, ParallelBranches
from refold.unfolding.original import original_state_dict
from refold.unfolding.plans import PLANS, Plan
from refold.unfolding.rebuilding import rebuild
from refold.unfolding.report import UnfoldedLayer, UnfoldReport
from refold.unfolding.unfold import unfold

__all__ = [
    "PLANS",
    "BranchComputation",
    "ParallelBranches",
    "Plan",
    "UnfoldReport",
    "UnfoldedLayer",
    "original_state_dict",
    "rebuild",
    "unfold",
]
