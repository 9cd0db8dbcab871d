"""The accuracies of the papers: their tables trained here, and their released weights asked about ImageNet's photos."""

from refold.replication.evaluating import Evaluation, evaluate
from refold.replication.plan import Training, why_not
from refold.replication.relations import RULE, Relation
from refold.replication.replicating import Replication, replicate
from refold.replication.report import sheet
from refold.replication.sheet import Sheet

__all__ = [
    "RULE",
    "Evaluation",
    "Relation",
    "Replication",
    "Sheet",
    "Training",
    "evaluate",
    "replicate",
    "sheet",
    "why_not",
]
