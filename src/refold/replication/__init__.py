"""The accuracy tables of the papers, trained here: which of their relations hold."""

from refold.replication.plan import Training, why_not
from refold.replication.relations import RULE, Relation
from refold.replication.replicating import Replication, replicate
from refold.replication.report import save, to_dict, to_markdown, to_rich

__all__ = [
    "RULE",
    "Relation",
    "Replication",
    "Training",
    "replicate",
    "save",
    "to_dict",
    "to_markdown",
    "to_rich",
    "why_not",
]
