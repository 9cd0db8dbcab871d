"""Write edits into a model: the smallest module that holds a region is traced again, edited, and simplified."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from refold.folding.drafts import Rebuild, common_scope, relative_key
from refold.folding.edits import Edits, Extent, Rewire
from refold.folding.observing import rebind
from refold.folding.plain_class import become_plain, require_fixed
from refold.folding.tracing import (
    Arguments,
    Key,
    Scope,
    Unit,
    checks,
    fixed_arguments,
    has_hooks,
    trace,
)


@dataclass
class _Job:
    """All rewires that are written into one module."""

    scope: Scope
    inside: set[str]
    """Paths of the modules below it whose operators are seen one by one."""
    rewires: list[Rewire | Rebuild]

    @property
    def path(self) -> str:
        return self.scope[-1][0] if self.scope else ""

    @property
    def touched(self) -> set[str]:
        return self.inside | {self.path}


def write(model: nn.Module, unit: Unit, edits: Edits) -> nn.Module:
    """Apply the edits of one unit to `model` in place; the model, or what stands for it if it became one layer."""
    # Looked up before a job removes some of them.
    transparent = {unit.module.get_submodule(path) for path in unit.transparent_paths()}
    for path, made in edits.slots.items():
        _replace(model, unit.module.get_submodule(path), made)
    for job in sorted(_jobs(edits.rewires), key=lambda job: -len(job.scope)):
        model = _rewrite(model, unit, job, transparent, simplify=edits.extent is Extent.EVERYTHING)
    return model


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` is registered, under one name or several."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def _jobs(rewires: list[Rewire | Rebuild]) -> list[_Job]:
    """Group rewires by the module that is to be rewritten; modules that overlap are rewritten as one."""
    jobs: list[_Job] = []
    for rewire in rewires:
        inside = {node.meta["scope"] for node in rewire.nodes}
        job = _Job(rewire.scope, _paths_below(rewire.scope, inside), [rewire])
        while overlapping := [other for other in jobs if other.touched & job.touched]:
            for other in overlapping:
                jobs.remove(other)
                job = _merged(job, other)
        jobs.append(job)
    return jobs


def _paths_below(scope: Scope, others: set[Scope]) -> set[str]:
    return {path for other in others for path, _ in other[len(scope) :]}


def _merged(one: _Job, other: _Job) -> _Job:
    if one.path == other.path:
        return _Job(min(one.scope, other.scope), one.inside | other.inside, one.rewires + other.rewires)
    scope = common_scope([one.scope, other.scope])
    below = _paths_below(scope, {one.scope, other.scope})
    return _Job(scope, one.inside | other.inside | below, one.rewires + other.rewires)


def _rewrite(
    model: nn.Module, unit: Unit, job: _Job, transparent: set[nn.Module], *, simplify: bool
) -> nn.Module:
    module = unit.module.get_submodule(job.path)
    opened = transparent | {unit.module.get_submodule(path) for path in job.inside}
    graph, constants = trace(module, unit.calls[job.scope], lambda child, _: child not in opened)
    for name, tensor in constants.items():
        module.register_buffer(name, tensor)
    found: dict[Any, fx.Node] = {_identity(node.meta["key"], module): node for node in graph.nodes}

    def here(node: fx.Node) -> fx.Node:
        return found[_identity(relative_key(node, job.scope), unit.module)]

    for changer, operand in unit.rebound:
        if _inside(changer, job):
            rebind(here(changer), here(changer).all_input_nodes[changer.meta["operands"].index(operand)])
    within = [r for r in job.rewires if r.scope[: len(job.scope)] == job.scope]
    # Assertions go too: they were met on the example, and what they look at may go.
    removable = checks(graph) | {here(node) for rewire in within for node in rewire.nodes}
    for rewire in within:
        if isinstance(rewire, Rebuild):
            rewire.write(graph, module, here)
        else:
            _rewire(graph, module, rewire, here)
    _clean(graph, module, removable)
    whole = module is model
    simple = None
    if simplify and not has_hooks(module):
        simple = _simplified(graph, module, unit.calls[job.scope])
    if simple is None and isinstance(module, fx.GraphModule):  # its class is made for its graph alone
        simple = _other_graph(module, graph)
    if simple is not None and (not whole or isinstance(simple, (_ConvNd, nn.Linear, fx.GraphModule))):
        _replace(model, module, simple.eval())
        return simple if whole else model
    _require_fixed_arguments(graph, fixed_arguments(module, unit.calls[job.scope]))
    become_plain(module, graph, keep_methods=whole)
    return model


def _other_graph(module: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    made = fx.GraphModule(module, graph, type(module).__name__)
    made._forward_hooks, made._forward_pre_hooks = module._forward_hooks, module._forward_pre_hooks
    return made


def _inside(node: fx.Node, job: _Job) -> bool:
    """Whether the operator is seen in the job's graph, and not hidden in a module that stays closed."""
    scope = node.meta["scope"]
    return scope[: len(job.scope)] == job.scope and _paths_below(job.scope, {scope}) <= job.inside


def _identity(key: Key, root: nn.Module) -> Any:
    """A key in which modules stand for their paths, so that it is the same seen from any enclosing module."""
    scope, label, number = key
    calls = tuple((id(root.get_submodule(path)), n) for path, n in scope)
    kind, _, target = label.partition(" ")
    return calls, (kind, id(root.get_submodule(target))) if kind == "call_module" else label, number


def _rewire(graph: fx.Graph, module: nn.Module, rewire: Rewire, here: Callable[[fx.Node], fx.Node]) -> None:
    root = here(rewire.root)
    source = _source(rewire, here)
    with graph.inserting_before(root):
        new = source
        if rewire.layer is not None:
            new = graph.call_module(_register(module, rewire.layer), (source,))
    root.replace_all_uses_with(new)


def _source(rewire: Rewire, here: Callable[[fx.Node], fx.Node]) -> fx.Node:
    """The node of the traced module that stands for the region's source."""
    candidates = set()
    for node in rewire.nodes:
        pairs = zip(node.all_input_nodes, here(node).all_input_nodes, strict=True)
        candidates |= {own for outer, own in pairs if outer is rewire.source}
    (source,) = candidates
    return source


def _register(module: nn.Module, layer: nn.Module) -> str:
    names = {name for name, child in module._modules.items() if child is layer}
    if names:
        return names.pop()
    name, number = "conv", 2
    while hasattr(module, name):
        name, number = f"conv_{number}", number + 1
    module.add_module(name, layer)
    return name


def _clean(graph: fx.Graph, module: nn.Module, removable: set[fx.Node]) -> None:
    """Remove what nothing reads any more, and the identities that stood between."""
    varying: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op in ("placeholder", "call_module", "output") or varying.intersection(node.all_input_nodes):
            varying.add(node)
    for node in reversed(list(graph.nodes)):
        if not node.users and (node in removable or node not in varying):
            graph.erase_node(node)
    for node in list(graph.nodes):
        if node.op == "call_module" and type(module.get_submodule(node.target)) is nn.Identity:
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.erase_node(node)
    for node in graph.nodes:
        node.meta.clear()
    graph.lint()


def _require_fixed_arguments(graph: fx.Graph, fixed: dict[str, Any]) -> None:
    """Let the graph refuse any other value of an argument that was fixed while it was traced."""
    for node in graph.nodes:
        if node.op == "placeholder" and not node.users and node.target in fixed:
            with graph.inserting_after(node):
                graph.call_function(require_fixed, (node, fixed[node.target], node.target))


def _simplified(graph: fx.Graph, module: nn.Module, arguments: Arguments) -> nn.Module | None:
    """One layer, or a sequence of them, where the graph is no more than that."""
    layers = _chain(graph)
    if layers is None or len(arguments[0]) != 1 or arguments[1]:
        return None
    if not layers:
        return nn.Identity()
    if len(layers) == 1:
        return module.get_submodule(layers[0])
    named = OrderedDict((target.replace(".", "_"), module.get_submodule(target)) for target in layers)
    return nn.Sequential(named) if len(named) == len(layers) else None


def _chain(graph: fx.Graph) -> list[str] | None:
    """The layers that the graph calls one after the other on its first input; None where it does anything else."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if not inputs or any(node.users for node in inputs[1:]):
        return None
    value = inputs[0]
    layers: list[str] = []
    while True:
        users = list(value.users)
        if len(users) != 1 or users[0].args[:1] != (value,):
            return None
        (value,) = users
        if value.op == "output":
            return layers if len(graph.nodes) == len(inputs) + len(layers) + 1 else None
        if value.op != "call_module" or len(value.args) != 1 or value.kwargs:
            return None
        layers.append(str(value.target))
