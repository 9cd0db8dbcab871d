"""Sums whatever their brackets: terms that read the same value are put together where that costs less."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import fx

from refold.folding.region import NOTHING, Region, total
from refold.recording.linear import Sum, inputs_of

if TYPE_CHECKING:
    from refold.folding.planning import Planner


def regrouped(planner: Planner, node: fx.Node, regroup: Set[fx.Node]) -> list[Region]:
    """Run a value's own operator; of a sum of several values, merge those terms that read the same one first."""
    terms = dict(_terms(planner, node, 1.0)) if isinstance(planner.operators[node], Sum) else {}
    if len(terms) > 2:
        planner.ungrouped.add(node)
    found = _best_group(planner, node, terms) if node in regroup else None
    if found is None:
        planner.demanded.update(inputs_of(planner.operators[node]))
        return []
    source, members = found
    rest = {term: factor for term, factor in terms.items() if term not in members}
    planner.demanded |= {source, *rest}
    operators = {n: planner.operators[n] for n in _summing(planner, node)}
    partial_sum = _virtual(planner, node, tuple(members), tuple(terms[m] for m in members))
    inner = planner.region(partial_sum, source)
    if inner is None:
        return []
    nodes = (inner.nodes - {partial_sum}) | set(operators)
    inner_operators = {n: op for n, op in inner.operators.items() if n is not partial_sum}
    return [
        replace(
            inner, root=node, operators=inner_operators | operators, nodes=nodes, rest=tuple(rest.items())
        )
    ]


def _terms(planner: Planner, node: fx.Node, factor: float) -> list[tuple[fx.Node, float]]:
    """What a sum adds, through the sums that it alone reads."""
    own = planner.operators.get(node)
    if not isinstance(own, Sum):
        return [(node, factor)]
    found: list[tuple[fx.Node, float]] = []
    for value, each in zip(own.inputs, own.factors, strict=True):
        inner = set(value.users) == {node} and planner.same_call(value, node)
        found += _terms(planner, value, factor * each) if inner else [(value, factor * each)]
    return found


def _summing(planner: Planner, node: fx.Node) -> list[fx.Node]:
    own = planner.operators.get(node)
    if not isinstance(own, Sum):
        return []
    inner = [v for v in own.inputs if set(v.users) == {node} and planner.same_call(v, node)]
    return [each for value in inner for each in _summing(planner, value)] + [node]


def _best_group(
    planner: Planner, node: fx.Node, terms: dict[fx.Node, float]
) -> tuple[fx.Node, list[fx.Node]] | None:
    """The terms of a sum, and what they read, that cost least as one convolution in the place of their own."""
    reached: dict[fx.Node, list[fx.Node]] = {}
    for term in terms:
        if term in planner.operators and set(term.users) <= set(_summing(planner, node)):
            known: dict[fx.Node, list[fx.Node]] = {}
            for inner in planner.closure(term):
                known[inner] = planner.sources(inner, known)
            for source in known[term][1:]:
                reached.setdefault(source, []).append(term)
    for term in terms:
        if term in reached:
            reached[term].append(term)
    best, choice = NOTHING, None
    for source, members in reached.items():
        if len(members) < 2 or (node, source, "group") in planner.excluded:
            continue
        whole = _virtual(planner, node, tuple(members), tuple(terms[m] for m in members))
        emitted = planner.emission_price(whole, source)
        gone = set(_summing(planner, node))
        for inner in reversed(planner.composer.between(source, whole)):
            gone |= {inner} if set(inner.users) <= gone else set()
        own = total(planner.own_price(n) for n in gone - set(_summing(planner, node)))
        if emitted is not None and emitted[:2] <= own[:2]:
            saved = (emitted[0] - own[0], emitted[1] - own[1], emitted[2] - own[2])
            best, choice = min((best, choice), (saved, (source, members)), key=lambda pair: pair[0])
    return choice


def _virtual(
    planner: Planner, node: fx.Node, terms: tuple[fx.Node, ...], factors: tuple[float, ...]
) -> fx.Node:
    """A node that is in no graph, for the sum of some terms of `node`."""
    key = (node, terms)
    if key not in planner.sums:
        made = planner.sums[key] = fx.Graph().create_node("call_function", sum, ())
        made.meta["scope"] = node.meta["scope"]
        planner.operators[made] = Sum(terms, factors)
        planner.shapes[made], planner.order[made] = planner.shapes[node], planner.order[node]
        planner.recording.kinds[made] = planner.recording.kinds[node]
        planner.composer.add(made, planner.operators[made])
    return planner.sums[key]
