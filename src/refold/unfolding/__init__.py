"""Training-time branches for any model, at nearly the price of one."""

from refold.unfolding.original import original_state_dict
from refold.unfolding.parallel import Form, ParallelBranches
from refold.unfolding.plans import PLANS, Plan
from refold.unfolding.unfold import UnfoldedLayer, UnfoldReport, parallelise, unfold

__all__ = [
    "PLANS",
    "Form",
    "ParallelBranches",
    "Plan",
    "UnfoldReport",
    "UnfoldedLayer",
    "original_state_dict",
    "parallelise",
    "unfold",
]
