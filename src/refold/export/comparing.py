"""An engine's outputs beside PyTorch's, on several inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from refold.boxes.comparing import difference
from refold.errors import InputError, first_line
from refold.export.request import FLOAT16, Precision, Request


@dataclass(frozen=True)
class Trial:
    """One call of an exported file beside PyTorch.

    ``max_difference`` is the largest |Δ| over all outputs; ``relative_difference`` the same in parts of the
    spread (largest minus smallest value over all trials) of the output it is found in. ``same_top1`` counts
    the images of which the first output has its largest value in the same place; None where the first output
    is no (batch, classes).
    """

    inputs: str
    batch_size: int
    max_difference: float
    relative_difference: float
    same_top1: int | None


@dataclass(frozen=True)
class Case:
    """Inputs of a trial and what PyTorch makes of them."""

    inputs: str
    arguments: tuple[Tensor, ...]
    expected: list[Tensor]

    @property
    def batch_size(self) -> int:
        """The first axis of the first input, or one."""
        return self.arguments[0].shape[0] if self.arguments[0].dim() else 1


def make_cases(model: nn.Module, request: Request) -> list[Case]:
    """The example itself, random inputs of its shape and, where they are free, other batches and heights and widths.

    Raises `InputError` where the model cannot run on one of them, or gives values for it that are not finite.
    """
    arguments = request.inputs
    batch = arguments[0].shape[0] if arguments[0].dim() else 0
    sizes = [batch, 1, batch + 2] if request.dynamic_batch else [batch]
    generator = torch.Generator().manual_seed(0)
    trials = [("the example", arguments)]
    for size in sizes:
        inputs = tuple(_like(argument, size, generator) for argument in arguments)
        trials.append(("normal", inputs))
    spread_out = tuple(_like(argument, sizes[-1], generator, uniform=True) for argument in arguments)
    trials.append(("uniform from 0 to 1", spread_out))
    for extra in _OTHER_SIZES if request.dynamic_size else ():
        larger = tuple(_like(_grown(argument, *extra), batch, generator) for argument in arguments)
        trials.append(
            (" and ".join(f"{a.shape[-2]} x {a.shape[-1]}" for a in larger if a.dim() == 4), larger)
        )
    cases = [Case(name, inputs, outputs_of(model, inputs)) for name, inputs in trials]
    for case in cases:
        _check_finite(case)
    return cases


# Networks that need sides of a multiple of 32 get them.
_OTHER_SIZES = ((32, 0), (0, 64), (64, 32))


def _grown(argument: Tensor, height: int, width: int) -> Tensor:
    """A tensor of the example's shape, larger where it is an image."""
    if argument.dim() != 4:
        return argument
    return argument.new_empty(*argument.shape[:2], argument.shape[2] + height, argument.shape[3] + width)


def _check_finite(case: Case) -> None:
    for place, output in enumerate(case.expected):
        if output.is_floating_point() and not output.isfinite().all():
            bad = int((~output.isfinite()).sum())
            raise InputError(
                f"The network gives {bad} of {output.numel()} values of output {place} as NaN or infinity (inputs: "
                f"{case.inputs}), so that no export can be compared with it; look for weights that are not finite."
            )


def compare(results: list[list[Tensor]], cases: list[Case]) -> list[Trial]:
    """An engine's outputs beside PyTorch's; a difference is infinite where a shape is another, NaN where one is."""
    spreads = [_spread([case.expected[i] for case in cases]) for i in range(len(cases[0].expected))]
    return [_trial(case, outputs, spreads) for case, outputs in zip(cases, results, strict=True)]


def spread_of(cases: list[Case]) -> float:
    """The largest spread of an output."""
    count = len(cases[0].expected)
    return max((_spread([case.expected[i] for case in cases]) for i in range(count)), default=0.0)


def _trial(case: Case, results: list[Tensor], spreads: list[float]) -> Trial:
    same = None
    absolute, relative = [0.0], [0.0]
    if [tuple(t.shape) for t in results] != [tuple(t.shape) for t in case.expected]:
        absolute, relative = [float("inf")], [float("inf")]
    else:
        for expected, result, spread in zip(case.expected, results, spreads, strict=True):
            if expected.numel():
                difference = (expected.double() - result.double()).abs().max().item()
                absolute.append(difference)
                relative.append(difference / spread)
        first = case.expected[0] if case.expected else torch.empty(0)
        if first.dim() == 2 and first.shape[1] > 1:
            same = int((first.argmax(dim=1) == results[0].argmax(dim=1)).sum())
    return Trial(case.inputs, case.batch_size, _worst(absolute), _worst(relative), same)


def compare_boxes(results: list[list[Tensor]], cases: list[Case], precision: Precision) -> list[Trial]:
    """Boxes of an engine beside PyTorch's, as sets.

    The difference is that of scores and masks, infinite where a box is missing.
    """
    trials = []
    overlap, score = (0.9, 2e-2) if precision == FLOAT16 else (0.99, 1e-4)
    for case, found in zip(cases, results, strict=True):
        between = difference(case.expected, found, overlap=overlap, score=score)
        trials.append(Trial(case.inputs, case.batch_size, between.worst, between.worst, None))
    return trials


def _worst(values: list[float]) -> float:
    return float("nan") if any(value != value for value in values) else max(values)


def _spread(outputs: list[Tensor]) -> float:
    """Largest minus smallest value; of a constant, its size."""
    values = torch.cat([output.double().flatten() for output in outputs])
    if not values.numel():
        return 1.0
    width = (values.max() - values.min()).item()
    return max(width or values.abs().max().item(), 1e-12)


def _like(argument: Tensor, batch: int, generator: torch.Generator, *, uniform: bool = False) -> Tensor:
    """A new batch of the example's shape: random numbers, or its first row repeated if integers."""
    if not argument.dim():
        return argument
    if not argument.is_floating_point():
        return argument[:1].expand(batch, *argument.shape[1:]).contiguous()
    draw = torch.rand if uniform else torch.randn
    return draw(batch, *argument.shape[1:], generator=generator).to(argument.dtype)


def outputs_of(model: nn.Module, arguments: tuple[Tensor, ...]) -> list[Tensor]:
    """All tensors that a model gives, in order; raises `InputError` where it cannot run on the arguments."""
    with torch.inference_mode():
        try:
            # In-place activations may overwrite an input that the engine is to see as well.
            result = model(*(argument.clone() for argument in arguments))
        except Exception as error:
            shapes = ", ".join(str(tuple(argument.shape)) for argument in arguments)
            reason = first_line(error)
            raise InputError(
                f"{type(model).__name__} cannot run on an input of shape {shapes}: {reason}; give an example "
                "input that it accepts, or dynamic_batch=False if its batch size is fixed."
            ) from error
    return tensors_in(result)


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors of nested outputs, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for part in value for tensor in tensors_in(part)] if value is not None else []
