"""What has to be said of a fold, each in one line: what was assumed, fixed, or not seen."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import nn

from refold.folding.rewrite import Rewrite
from refold.recording.arguments import Arguments, shapes_named
from refold.recording.surroundings import Recorded


def remarks(model: nn.Module, recorded: Recorded) -> list[str]:
    notes = []
    if any(module.training for module in model.modules()):
        notes.append("the model was in training mode; what it computes in evaluation mode was folded")
    if recorded.first.random:
        notes.append(
            "the forward pass draws random numbers: it was proved with the same ones before and after"
        )
    fixed = _fixed_arguments(model, recorded.first.arguments)
    if fixed:
        notes.append(f"the fold holds for {', '.join(fixed)}, as in the example; fold again for other values")
    rounded = [dtype for dtype in recorded.first.rounds_to if dtype in (torch.float16, torch.bfloat16)]
    if rounded:
        names = " and ".join(str(dtype).removeprefix("torch.") for dtype in rounded)
        notes.append(f"the network rounds to {names} on its way, which the proof in float64 leaves out")
    return notes


def unseen_turns(recorded: Recorded, rewrites: Sequence[Rewrite]) -> list[str]:
    """What has to be said of code that decides by sizes and around which layers were folded in their places."""
    folded = {node.meta["scope"] for rewrite in rewrites if len(rewrite.nodes) > 1 for node in rewrite.nodes}
    paths = list(
        dict.fromkeys(scope[-1].path or "the model" for scope, _ in recorded.turns if scope in folded)
    )
    if not paths:
        return []
    named = ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
    sizes = " and ".join(shapes_named(arguments) for arguments in recorded.sizes)
    return [
        f"the code of {named} decides by the size of its input: what was folded there was seen at {sizes}"
    ]


def _fixed_arguments(model: nn.Module, arguments: Arguments) -> list[str]:
    """The arguments of the forward pass, defaults included, that are no tensors in the example."""
    signature = inspect.signature(model.forward)
    bound = signature.bind(*arguments[0], **arguments[1])
    bound.apply_defaults()
    values = {n: v for n, v in bound.arguments.items() if isinstance(v, (bool, int, float, str, type(None)))}
    return [f"{name}={value!r}" for name, value in values.items()]
