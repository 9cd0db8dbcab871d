"""How many classes a network tells apart, and whether names for them are as many."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from refold.errors import InputError
from refold.models.images import example_input


def check_class_names(class_names: Sequence[str], classes: int, where: str) -> None:
    """Raise `InputError` unless there is one name for each class; ``where`` says whose names they are."""
    if len(class_names) != classes:
        raise InputError(
            f"{where} has {len(class_names)} class names for a network of {classes} classes; give one name a class, "
            "in the order of the outputs."
        )


def class_count(model: nn.Module) -> int | None:
    """The number of a network's classes: what it says itself, as timm's do, else the length of its answer.

    None where the answer is no row of numbers, or cannot be had without computing it.
    """
    said: Any = getattr(model, "num_classes", None)
    if isinstance(said, int):
        return said
    modes = [(module, module.training) for module in model.modules()]
    try:
        # Shapes alone, so that it takes neither time nor memory.
        held = {name: value.to("meta") for name, value in model.state_dict().items()}
        answer = functional_call(model.eval(), held, (example_input(model).to("meta"),))
    except Exception:  # a network of somebody else's, which may do anything with its input
        return None
    finally:
        for module, mode in modes:
            module.training = mode
    is_row = isinstance(answer, Tensor) and answer.dim() == 2 and answer.device == torch.device("meta")
    return answer.shape[1] if is_row else None
