"""Put rewrites into a model: new layers in the places of old ones, and new forward passes where wiring changes."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from refold.errors import NotFoldable
from refold.folding.changes import Change, simplified
from refold.folding.planning import Planner
from refold.folding.rewrite import Applied, NewLayer, Operation, Rewrite, Value, values_in
from refold.folding.scopes import ScopeGraph, fixed_arguments, forward_name, is_container, paths_below
from refold.recording.recording import Recording, Scope, common_scope, has_hooks


class CannotWrite(Exception):
    """Some rewrites cannot be put into effect."""

    def __init__(self, rewrites: Sequence[Rewrite], reason: str) -> None:
        super().__init__(reason)
        self.rewrites, self.reason = rewrites, reason


@dataclass(frozen=True, eq=False)
class Rewire:
    """Inside one module call, some values are computed in another way, and `nodes` may go."""

    scope: Scope
    steps: dict[fx.Node, Value]
    nodes: frozenset[fx.Node]
    hollow: bool = False
    """Whether it only keeps a block free of an empty layer under the name of a norm."""


@dataclass
class Edit:
    """What one rewrite does to the modules: layers in their places, values of parameters, and wiring."""

    rewrite: Rewrite
    slots: dict[str, NewLayer | None] = field(default_factory=dict)
    values: dict[str, NewLayer] = field(default_factory=dict)
    rewires: list[Rewire] = field(default_factory=list)

    def signature(self, recording: Recording) -> object:
        """The same for rewrites that do the same to modules called several times."""
        layers = {layer: index for index, layer in enumerate(self.rewrite.layers)}

        def told(value: Any) -> Any:
            if isinstance(value, Applied):
                return ("layer", layers[value.layer], told(value.source))
            return ("operation", repr(value.target)) if isinstance(value, Operation) else "value"

        rewires = []
        for each in self.rewires:
            depth, call = len(each.scope), recording.calls[each.scope]
            keys = frozenset(_relative(node, depth) for node in each.nodes)
            steps = frozenset((_relative(node, depth), told(value)) for node, value in each.steps.items())
            rewires.append(
                (
                    each.scope[-1].path,
                    fixed_arguments(recording.attribute(each.scope[-1].path), call),
                    keys,
                    steps,
                )
            )
        slots = frozenset((path, None if new is None else layers[new]) for path, new in self.slots.items())
        return slots, frozenset(self.values), frozenset(rewires)


def _relative(node: fx.Node, depth: int) -> object:
    scope, label, number = node.meta["key"]
    return tuple((call.path, call.number) for call in scope[depth:]), label, number


@dataclass
class _Job:
    """All rewires that are written into one module."""

    scope: Scope
    inside: set[str]
    rewires: list[Rewire]

    @property
    def touched(self) -> set[str]:
        """Every module whose code is written anew or goes into another's."""
        return self.inside | {self.scope[-1].path}


def changes_of(planner: Planner, rewrites: Sequence[Rewrite], *, simplify: bool) -> list[Change]:
    """The changes that put rewrites into effect; those in place first, then modules from the innermost on.

    Raises CannotWrite where some of them cannot be written.
    """
    recording = planner.recording
    edits = [_edit(planner, rewrite) for rewrite in rewrites]
    kept = _together(planner, edits)
    changes = [
        Change(path, layer=nn.Identity().eval() if new is None else new.module)
        for edit in kept
        for path, new in edit.slots.items()
    ]
    changes += [
        Change(path, values=dict(new.module.named_parameters()))
        for edit in kept
        for path, new in edit.values.items()
    ]
    owners = {id(rewire): edit.rewrite for edit in edits for rewire in edit.rewires}
    rewires = [rewire for edit in edits for rewire in edit.rewires]
    for job in sorted(_jobs(rewires), key=lambda job: -len(job.scope)):
        try:
            changes.append(_change(recording, job, simplify=simplify))
        except NotFoldable as refusal:
            own = list(dict.fromkeys(owners[id(r)] for r in job.rewires if not r.hollow))
            raise CannotWrite(own or [owners[id(r)] for r in job.rewires], str(refusal)) from refusal
    return changes


def _edit(planner: Planner, rewrite: Rewrite) -> Edit:
    edit = Edit(rewrite)
    rest: dict[fx.Node, Value] = {}
    for node, value in rewrite.steps.items():
        source = value.source if isinstance(value, Applied) else value
        local = (
            len([n for n in node.all_input_nodes if n in planner.recording.varying]) == 1
            and source in node.all_input_nodes
        )
        layer = value.layer if isinstance(value, Applied) else None
        if local and node.op == "call_module" and not isinstance(value, Operation):
            hollow = None if layer is not None else _hollow(planner, node, value)
            if hollow is None:
                edit.slots[str(node.target)] = layer
            else:
                edit.rewires.append(hollow)
        elif local and layer is not None and (owner := _owner_of_weights(planner, node, layer)) is not None:
            edit.values[owner] = layer
        else:
            rest[node] = value
    if rewrite.joint and rest:
        scope = common_scope([node.meta["scope"] for node in rewrite.nodes])
        edit.rewires.append(Rewire(scope, rest, rewrite.nodes))
        return edit
    for node, value in rest.items():
        nodes = _interior(node, value, rewrite)
        edit.rewires.append(Rewire(common_scope([n.meta["scope"] for n in nodes]), {node: value}, nodes))
    return edit


def _interior(node: fx.Node, value: Value, rewrite: Rewrite) -> frozenset[fx.Node]:
    """What a step replaces: everything of the rewrite between the values that it reads and the node."""
    ends = {v for v in values_in([value]) if isinstance(v, fx.Node)}
    found, waiting = {node}, [node]
    while waiting:
        for v in waiting.pop().all_input_nodes:
            if v in rewrite.nodes and v not in ends and v not in found and v not in rewrite.steps:
                found.add(v)
                waiting.append(v)
    return frozenset(found)


def _hollow(planner: Planner, node: fx.Node, value: Any) -> Rewire | None:
    """The rewire that leaves no empty layer under its name, where the class around it allows it."""
    scope, path = node.meta["scope"], str(node.target)
    owner = path.rpartition(".")[0]
    recording = planner.recording
    if (
        len([c for c in scope if not c.hooks]) < 2
        or scope[-1].path != owner
        or is_container(recording.attribute(owner))
    ):
        return None
    rewire = Rewire(scope, {node: value}, frozenset([node]), hollow=True)
    try:
        _graph_of(recording, _Job(scope, set(), [rewire]), {})
    except NotFoldable:
        return None
    return rewire


def _owner_of_weights(planner: Planner, node: fx.Node, layer: NewLayer) -> str | None:
    """The module whose parameters a function reads, where new values for them do what the new layer does; for code
    that cannot be written anew."""
    use, recording = planner.use(node), planner.recording
    if node.op == "call_module" or node.meta["scope"] not in recording.closed:
        return None
    weight, bias = use.argument(1, "weight"), use.argument(2, "bias")
    given = [value for value in (weight, bias) if value is not None]
    made = dict(layer.module.named_parameters())
    if not all(isinstance(v, fx.Node) and v.op == "get_attr" and set(v.users) == {node} for v in given):
        return None
    names = [str(value.target).rpartition(".") for value in given]
    if {name for *_, name in names} != set(made) or len({owner for owner, *_ in names}) != 1:
        return None
    same = all(recording.attribute(f"{o}.{n}" if o else n).shape == made[n].shape for o, _, n in names)
    return names[0][0] if same else None


def _together(planner: Planner, edits: list[Edit]) -> list[Edit]:
    """One edit of those that do the same in several calls of a module. Raises CannotWrite where calls differ."""
    recording = planner.recording
    groups: dict[object, list[Edit]] = defaultdict(list)
    for edit in edits:
        groups[edit.signature(recording)].append(edit)
    totals = [_count_calls(each) for each in (recording, planner.recorded.second) if each is not None]
    for members in groups.values():
        for total in totals:
            try:
                _require_alone(planner, members, total)
            except NotFoldable as refusal:
                raise CannotWrite([member.rewrite for member in members], str(refusal)) from refusal
    first = [members[0] for members in groups.values()]
    for members in groups.values():
        for other in members[1:]:  # the layers of the first stand in all calls
            for own, shared in zip(other.rewrite.layers, members[0].rewrite.layers, strict=True):
                own.rounded = shared.module
    return first


def _count_calls(recording: Recording) -> Counter[str]:
    """How often each module is called."""
    layers = (str(node.target) for node in recording.graph.nodes if node.op == "call_module")
    return Counter(layers) + Counter(scope[-1].path for scope in recording.calls if not scope[-1].hooks)


def _require_alone(planner: Planner, members: list[Edit], totals: Counter[str]) -> None:
    """Refuse an edit that would be seen from a call, or from code, which is no part of these rewrites."""
    first, recording = members[0], planner.recording
    for path in (*first.slots, *(rewire.scope[-1].path for rewire in first.rewires)):
        if totals[path] != len(members):
            raise NotFoldable(
                f"{path or 'the model'} is called {totals[path]} times, in different surroundings"
            )
    own = {node for member in members for node in member.rewrite.nodes}
    for path in first.slots:
        if not recording.readers.get(path, set()) <= own:
            raise NotFoldable(f"the weights of {path} are read by other code too")
    for rewire in first.rewires:
        forward_name(recording.attribute(rewire.scope[-1].path))


def _jobs(rewires: list[Rewire]) -> list[_Job]:
    """Group rewires by the module that is to be rewritten; modules that overlap are rewritten as one."""
    jobs: list[_Job] = []
    for rewire in rewires:
        job = _Job(rewire.scope, paths_below(rewire.scope, {n.meta["scope"] for n in rewire.nodes}), [rewire])
        while overlapping := [other for other in jobs if other.touched & job.touched]:
            for other in overlapping:
                jobs.remove(other)
                job = _merged(job, other)
        jobs.append(job)
    return jobs


def _merged(one: _Job, other: _Job) -> _Job:
    if one.scope[-1].path == other.scope[-1].path:
        return _Job(min(one.scope, other.scope), one.inside | other.inside, one.rewires + other.rewires)
    scope = common_scope([one.scope, other.scope])
    below = paths_below(scope, {one.scope, other.scope})
    return _Job(scope, one.inside | other.inside | below, one.rewires + other.rewires)


def _graph_of(recording: Recording, job: _Job, adds: dict[str, nn.Module]) -> tuple[fx.Graph, ScopeGraph]:
    module = recording.attribute(job.scope[-1].path)
    within = [r for r in job.rewires if r.scope[: len(job.scope)] == job.scope]
    steps = {node: value for rewire in within for node, value in rewire.steps.items()}
    names: dict[int, str] = {}

    def register(layer: NewLayer, name: str) -> str:
        if id(layer) not in names:
            prefix = f"{job.scope[-1].path}."
            name = name.removeprefix(prefix) if job.scope[-1].path else name
            names[id(layer)] = _free_name(module, name, adds)
            adds[names[id(layer)]] = layer.module
        return names[id(layer)]

    written = ScopeGraph(recording, job.scope, job.inside, steps, register)
    return written.graph({node for rewire in within for node in rewire.nodes}), written


def _free_name(module: nn.Module, name: str, taken: dict[str, nn.Module]) -> str:
    parent, _, last = name.rpartition(".")
    try:
        beside = module.get_submodule(parent)
    except AttributeError:
        parent, beside = "", module
    found, number = last, 2
    while hasattr(beside, found) or (f"{parent}.{found}" if parent else found) in taken:
        found, number = f"{last}_{number}", number + 1
    return f"{parent}.{found}" if parent else found


def _change(recording: Recording, job: _Job, *, simplify: bool) -> Change:
    adds: dict[str, nn.Module] = {}
    graph, written = _graph_of(recording, job, adds)
    layers = [
        value.layer
        for r in job.rewires
        for value in values_in(r.steps.values())
        if isinstance(value, Applied)
    ]
    copies = {id(layer.module): layer.copy_of for layer in layers if layer.copy_of is not None}
    path = job.scope[-1].path
    module = recording.attribute(path)
    whole = not path
    becomes = None
    if simplify and not has_hooks(module) and any(not rewire.hollow for rewire in job.rewires):
        calls = [
            call
            for scope, call in recording.calls.items()
            if scope[-1] == job.scope[-1]._replace(number=scope[-1].number)
        ]
        alike = all(len(call.args) == 1 and not call.kwargs for call in calls)
        chain = simplified(graph) if alike else None
        if chain is not None and (not whole or len(chain) == 1) and len(set(chain)) == len(chain):
            becomes = chain
    return Change(
        path,
        adds=OrderedDict(adds),
        tensors=written.tensors,
        graph=graph,
        becomes=becomes,
        keep_methods=whole,
        copies={name: copies[id(layer)] for name, layer in adds.items() if id(layer) in copies},
    )
