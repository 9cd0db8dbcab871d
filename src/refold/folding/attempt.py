"""One attempt to fold: a copy of the model, what is planned and written in it, and the account of both."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from refold.errors import NotFoldable
from refold.folding.edits import Candidate, Edits, Extent, edits_of
from refold.folding.layers import NewLayer
from refold.folding.planning import Planner
from refold.folding.precision import release_memory
from refold.folding.reasons import reason_left
from refold.folding.recognition import is_batch_norm
from refold.folding.report import FoldedRegion
from refold.folding.rewriting import write
from refold.folding.tracing import Arguments, Unit
from refold.folding.units import Untraced, find_units

Finder = Callable[[Planner], list[Candidate]]


@dataclass
class Attempt:
    """One attempt to fold: the copy that is edited, and the account of it."""

    model: nn.Module
    arguments: Arguments
    find: Finder
    """What to fold in a unit."""
    prove: bool
    extent: Extent
    proved: list[float] = field(default_factory=list)
    folded: list[FoldedRegion] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)
    made: list[NewLayer] = field(default_factory=list)
    outcomes: list[tuple[Planner, Edits]] = field(default_factory=list)

    def plan(self) -> None:
        """Choose and prove the regions of every unit, and say what is left."""
        units, untraced = find_units(self.model, self.arguments)
        held = Counter(identity for unit in units for identity in unit.called_modules())
        held.update(id(module) for module in _hidden(self.model, units, untraced))
        shared = {identity for identity, times in held.items() if times > 1}
        for unit in units:
            planner = Planner(unit)
            edits = edits_of(planner, self._made(planner), shared, self.extent)
            self.made += edits.made
            self.folded += [region for each in edits.applied for region in each.folded]
            self.outcomes.append((planner, edits))
        self.left = _left(self.outcomes, untraced) + _unseen(self.model, self.outcomes, untraced)

    def write(self) -> None:
        """Put the edits into the copy."""
        for planner, edits in self.outcomes:
            self.model = write(self.model, planner.unit, edits)
        self.outcomes.clear()

    def settle(self, original: nn.Module) -> None:
        """Give the copy a tensor of its own for every one that it still shares with the original."""
        _restore_attributes(original, self)
        shared = {id(parameter) for parameter in original.parameters()}
        copies: dict[int, nn.Parameter] = {}
        for module in self.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) in shared:
                    module._parameters[name] = copies.setdefault(id(parameter), copy.deepcopy(parameter))
        # Running the example may have changed what the forward pass itself keeps, a counter for example.
        before = dict(original.named_buffers())
        for name, buffer in self.model.named_buffers():
            if name in before and before[name].shape == buffer.shape:
                buffer.copy_(before[name])

    def _made(self, planner: Planner) -> list[tuple[Candidate, list[NewLayer]]]:
        """The candidates that hold their proof, with their layers."""
        made = []
        # From the end on, where layers are largest as a rule: little else is in memory then.
        for candidate in reversed(self.find(planner)):
            try:
                layers, distances = candidate.make(self.prove)
            except NotFoldable as refusal:
                planner.refusals.update(dict.fromkeys(candidate.operators, str(refusal)))
                continue
            self.proved += distances
            made.append((candidate, layers))
            release_memory()
        return made[::-1]


def _hidden(model: nn.Module, units: list[Unit], untraced: list[Untraced]) -> list[nn.Module]:
    """The modules that only code which cannot be traced calls."""
    seen = [unit.path for unit in units if unit.path]
    found = {}
    for item in untraced:
        for name, module in model.get_submodule(item.path).named_modules(prefix=item.path):
            if name != item.path and not any(name == path or name.startswith(f"{path}.") for path in seen):
                found[id(module)] = module
    return list(found.values())


def _restore_attributes(original: nn.Module, attempt: Attempt) -> None:
    """Take back what tracing and running left in the attributes of modules: caches above all."""
    made = {id(part) for layer in attempt.made for part in layer.module.modules()}
    before = dict(original.named_modules())
    for path, module in attempt.model.named_modules():
        old = before.get(path)
        if old is None or id(module) in made or not isinstance(module, type(old)):
            continue
        for name in set(vars(module)) - set(vars(old)):
            delattr(module, name)
        for name, value in vars(old).items():
            plain = isinstance(value, (dict, list, set)) and not name.startswith("_")
            if plain and not any(isinstance(leaf, nn.Module) for leaf in tree_leaves(value)):
                setattr(module, name, copy.deepcopy(value))


def _left(outcomes: list[tuple[Planner, Edits]], untraced: list[Untraced]) -> list[tuple[str, str]]:
    """Every batch norm that stays and every module that was not looked into, with the reason."""
    replaced = {planner.unit.full_path(path) for planner, edits in outcomes for path in edits.slots}
    left = [(item.path or "the whole model", item.reason) for item in untraced if item.path not in replaced]
    for planner, edits in outcomes:
        folded = {node for applied in edits.applied for node in applied.operators}
        remaining = [node for node in _batch_norms(planner) if node not in folded]
        left += [(_name(planner, node), reason_left(node, planner)) for node in remaining]
    return list(dict.fromkeys(left))


def _unseen(
    model: nn.Module, outcomes: list[tuple[Planner, Edits]], untraced: list[Untraced]
) -> list[tuple[str, str]]:
    """The batch norms that are in no graph, and why."""
    seen = {_name(planner, node) for planner, _ in outcomes for node in _batch_norms(planner)}
    opaque = {item.path for item in untraced}
    found = []
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and name not in seen and name:
            alone = name.rpartition(".")[0] in opaque
            reason = (
                "the code around it cannot be traced" if alone else "it does not run on the example input"
            )
            found.append((name, reason))
    return found


def _batch_norms(planner: Planner) -> list[fx.Node]:
    constants = planner.constants
    return [n for n in planner.unit.graph.nodes if constants.varies(n) and is_batch_norm(n, constants)]


def _name(planner: Planner, node: fx.Node) -> str:
    if node.op == "call_module":
        return planner.unit.full_path(str(node.target))
    return planner.unit.full_scope(node.meta["scope"])
