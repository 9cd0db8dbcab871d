"""Export, then run the written file in its engine against PyTorch before it takes its place."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from refold.errors import InputError, NotEquivalent
from refold.export import ExportReport, get_engine
from refold.files import PathLike, written_aside
from refold.folding import fold

if TYPE_CHECKING:
    from refold.export import Session

_TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 5e-2, torch.float32: 1e-4, torch.float64: 1e-9}


def export_checked(
    model: nn.Module,
    path: PathLike,
    arguments: tuple[Tensor, ...],
    *,
    engine: str,
    dynamic_batch: bool,
    folding: bool,
    tolerance: float | None,
) -> ExportReport:
    """Do what `refold.export` promises."""
    backend = get_engine(engine)
    arguments = tuple(argument.detach().cpu() for argument in arguments)
    form = "plain" if folding or hasattr(model, "fold_report") else "training"
    if folding and not hasattr(model, "fold_report"):
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        model = fold(model, tuple(argument.to(device) for argument in arguments))
    # The user's module keeps its mode and device.
    model = copy.deepcopy(model).cpu().eval()
    inputs = _trial_inputs(arguments, dynamic_batch)
    expected = [_outputs(model, trial) for trial in inputs]
    with written_aside(path) as aside:
        backend.write(model, arguments, aside, dynamic_batch=dynamic_batch)
        contents = backend.contents(aside)
        session = backend.open(aside)
        distance, scale = _compare(session, inputs, expected)
        allowed = (_default_tolerance(expected) if tolerance is None else tolerance) * max(scale, 1e-12)
        if not distance <= allowed:  # NaN is a difference too
            raise NotEquivalent(
                f"The export to '{path}' was discarded: {engine} differs from PyTorch by {distance:.3g}, "
                f"at most {allowed:.3g} is allowed for outputs up to {scale:.3g}."
            )
        size = aside.stat().st_size
    return ExportReport(
        path=str(path),
        engine=engine,
        form=form,
        bytes=size,
        contents=contents,
        batch_sizes=sorted({trial[0].shape[0] for trial in inputs}),
        max_difference=distance,
        output_scale=scale,
    )


def _trial_inputs(arguments: tuple[Tensor, ...], dynamic_batch: bool) -> list[tuple[Tensor, ...]]:
    """The example itself, random inputs of its shape and, with a dynamic batch, other batch sizes."""
    batch = arguments[0].shape[0] if arguments[0].dim() else 0
    sizes = [batch, 1, batch + 2] if dynamic_batch else [batch]
    generator = torch.Generator().manual_seed(0)
    trials = [arguments]
    for size in sizes:
        trials.append(tuple(_like(argument, size, generator) for argument in arguments))
    return trials


def _like(argument: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """A new batch of the example's shape: normal numbers, or its first row repeated if integers."""
    if not argument.dim():
        return argument
    if not argument.is_floating_point():
        return argument[:1].expand(batch, *argument.shape[1:]).contiguous()
    return torch.randn(batch, *argument.shape[1:], generator=generator).to(argument.dtype)


def _outputs(model: nn.Module, arguments: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.inference_mode():
        try:
            # In-place activations may overwrite an input that the engine is to see as well.
            result = model(*(argument.clone() for argument in arguments))
        except Exception as error:
            shapes = ", ".join(str(tuple(argument.shape)) for argument in arguments)
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise InputError(
                f"{type(model).__name__} cannot run on an input of shape {shapes}: {reason}; give an example "
                "input that it accepts, or dynamic_batch=False if its batch size is fixed."
            ) from error
    return list(_tensors(result))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    return [tensor for part in value for tensor in _tensors(part)] if value is not None else []


def _compare(
    session: Session, inputs: list[tuple[Tensor, ...]], expected: list[list[Tensor]]
) -> tuple[float, float]:
    """The largest |Δ| and the largest |output| over all inputs; infinite where a shape differs."""
    distance = scale = 0.0
    for trial, reference in zip(inputs, expected, strict=True):
        result = session(*trial)
        if [tuple(t.shape) for t in result] != [tuple(t.shape) for t in reference]:
            return float("inf"), max(scale, 1.0)
        for ours, theirs in zip(reference, result, strict=True):
            if ours.numel() == 0:
                continue
            difference = (ours.double() - theirs.double()).abs().max().item()
            distance = difference if difference != difference else max(distance, difference)
            scale = max(scale, ours.double().abs().max().item())
    return distance, scale


def _default_tolerance(expected: list[list[Tensor]]) -> float:
    dtypes = {tensor.dtype for tensors in expected for tensor in tensors}
    return max((_TOLERANCE.get(dtype, 1e-4) for dtype in dtypes), default=1e-4)
