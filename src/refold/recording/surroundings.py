"""What holds for any size: two recordings of one model beside each other, and where nothing may be folded across."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from refold.errors import first_line
from refold.recording.arguments import Arguments, other_sizes
from refold.recording.cost import Cost, Counting
from refold.recording.recorder import record
from refold.recording.recording import Built, OperatorKey, Recording, Scope, nodes_in

_BY_SIZE = "its code does something else for another size of the input"
_UNSEEN = "its code computes a tensor where nobody can look"


@dataclass
class Recorded:
    """A model's run on the example, with what a run at another size showed of it."""

    first: Recording
    second: Recording | None
    cost: Cost
    """What the run on the example cost."""
    moved: set[tuple[fx.Node, fx.Node]] = field(default_factory=set)
    """(value, reader) pairs that are not there at the other size."""
    changed: dict[fx.Node, str] = field(default_factory=dict)
    """Operators that do something else, or do not run, at the other size; and why."""

    turns: list[tuple[Scope, fx.Node]] = field(default_factory=list)
    """Where code may take another way at another size: the call, and the last operator before."""

    @property
    def sizes(self) -> list[Arguments]:
        """The calls that were recorded."""
        return [each.arguments for each in (self.first, self.second) if each is not None]


def record_twice(original: nn.Module, arguments: Arguments, copy: Any) -> Recorded:
    """Record `original` on the example and at another size, where it takes one; `copy` makes copies to run.

    Raises whatever the model raises on the example.
    """
    counting = Counting()
    first = record(copy(original).eval(), arguments, counting)
    second = None
    for other in other_sizes(arguments):
        try:
            second = record(copy(original).eval(), other)
            break
        except Exception as error:  # many networks accept one size only
            first_line(error)
    recorded = Recorded(first, second, counting.cost(original))
    _settle_unseen(recorded)
    if second is not None:
        _compare(recorded, second)
    first.sweep()
    _close_convolutions(recorded)
    return recorded


def crossed(first: Recording, value: fx.Node, reader: fx.Node) -> list[Scope]:
    """The module calls whose code hands `value` to `reader`: from the one inwards to the common one, and back out."""
    left, right = value.meta["scope"], reader.meta["scope"]
    common = next(
        (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
    )
    return [left[:i] for i in range(common, len(left) + 1)] + [
        right[:i] for i in range(common + 1, len(right) + 1)
    ]


def _settle_unseen(recorded: Recorded) -> None:
    """A tensor that is there in both runs is a constant; any other may depend on the input."""
    first, second = recorded.first, recorded.second
    known = {id(tensor) for tensor in second.unseen.values()} if second is not None else set()
    for node, tensor in first.unseen.items():
        if id(tensor) in known:
            continue
        first.varying.add(node)
        for user in node.users:
            first.closed[user.meta["scope"]] = _UNSEEN
    for node in first.graph.nodes:
        if first.varying.intersection(node.all_input_nodes):
            first.varying.add(node)


def _compare(recorded: Recorded, second: Recording) -> None:
    first = recorded.first
    twins = {node.meta["key"]: node for node in second.graph.nodes if "key" in node.meta}
    lines = [_lines(recording) for recording in (first, second)]
    for node in first.graph.nodes:
        if node.op in ("output", "placeholder", "get_attr"):
            continue
        twin = twins.get(node.meta["key"])
        if twin is None:
            recorded.changed[node] = "it does not run at another size of the input"
            recorded.moved |= {(value, node) for value in node.all_input_nodes}
        elif _signature(node) != _signature(twin):
            recorded.changed[node] = (
                "a number in its call changes with the size of the input, in a way that nobody sees"
            )
        if twin is not None:
            pairs = zip(node.all_input_nodes, twin.all_input_nodes, strict=False)
            alike = len(node.all_input_nodes) == len(twin.all_input_nodes)
            recorded.moved |= {(v, node) for v, w in pairs if not alike or v.meta["key"] != w.meta["key"]}
    moved = {reader for _, reader in recorded.moved}
    for scope in first.calls:
        same = lines[0].get(scope) == lines[1].get(scope) and scope in second.calls
        calls = [each.calls.get(scope) for each in (first, second)]
        same = same and len({repr(fixed_part((c.args, c.kwargs))) for c in calls if c is not None}) == 1
        own = [node for node in first.within.get(scope, ()) if node.meta["scope"] == scope]
        if not same or moved.intersection(own) or any(node in recorded.changed for node in own):
            first.closed.setdefault(scope, _BY_SIZE)
    values = {node.meta["key"]: node.meta["number"] for node in second.graph.nodes if "number" in node.meta}
    for node in first.graph.nodes:
        if (
            "number" in node.meta
            and values.get(node.meta["key"]) == node.meta["number"]
            and _of_channels(first, node)
        ):
            first.steady[node] = node.meta["number"]
    for scope, node, last in first.decisions:
        if scope and node not in first.steady:
            first.closed.setdefault(scope, _BY_SIZE)
            recorded.turns.append((scope, last))
    for scope, reason in second.guarded.items():
        first.guarded.setdefault(scope, reason)


def _lines(recording: Recording) -> dict[Scope, list[OperatorKey]]:
    """What runs in the own code of each call, in order."""
    found: dict[Scope, list[OperatorKey]] = defaultdict(list)
    for node in recording.graph.nodes:
        if node.op not in ("output", "get_attr", "placeholder"):
            found[node.meta["scope"]].append(node.meta["key"])
    return dict(found)


def _close_convolutions(recorded: Recorded) -> None:
    """Let a layer that computes its padding from the size of the image be one operator: its outputs can be scaled."""
    first = recorded.first
    first.__dict__.pop("within", None)  # fewer operators are left
    for scope in [s for s, reason in first.closed.items() if reason == _BY_SIZE]:
        module, call = first.attribute(scope[-1].path), first.calls.get(scope)
        inside = [node for node in first.graph.nodes if node.meta.get("scope", ())[: len(scope)] == scope]
        given = [] if call is None else list(nodes_in((call.args, call.kwargs)))
        known = isinstance(module, _ConvNd) and call is not None and isinstance(call.result, fx.Node)
        if (
            not known
            or len(given) != 1
            or call is None
            or call.result not in inside
            or first.effects.intersection(inside)
        ):
            continue
        with first.graph.inserting_after(inside[-1]):
            node = first.graph.create_node("call_module", scope[-1].path, call.args, call.kwargs)
        label = f"call_module {scope[-1].path}"
        node.meta["scope"], node.meta["key"] = scope[:-1], (scope[:-1], label, scope[-1].number)
        first.shapes[node], first.kinds[node] = first.shapes[call.result], first.kinds[call.result]
        first.varying.add(node)
        _replace(first, call.result, node, set(inside))
        first.calls = {s: each for s, each in first.calls.items() if s[: len(scope)] != scope}
        first.closed = {s: reason for s, reason in first.closed.items() if s[: len(scope)] != scope}
        recorded.moved = {pair for pair in recorded.moved if not set(inside).intersection(pair)}


def _replace(recording: Recording, old: fx.Node, new: fx.Node, inside: set[fx.Node]) -> None:
    """Let `new` stand for the value of `old`, and erase what is inside."""

    def of(value: Any) -> Any:
        if isinstance(value, Built):
            return Built(value.kind, {name: of(part) for name, part in value.fields.items()})
        return fx.node.map_aggregate(
            value, lambda v: new if v is old else of(v) if isinstance(v, Built) else v
        )

    old.replace_all_uses_with(new)
    for call in recording.calls.values():
        call.args, call.kwargs, call.result = of(call.args), of(call.kwargs), of(call.result)
    for node in sorted(inside, reverse=True):
        if not node.users:
            recording.graph.erase_node(node)


def _of_channels(recording: Recording, number: fx.Node) -> bool:
    """Whether a number that is the same at both sizes comes from counts of channels alone, or of more than those few
    pixels to which maps of both sizes may collapse."""
    if number.op == "call_method" and number.target == "size":
        value, axis = number.args[0], number.args[1]
        assert isinstance(value, fx.Node)
        dimensions = len(recording.shapes[value])
        channels = bool(axis == 1 if dimensions > 3 else axis != 0)
        return channels or bool(number.meta["number"] > 3)
    inputs = number.all_input_nodes
    return number.target != "numel" and all(value in recording.steady for value in inputs)


def _signature(node: fx.Node) -> Any:
    """What is fixed in a call: its target and its arguments but for the values it reads."""
    return node.op, node.target, fixed_part((node.args, node.kwargs))


def fixed_part(value: Any) -> Any:
    """What of a structure of arguments is no value of the graph."""
    if isinstance(value, fx.Node):
        return "%"
    if isinstance(value, slice):
        return ("slice", fixed_part(value.start), fixed_part(value.stop), fixed_part(value.step))
    if isinstance(value, Built):
        return value.kind, fixed_part(value.fields)
    if isinstance(value, dict):
        return {key: fixed_part(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [fixed_part(item) for item in value]
    return value if isinstance(value, (int, float, str, bool, type(None))) else repr(value)
