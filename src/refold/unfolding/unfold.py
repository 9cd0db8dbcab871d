"""`unfold`: a copy of any model with training-time branches beside its convolutions."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from refold.blocks.parallel import BranchComputation
from refold.conversion.observation import run_once
from refold.errors import InputError, NotEquivalent, first_line
from refold.models.images import example_input as default_input
from refold.unfolding.plans import Kind, Plan, find_plan
from refold.unfolding.rebuilding import add_branches, described, require_no_branches
from refold.unfolding.report import UnfoldedLayer, UnfoldReport
from refold.unfolding.selection import UnfoldableLayer, observe

Start = Literal["preserving", "random"]


@torch.inference_mode(False)  # what is made in inference mode can never be trained
def unfold(
    model: nn.Module,
    plan: str | Path | Plan = "ghostnetv3",
    *,
    kinds: Kind | Collection[Kind] | None = None,
    layers: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
    stages: int | Collection[int] | None = None,
    branches: int | Mapping[str, int] | None = None,
    start: Start = "preserving",
    form: BranchComputation = "auto",
    example_input: Any = None,
) -> nn.Module:
    """A copy of `model` with training-time branches, which `refold.fold` takes back to the original architecture.

    `plan` names one of `refold.unfolding.PLANS` or a YAML or JSON file, or is a `Plan`. Layers can be limited to some
    `kinds` ("pointwise", "depthwise", "dense", "grouped"), to names that match one of the shell patterns `layers` and
    none of `exclude`, and to `stages`: how often the image was halved before the layer's output. `branches` is the
    number of kernels of the layer's own size, the layer's own among them: one number, or one for each pattern of
    names, the first match counting; by default that of the plan.

    The batch norm that alone reads a convolution becomes that of its first branch, as in the papers. With the
    "preserving" `start` all other branches begin with a batch norm scale of zero: the model computes exactly what it
    did, in evaluation and in training mode, and a branch grows as far as its gradient asks for; its random kernel
    makes it different from its neighbours. With "random" they begin at one, as in the papers' training from scratch.

    `form` is how the branches run in training mode (`refold.unfolding.ParallelBranches`). The model runs once on
    `example_input` (one image of its own size by default; a tensor or the tuple of positional arguments), so that its
    layers are known. The argument is untouched; the result has its class, device, dtype and mode, and an
    `UnfoldReport` as `unfold_report`.

    Raises `InputError` for a plan, kind, pattern, stage or number that does not exist, where nothing can be unfolded,
    and where the model is compiled, unfolded already or cannot be copied; `NotEquivalent` where the result does not
    compute what the model did.

    Examples:
        >>> import refold
        >>> wide = refold.unfold(refold.create_model("resnet10t"), "repvgg")
        >>> print(wide.unfold_report)
        repvgg: 11 layers unfolded (11 dense)
    """
    chosen = find_plan(plan)
    if start not in get_args(Start):
        raise InputError(f"There is no start '{start}'; choose one of {', '.join(get_args(Start))}.")
    if form not in get_args(BranchComputation):
        raise InputError(
            f"There is no form '{form}'; choose one of {', '.join(get_args(BranchComputation))}."
        )
    wide = _copy(model)
    given = default_input(model) if example_input is None else example_input
    arguments = given if isinstance(given, tuple) else (given,)
    seen = observe(wide, arguments)
    if not seen.unfoldable:
        raise InputError(_nothing_to_unfold(model))
    report = described(UnfoldReport(chosen.name, [], seen.norms, form), wide)
    name = type(model).__name__
    selected = _select(
        seen.unfoldable, chosen, _several(kinds), _several(layers), _several(exclude), _several(stages), name
    )
    repeats = _repeats(selected, branches, chosen)
    asked = [
        UnfoldedLayer(c.path, c.norm, c.kind, c.stage, 1, False, tuple(chosen.rules[c.kind]), repeats[c.path])
        for c in selected
    ]
    scale = 0.0 if start == "preserving" else 1.0
    added = [add_branches(wide, layer, scale, form) for layer in asked]
    unfolded = [layer for layer in added if layer is not None]
    if not unfolded:
        names = ", ".join(candidate.path for candidate in selected[:5])
        raise InputError(
            f"No branch of the plan '{chosen.name}' fits any of the {len(selected)} layers chosen ({names}); choose "
            "other layers, another plan or more branches."
        )
    report = dataclasses.replace(report, layers=unfolded, before=_history(wide))
    wide.unfold_report = report  # type: ignore[assignment]  # nn.Module types its attributes as tensors and modules
    if start == "preserving":
        _require_same(seen.outputs, wide, arguments)
    return wide


def _copy(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise InputError(
            f"A network is unfolded, not {model!r}; build it first, such as by refold.create_model."
        )
    name = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule) or hasattr(model, "_orig_mod"):
        raise InputError(f"{name} is compiled, so that its layers stay as they are; unfold it before.")
    require_no_branches(model)
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise InputError(
            f"{name} cannot be copied: {first_line(error)}; remove from the model what cannot be copied."
        ) from error


def _history(model: nn.Module) -> dict[str, Any] | None:
    """How a plain model came to be. The model is in training form from here on, and loses its report of the fold."""
    own = vars(model)
    folded, unfolded = own.pop("fold_report", None), own.pop("unfold_report", None)
    if folded is None:
        return None
    if "card" in own:
        own["card"] = dataclasses.replace(own["card"], form="training", fold=None)
    return {"fold": folded.options, "unfold": None if unfolded is None else unfolded.to_dict()}


def _several(given: Any) -> Any:
    """A single text or number as a list of one; None stays None."""
    return [given] if isinstance(given, (str, int)) else given


def _nothing_to_unfold(model: nn.Module) -> str:
    counted = Counter(type(module).__name__ for module in model.modules() if isinstance(module, _ConvNd))
    there = ", ".join(f"{number} {name}" for name, number in counted.items()) or "no convolution"
    return (
        f"{type(model).__name__} has nothing to unfold: it has {there}, and what takes branches is an nn.Conv2d inside "
        "a model that runs once, pads with zeros, writes more than one pixel, and has a bias or a batch norm behind it."
    )


def _select(
    found: Sequence[UnfoldableLayer],
    plan: Plan,
    kinds: Collection[Kind] | None,
    layers: Sequence[str],
    exclude: Sequence[str],
    stages: Collection[int] | None,
    model: str,
) -> list[UnfoldableLayer]:
    """The candidates that were asked for. Raises InputError where a condition matches nothing, saying what there is."""
    for kind in kinds or ():
        if kind not in get_args(Kind):
            raise InputError(f"There is no kind of layer '{kind}'; choose from {', '.join(get_args(Kind))}.")
    for pattern in (*layers, *exclude):
        if not any(fnmatchcase(candidate.path, pattern) for candidate in found):
            names = ", ".join(candidate.path for candidate in found[:20])
            more = f" and {len(found) - 20} more" if len(found) > 20 else ""
            raise InputError(
                f"No layer of {model} that can be unfolded matches '{pattern}'; there are: {names}{more}."
            )
    for stage in stages or ():
        if stage not in {candidate.stage for candidate in found}:
            known = ", ".join(map(str, sorted({candidate.stage for candidate in found})))
            raise InputError(
                f"No layer of {model} that can be unfolded is in stage {stage}; there are: {known}."
            )
    selected = [
        candidate
        for candidate in found
        if candidate.kind in plan.rules
        and (kinds is None or candidate.kind in kinds)
        and any(fnmatchcase(candidate.path, pattern) for pattern in layers)
        and not any(fnmatchcase(candidate.path, pattern) for pattern in exclude)
        and (stages is None or candidate.stage in stages)
    ]
    if not selected:
        counted = Counter(candidate.kind for candidate in found)
        there = ", ".join(f"{number} {kind}" for kind, number in counted.items())
        raise InputError(
            f"The plan '{plan.name}' adds branches to {', '.join(plan.rules)} layers, and none of {model} that was "
            f"asked for is one; it has {there}."
        )
    return selected


def _repeats(
    selected: Sequence[UnfoldableLayer], branches: int | Mapping[str, int] | None, plan: Plan
) -> dict[str, int]:
    rules = plan.repeats if branches is None else branches
    if not isinstance(rules, Mapping):
        rules = {"*": rules}
    for pattern, number in rules.items():
        if not isinstance(number, int):
            raise InputError(f"branches is {number!r} for '{pattern}'; give a whole number.")
        if number < 1:
            raise InputError(
                f"{number} branches for '{pattern}' are too few; the layer itself is one, so 1 or more."
            )
        if not any(fnmatchcase(candidate.path, pattern) for candidate in selected):
            names = ", ".join(candidate.path for candidate in selected[:20])
            raise InputError(f"The number of branches for '{pattern}' concerns no layer; there are: {names}.")
    return {
        candidate.path: next(
            (number for pattern, number in rules.items() if fnmatchcase(candidate.path, pattern)),
            plan.repeats,
        )
        for candidate in selected
    }


@torch.no_grad()
def _require_same(outputs: Sequence[Tensor], wide: nn.Module, arguments: tuple[Any, ...]) -> None:
    """Run it in evaluation mode and compare: the code of a model may do with its layers what nobody foresees."""
    name = type(wide).__name__
    if any(output.is_meta for output in outputs):
        return  # no values, so that nothing can differ
    try:
        results = run_once(wide, arguments)
    except Exception as error:
        raise InputError(
            f"{name} does not run with branches: {error}; leave out the layer with exclude."
        ) from error
    for expected, found in zip(outputs, results, strict=True):
        same = (found == expected) | (found.isnan() & expected.isnan())
        distance = torch.where(same, 0, found - expected).abs()
        if same.all():
            continue
        largest = float(expected.abs().max())
        if not float(distance.max()) <= 1e3 * torch.finfo(expected.dtype).eps * largest:
            raise NotEquivalent(
                f"{name} computes something else with branches: outputs differ by {float(distance.max()):.1e} at "
                f"{largest:.1e}; leave out layers with exclude."
            )
