"""What is folded of models that other tools have wrapped, and which of them cannot be."""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import nn

from refold.errors import InputError

_PREPARED = ("torch.ao.quantization", "torch.ao.nn.qat", "torch.ao.nn.intrinsic.qat", "torch.quantization")


def unwrapped(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """The model without `torch.compile` around it or its parts, and what was taken off, in words.

    Raises `InputError` for TorchScript, for models that are prepared for quantisation, and for those without weights.
    """
    name = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            f"{name} is a TorchScript module, which nobody can look into; fold it before it is compiled."
        )
    prepared = next((m for m in model.modules() if type(m).__module__.startswith(_PREPARED)), None)
    if prepared is not None:
        raise InputError(
            f"{name} is prepared for quantisation (it holds a {type(prepared).__name__}), which measures what folding "
            "would take away; fold the model first and prepare the result."
        )
    if any(value.is_meta for value in (*model.parameters(), *model.buffers())):
        raise InputError(
            f"{name} has no weights: they are on the device 'meta'; load it on the CPU or another device first."
        )
    if not any(map(_is_compiled, model.modules())):
        return model, []
    note = "what torch.compile had wrapped was folded; compile the result again"
    if _is_compiled(model):
        return unwrapped(_inner(model))[0], [note]
    known: dict[int, Any] = {id(value): value for value in (*model.parameters(), *model.buffers())}
    known |= {id(m): m for m in model.modules() if _is_compiled(m)}
    model = copy.deepcopy(model, known)
    for parent in list(model.modules()):
        for child_name, child in parent._modules.items():
            if child is not None and _is_compiled(child):
                parent._modules[child_name] = _inner(child)
    return model, [note]


def _is_compiled(module: nn.Module) -> bool:
    # Asked of a class that is there only where something was compiled: importing the compiler takes seconds.
    compiler: Any = sys.modules.get("torch._dynamo.eval_frame")
    return compiler is not None and isinstance(module, compiler.OptimizedModule)


def _inner(module: nn.Module) -> nn.Module:
    while _is_compiled(module):
        module = module._orig_mod  # type: ignore[assignment]  # an attribute of torch's own class
    return module
