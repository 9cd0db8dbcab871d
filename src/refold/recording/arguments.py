"""What a model is called with: examples as calls, and the same call at another size."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def as_arguments(model: nn.Module, example_input: Any) -> Arguments:
    """The call that an example stands for: a tuple by position; a dictionary by name, where the forward pass has
    parameters of all these names; anything else as the one argument."""
    if isinstance(example_input, tuple):
        return example_input, {}
    if isinstance(example_input, Mapping) and example_input:
        parameters = inspect.signature(model.forward).parameters
        if all(isinstance(name, str) and name in parameters for name in example_input):
            return (), dict(example_input)
    return (example_input,), {}


def copy_tensors(values: Any) -> Any:
    """The same structure with every tensor copied, since a forward pass may change its input in place."""
    return tree_map(lambda v: v.detach().clone() if isinstance(v, Tensor) else v, values)


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in a structure, those inside of objects too."""
    found: list[Tensor] = []
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, (type, nn.Module)):
            found += tensors_in(list(vars(leaf).values()))
    return found


def shapes_named(arguments: Arguments) -> str:
    """The shapes of all tensors of a call, in words: `1×3×224×224`."""
    return " ".join("×".join(map(str, v.shape)) for v in tree_leaves(arguments) if isinstance(v, Tensor))


def shapes_listed(arguments: Arguments) -> str:
    """The shapes of all tensors of a call as Python prints them; "none" where there is none."""
    shapes = [str(tuple(v.shape)) for v in tree_leaves(arguments) if isinstance(v, Tensor)]
    return ", ".join(shapes) or "none"


def other_sizes(arguments: Arguments) -> Iterator[Arguments]:
    """The same call on random input of other sizes, those first that tell most: odd sides and another batch; sides
    that networks with five halvings take; another batch alone."""
    batches = [value for value in arguments[0] + tuple(arguments[1].values()) if isinstance(value, Tensor)]
    shapes = {tuple(value.shape) for value in batches}
    maps = [
        v for v in tree_leaves(arguments) if isinstance(v, Tensor) and v.dim() > 2 and v.is_floating_point()
    ]
    if maps:
        yield _resized(arguments, batches, step=1)
        if any(side > 32 for value in maps for side in value.shape[2:] or value.shape[1:]):
            yield _resized(arguments, batches, step=32)
    if shapes:
        yield _resized(arguments, batches, step=0)
    elif maps:
        yield _resized(arguments, batches, step=0, along=-2)


def _resized(arguments: Arguments, batches: list[Tensor], step: int, along: int | None = None) -> Arguments:
    """Other sides, in steps (0: the same), and another batch for the tensors that are arguments themselves."""
    generator = torch.Generator().manual_seed(1)
    direct = {id(value) for value in batches}

    def resized(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if not value.dim():
            return value.detach().clone()
        shape = list(value.shape)
        first = 2 if id(value) in direct else 1
        for axis in range(first, len(shape)) if value.is_floating_point() else ():
            if step or axis == len(shape) + (along or 0):
                shape[axis] = _other_side(shape[axis], step or 1, share=(3 + axis) / 10)
        if id(value) in direct and len(shape) > 1:
            shape[0] = shape[0] - 1 if shape[0] > 1 else 2
        if not value.is_floating_point():
            return (
                value.detach().clone()[: shape[0]] if shape[:1] <= list(value.shape[:1]) else _repeated(value)
            )
        return torch.randn(shape, generator=generator).to(value)

    return tree_map(resized, arguments)  # type: ignore[no-any-return]  # tree_map keeps the structure


def _repeated(value: Tensor) -> Tensor:
    return torch.cat([value, value]) if value.dim() > 1 else value.detach().clone()


def _other_side(side: int, step: int, share: float) -> int:
    if step > 1:
        return max(step, int(side * share) // step * step) if side > step else side
    if side < 8:  # smaller ones would often be the same again behind a stride
        return side + 5
    other = int(side * share)
    return other + 1 if other % 2 == side % 2 else other


@contextmanager
def plain_mode() -> Iterator[None]:
    """No gradients, no autocast, and tensors that count their changes even inside `torch.inference_mode`."""
    cuda = torch.amp.autocast("cuda", enabled=False) if torch.cuda.is_available() else nullcontext()
    with torch.inference_mode(False), torch.no_grad(), torch.amp.autocast("cpu", enabled=False), cuda:
        yield
