"""Put the branches into a model that a report names: for `unfold`, and for whoever loads what was unfolded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from timm.layers import BatchNormAct2d, Conv2dSame
from torch import nn

from refold.blocks.parallel import BranchComputation
from refold.errors import CheckpointError, InputError
from refold.unfolding.building import SamePadded, build, without_padding
from refold.unfolding.report import UnfoldedLayer, UnfoldReport


def rebuild(model: nn.Module, record: Mapping[str, Any]) -> nn.Module:
    """Give `model` in place the branches of another one of its class, as `UnfoldReport.to_dict` recorded them.

    Raises `CheckpointError` where the record is not understood or the model has no such layers.
    """
    require_no_branches(model)
    try:
        report = UnfoldReport.from_dict(record)
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"The record of branches is not understood ({error}); it may come from a newer version of refold."
        ) from error
    try:
        report = described(report, model)
        layers = [add_branches(model, layer, 0.0, report.form) for layer in report.layers]
    except (AttributeError, AssertionError) as error:
        raise CheckpointError(
            f"{type(model).__name__} has not the layers that were unfolded ({error}); build the model as it was "
            "before refold.unfold."
        ) from error
    if layers != report.layers:
        raise CheckpointError(
            f"The branches of '{report.plan}' do not fit {type(model).__name__} as they did; build the model with the "
            "arguments of the one that was unfolded."
        )
    model.unfold_report = report  # type: ignore[assignment]  # nn.Module types its attributes as tensors and modules
    return model


def require_no_branches(model: nn.Module) -> None:
    """Raise `InputError` where the model is unfolded already."""
    if hasattr(model, "unfold_report") and not hasattr(model, "fold_report"):
        raise InputError(f"{type(model).__name__} is unfolded already; fold it before it is unfolded again.")


def described(report: UnfoldReport, original: nn.Module) -> UnfoldReport:
    """The report with what the way back needs to know of the original model."""
    norms: dict[str, Any] = {path: original.get_submodule(path) for path in report.norms.values()}
    return dataclasses.replace(
        report,
        shapes={name: tuple(tensor.shape) for name, tensor in original.state_dict().items()},
        epsilons={path: norm.eps for path, norm in norms.items()},
    )


def add_branches(
    model: nn.Module, layer: UnfoldedLayer, scale: float, form: BranchComputation
) -> UnfoldedLayer | None:
    """Put branches beside one convolution of the model, in place, and count them; None where none fits.

    The last batch norm of each new branch starts at `scale`.
    """
    conv = model.get_submodule(layer.path)
    old = nn.Identity() if layer.norm is None else model.get_submodule(layer.norm)
    norm, rest = _without_activation(old)
    assert isinstance(conv, nn.Conv2d), f"'{layer.path}' is no 2-d convolution"
    is_same_padded = isinstance(conv, Conv2dSame)
    plain = without_padding(conv) if is_same_padded else conv
    made = build(plain, norm, layer.shapes, layer.repeats, scale=scale, form=form)
    if made is None:
        return None
    model.set_submodule(layer.path, SamePadded(made) if is_same_padded else made)
    if layer.norm is not None:
        model.set_submodule(layer.norm, rest)
    return dataclasses.replace(layer, branches=len(made.branches), skip=made.skip is not None)


def _without_activation(norm: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A batch norm alone, and what its module does after it."""
    if not isinstance(norm, BatchNormAct2d):
        return norm, nn.Identity()
    plain = nn.BatchNorm2d(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, device="meta"
    )
    plain._parameters.update(norm._parameters)
    plain._buffers.update(norm._buffers)
    plain.train(norm.training)
    after = [part for part in (norm.drop, norm.act) if not isinstance(part, nn.Identity)]
    return plain, nn.Sequential(*after) if len(after) > 1 else (after or [nn.Identity()])[0]
