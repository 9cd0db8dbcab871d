"""What is folded of models that other tools have wrapped, and which of them cannot be."""

from __future__ import annotations

import copy
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
    compiled = _compiled_class()
    if not any(isinstance(module, compiled) for module in model.modules()):
        return model, []
    note = "what torch.compile had wrapped was folded; compile the result again"
    if isinstance(model, compiled):
        return unwrapped(_inner(model))[0], [note]
    known: dict[int, Any] = {id(value): value for value in (*model.parameters(), *model.buffers())}
    known |= {id(m): m for m in model.modules() if isinstance(m, compiled)}
    model = copy.deepcopy(model, known)
    for parent in list(model.modules()):
        for child_name, child in parent._modules.items():
            if isinstance(child, compiled):
                parent._modules[child_name] = _inner(child)
    return model, [note]


def _compiled_class() -> type[nn.Module]:
    from torch._dynamo.eval_frame import OptimizedModule

    return OptimizedModule


def _inner(module: nn.Module) -> nn.Module:
    while isinstance(module, _compiled_class()):
        module = module._orig_mod  # type: ignore[assignment]  # an attribute of torch's own class
    return module
