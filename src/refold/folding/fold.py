"""`fold` and `verify`: the whole way from any model to a plain one that is proved to compute the same."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

from refold.errors import InputError, NotFoldable
from refold.folding.cost import count
from refold.folding.distribution import Bundle, bundle
from refold.folding.edits import Edits, Extent, NewLayer, edits_of, new_layer
from refold.folding.planning import Planner, Region
from refold.folding.precision import release_memory
from refold.folding.proof import (
    LARGEST_DISTANCE,
    Proof,
    outputs,
    own_distances,
    prove_float64,
    prove_region,
    require_close,
    require_same,
    require_stable,
    sensitivity,
    shared_copy,
)
from refold.folding.reasons import operator_kind, reason_left
from refold.folding.recognition import is_batch_norm
from refold.folding.report import FoldedRegion, FoldReport
from refold.folding.rewriting import write
from refold.folding.tracing import Arguments, Unit, copy_tensors, first_line, plain_mode
from refold.folding.units import Untraced, find_units


def fold(model: nn.Module, example_input: Any, *, prove: bool = True) -> nn.Module:
    """A plain network that computes what `model` computes in evaluation mode, every linear part one layer.

    `example_input` is what the model is called with: a tensor, `[batch, channels, *size]` as a rule, or the tuple of
    positional arguments. The model is left untouched; the result keeps its class, dtype, device and methods, is in
    evaluation mode, and carries a `FoldReport` as `fold_report`. With `prove` (the default) every region is proved in
    float64, borders included, at two sizes, and then the whole network.

    Raises `InputError` where the model does not run on the example, `NotEquivalent` where the proof fails.
    """
    with plain_mode():
        return _fold(model, as_arguments(example_input), prove)


def verify(reference: nn.Module, candidate: nn.Module, example_input: Any) -> Proof:
    """Measure how far `candidate` is from `reference`, both in evaluation mode, on `example_input` (as for `fold`).

    Two float64 networks must agree to 1e-9 of the largest output; in lower precision the candidate may be no further
    from the float64 result than 4 times the distance of the reference run in the same dtype.

    Raises `NotEquivalent`, which carries the proof, where they do not; `InputError` where one of them does not run.
    """
    with plain_mode():
        return _verify(reference, candidate, as_arguments(example_input))


def as_arguments(example_input: Any) -> Arguments:
    """The call that an example input stands for."""
    return (example_input if isinstance(example_input, tuple) else (example_input,)), {}


def _fold(model: nn.Module, arguments: Arguments, prove: bool) -> nn.Module:
    _require_runs(model, arguments)
    before = count(shared_copy(model), arguments[0])
    extents, notes = iter(Extent), _notes(model)
    while True:
        work = _runnable_work(model, arguments, prove, extents, notes)
        proof = _prove_whole(model, work, arguments, notes) if prove else None
        _settle(model, work)
        after = count(shared_copy(work.model), arguments[0])
        if after.macs <= before.macs:
            break
        notes.append(
            f"less was folded: it would have taken {after.macs:,} multiply-accumulates, not {before.macs:,}"
        )
    if proof is not None:
        original, folded = _own_distances(model, work.model, arguments)
        proof = replace(proof, original_distance=original, folded_distance=folded)
        require_close(proof)
    name = type(model).__name__
    if after.batch_norms and not work.left:
        work.left.append((name, f"{after.batch_norms} batch norms run as operators that are not recognised"))
    report = FoldReport(name, work.folded, work.left, before, after, proof, notes)
    work.model.fold_report = report  # type: ignore[assignment]
    return work.model


def _verify(reference: nn.Module, candidate: nn.Module, arguments: Arguments) -> Proof:
    for model in (reference, candidate):
        _require_runs(model, arguments)
    if not outputs(reference, arguments):
        raise InputError(f"{type(reference).__name__} returns no tensor that could be compared.")
    inputs = _proof_inputs(reference, arguments)
    distance = prove_float64(reference, candidate, inputs)
    original, folded = _own_distances(reference, candidate, arguments)
    proof = Proof(distance, _shapes(inputs), original, folded)
    if original is None:
        require_same(proof)
    require_stable(proof)
    require_close(proof)
    return proof


@dataclass
class _Work:
    """One attempt to fold: the copy that is edited, and the account of it."""

    model: nn.Module
    arguments: Arguments
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
            self.folded += [_describe(planner, region) for b in edits.applied for region in b.regions]
            self.outcomes.append((planner, edits))
        self.left = _left(self.outcomes, untraced) + _unseen(self.model, self.outcomes, untraced)

    def write(self) -> None:
        """Put the edits into the copy."""
        for planner, edits in self.outcomes:
            self.model = write(self.model, planner.unit, edits)
        self.outcomes.clear()

    def _made(self, planner: Planner) -> list[tuple[Bundle, list[NewLayer]]]:
        """The bundles that hold their proof, with their layers."""
        made = []
        # From the end on, where layers are largest as a rule: little else is in memory then.
        for candidate in reversed(bundle(planner, planner.plan())):
            try:
                layers = [self._layer(planner, region) for region in candidate.regions]
            except NotFoldable as refusal:
                planner.refusals.update(dict.fromkeys(candidate.operators, str(refusal)))
                continue
            made.append((candidate, layers))
            release_memory()
        return made[::-1]

    def _layer(self, planner: Planner, region: Region) -> NewLayer:
        convolution = region.convolution()
        if self.prove:
            self.proved.append(prove_region(region, convolution, planner.constants))
        return new_layer(planner.unit, region, convolution)


def _hidden(model: nn.Module, units: list[Unit], untraced: list[Untraced]) -> list[nn.Module]:
    """The modules that only code which cannot be traced calls."""
    seen = [unit.path for unit in units if unit.path]
    found = {}
    for item in untraced:
        for name, module in model.get_submodule(item.path).named_modules(prefix=item.path):
            if name != item.path and not any(name == path or name.startswith(f"{path}.") for path in seen):
                found[id(module)] = module
    return list(found.values())


def _require_runs(model: nn.Module, arguments: Arguments) -> None:
    name = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            f"{name} is a TorchScript module, which nobody can look into; fold it before it is compiled."
        )
    try:
        shared_copy(model)
    except Exception as error:
        raise InputError(
            f"{name} cannot be copied: {first_line(error)}; remove from the model what cannot be copied."
        ) from error
    try:
        outputs(model, arguments)
    except Exception as error:
        shapes = (
            ", ".join(str(tuple(v.shape)) for v in tree_leaves(arguments) if isinstance(v, Tensor)) or "none"
        )
        raise InputError(
            f"{name} cannot run on the example input (shape {shapes}): {first_line(error)}; "
            "give an input that its forward pass accepts."
        ) from error


def _notes(model: nn.Module) -> list[str]:
    if any(module.training for module in model.modules()):
        return ["the model was in training mode; what it computes in evaluation mode was folded"]
    return []


def _settle(original: nn.Module, work: _Work) -> None:
    """Give the result its own copy of every tensor that it still shares with the model."""
    _restore_attributes(original, work)
    shared = {id(parameter) for parameter in original.parameters()}
    copies: dict[int, nn.Parameter] = {}
    for module in work.model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in shared:
                module._parameters[name] = copies.setdefault(id(parameter), copy.deepcopy(parameter))
    # Running the example may have changed what the forward pass itself keeps, a counter for example.
    before = dict(original.named_buffers())
    for name, buffer in work.model.named_buffers():
        if name in before and before[name].shape == buffer.shape:
            buffer.copy_(before[name])


def _restore_attributes(original: nn.Module, work: _Work) -> None:
    """Take back what tracing and running left in the attributes of modules: caches above all."""
    made = {id(part) for layer in work.made for part in layer.module.modules()}
    before = dict(original.named_modules())
    for path, module in work.model.named_modules():
        old = before.get(path)
        if old is None or id(module) in made or not isinstance(module, type(old)):
            continue
        for name in set(vars(module)) - set(vars(old)):
            delattr(module, name)
        for name, value in vars(old).items():
            plain = isinstance(value, (dict, list, set)) and not name.startswith("_")
            if plain and not any(isinstance(leaf, nn.Module) for leaf in tree_leaves(value)):
                setattr(module, name, copy.deepcopy(value))


def _runnable_work(
    model: nn.Module, arguments: Arguments, prove: bool, extents: Iterator[Extent], notes: list[str]
) -> _Work:
    """Fold as much as leaves a network that runs: code around a folded block may ask for what is no longer there."""
    for extent in extents:
        work = _Work(shared_copy(model).eval(), arguments, prove, extent)
        work.plan()
        try:
            work.write()
            outputs(work.model, arguments, float64=True)
            break
        except Exception as error:
            if extent is not Extent.EVERYTHING:
                notes.append(f"less was folded: the rewritten network did not run ({first_line(error)})")
    return work


def _prove_whole(model: nn.Module, work: _Work, arguments: Arguments, notes: list[str]) -> Proof:
    """Prove the network in float64, the new layers as they were before they were rounded."""
    inputs = _proof_inputs(model, arguments)
    exact = {identity: compute for layer in work.made for identity, compute in layer.exact().items()}
    distance = prove_float64(model, work.model, inputs, exact)
    proof = Proof(distance, _shapes(inputs), regions=len(work.proved), worst_region=max([0.0, *work.proved]))
    if distance > LARGEST_DISTANCE:
        proof = replace(proof, sensitivity=sensitivity(model, inputs))
        notes.append(
            f"the network amplifies rounding: the last bit of its input changes its output by {proof.sensitivity:.0e}, "
            "so that only its regions, one by one, can be proved to better than that"
        )
    if not outputs(model, arguments):
        notes.append("the network returns no tensor that could be compared: only its regions were proved")
    require_same(proof)
    return proof


def _proof_inputs(reference: nn.Module, arguments: Arguments) -> list[Arguments]:
    """The example, and random input of another size where the network accepts one."""
    for axis in (-2, -1):
        other = _another_size(arguments, axis)
        try:
            outputs(reference, other)
        except Exception:  # many networks accept one size only
            continue
        return [arguments, other]
    return [arguments]


def _shapes(inputs: list[Arguments]) -> tuple[str, ...]:
    def named(arguments: Arguments) -> str:
        return " ".join("×".join(map(str, v.shape)) for v in tree_leaves(arguments) if isinstance(v, Tensor))

    return tuple(named(arguments) for arguments in inputs)


def _another_size(arguments: Arguments, axis: int) -> Arguments:
    """Random input about three quarters as large along one axis, in steps of 32 for networks with five halvings."""
    generator = torch.Generator().manual_seed(1)

    def resized(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        shape = list(value.shape)
        if value.dim() >= 3:
            step = 32 if shape[axis] > 64 else 1
            shape[axis] = max(step, shape[axis] * 3 // 4 // step * step)
        return torch.randn(shape, generator=generator).to(value)

    return tree_map(resized, copy_tensors(arguments))  # type: ignore[no-any-return]


def _own_distances(
    reference: nn.Module, candidate: nn.Module, arguments: Arguments
) -> tuple[float | None, float | None]:
    return own_distances(reference, candidate, arguments) or (None, None)


def _describe(planner: Planner, region: Region) -> FoldedRegion:
    kinds = Counter(operator_kind(node, planner) for node in region.operators)
    convolution = region.structure
    size = "×".join(map(str, convolution.kernel_size))
    kind = f"{size} convolution" if size else "linear"
    if region.rescales:
        kind = type(planner.unit.attribute(str(region.source.target))).__name__
    groups = f", {convolution.groups} groups" if convolution.groups > 1 and not region.rescales else ""
    channels = f"{convolution.in_channels} to {convolution.out_channels} channels"
    path = planner.unit.full_path(region.root.meta["scope"][-1][0] if region.root.meta["scope"] else "")
    return FoldedRegion(path, dict(kinds), f"{kind}, {channels}{groups}")


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
    return planner.unit.full_path(node.meta["scope"][-1][0] if node.meta["scope"] else "")
