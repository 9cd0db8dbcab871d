"""Say in one sentence why an operator was left."""

from __future__ import annotations

from torch import fx

from refold.folding.planning import Planner
from refold.recording.linear import Same
from refold.recording.operators import word_of


def operator_kind(node: fx.Node, planner: Planner) -> str:
    """What the operator is, in words: "convolution", "batch norm", "add", or the name of its module or function."""
    return word_of(planner.use(node), planner.operators.get(node))


def reason_left(node: fx.Node, planner: Planner) -> str:
    """Why a batch norm stays."""
    refusal = planner.refusals.get(node)
    if refusal is not None and node not in planner.operators:
        return refusal
    before = node.all_input_nodes[0]
    after = _readers(node, planner)
    before_kind = operator_kind(before, planner)
    readers = _readers(before, planner)
    if before in planner.operators and len(readers) > 1:
        return f"the {before_kind} before it is used by {len(readers)} operators"
    if refusal is not None:
        return refusal
    if before in planner.refusals:
        return f"{planner.refusals[before]} (the {before_kind} before it)"
    for user in after:
        if user in planner.refusals:
            return f"{planner.refusals[user]} ({operator_kind(user, planner)})"
    if len(after) > 1:
        return f"it follows {_article(before_kind)} and is used by {len(after)} operators"
    follower = operator_kind(after[0], planner) if after else "nothing"
    return f"it stands between {_article(before_kind)} and {_article(follower)}, not next to a convolution"


def _readers(node: fx.Node, planner: Planner) -> list[fx.Node]:
    """The operators that use a value, seen through those that only pass it on."""
    readers: list[fx.Node] = []
    for user in node.users:
        if isinstance(planner.operators.get(user), Same):
            readers += _readers(user, planner)
        elif "number" not in user.meta:
            readers.append(user)
    return readers


def _article(kind: str) -> str:
    return (
        kind if kind.startswith(("the ", "nothing")) else f"{'an' if kind[0] in 'aeiouAEIOU' else 'a'} {kind}"
    )
