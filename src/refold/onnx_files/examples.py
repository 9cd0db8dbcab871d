"""What to run a file on, where nobody says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from refold.errors import InputError, first_line
from refold.onnx_files.network import OnnxNetwork, Program
from refold.recording.arguments import plain_mode

_SIDES = (224, 64, 320, 640, 32, 48, 512)
"""What free sides of images are tried as, in this order."""


def example_of(network: OnnxNetwork, input_size: Sequence[int] | None = None) -> tuple[Tensor, ...]:
    """Random inputs that the network takes: one image, or whatever stands in its place.

    Free axes are 1 where the batch is; sides of images are tried until the network runs. `input_size` are the axes
    behind the batch of an only input; of an image its sides will do.

    Raises `InputError` where it runs on none of them.
    """
    failure: Exception | None = None
    for example in _candidates(network, input_size):
        try:
            with plain_mode():
                network(*example)
            return example
        except Exception as error:  # a network may refuse a size in any way
            failure = error
    name = network.program.name
    shapes = " and ".join(
        f"{value} {_shown(sides)}"
        for value, sides in zip(network.program.inputs, network.program.sides, strict=True)
    )
    asked = f" of {'x'.join(map(str, input_size))}" if input_size else ""
    raise InputError(
        f"{name} does not run on random inputs{asked} ({'' if failure is None else first_line(failure)}); it takes "
        f"{shapes}; give an input that it takes."
    )


def _candidates(network: OnnxNetwork, input_size: Sequence[int] | None) -> Iterator[tuple[Tensor, ...]]:
    program = network.program
    shapes = [() if sides is None else sides for sides in program.sides]
    if input_size is not None:
        input_size = _as_image(input_size, shapes[0])
        if len(shapes) != 1 or len(shapes[0]) not in (0, 1 + len(input_size)):
            raise InputError(
                f"An input size of {'x'.join(map(str, input_size))} was given, and {program.name} takes "
                f"{' and '.join(map(_shown, program.sides))}."
            )
        batch = shapes[0][0] if shapes[0] else None
        yield (_random((batch or 1, *input_size), program.dtypes[0]),)
        return
    names = _names_of_free_axes(program)
    spatial = {name for axes in names for name in axes[1:]}  # first axes of these names may be no batches
    free = any(side is None for sides in shapes for side in sides[1:])
    for batches, side in product((set(), spatial), _SIDES if free else (1,)):
        sizes = [
            tuple(
                (1 if i == 0 and axes[0] not in batches else side) if s is None else s
                for i, s in enumerate(sides)
            )
            for sides, axes in zip(shapes, names, strict=True)
        ]
        yield tuple(_random(size, dtype) for size, dtype in zip(sizes, program.dtypes, strict=True))


def _names_of_free_axes(program: Program) -> list[list[str]]:
    """How the file calls the axes of each input; an axis without a name has one of its own."""
    inputs = {value.name: value.type.tensor_type.shape.dim for value in program.model.graph.input}
    return [
        [axis.dim_param or f"{name} {i}" for i, axis in enumerate(inputs[name])] for name in program.inputs
    ]


def _as_image(size: Sequence[int], shape: Sequence[int | None]) -> Sequence[int]:
    """(channels, height, width) of a size that is an image's side, or both."""
    if len(shape) != 4 or len(size) > 2:
        return size
    return (shape[1] or 3, *(tuple(size) * 2 if len(size) == 1 else size))


def _random(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if dtype == torch.bool:
        return torch.ones(tuple(shape), dtype=dtype)
    if not dtype.is_floating_point:
        return torch.randint(
            0, 256 if dtype == torch.uint8 else 2, tuple(shape), generator=generator, dtype=dtype
        )
    return torch.randn(tuple(shape), generator=generator).to(dtype)


def _shown(sides: Sequence[Any] | None) -> str:
    return (
        "anything"
        if sides is None
        else "x".join("?" if side is None else str(side) for side in sides) or "one number"
    )
