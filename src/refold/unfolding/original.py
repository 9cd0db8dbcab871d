"""The way back: the weights of a folded model in the layout of the class that was unfolded."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from refold.blocks.parallel import ParallelBranches
from refold.errors import InputError
from refold.folding import fold
from refold.unfolding.building import SamePadded
from refold.unfolding.report import UnfoldReport


@torch.no_grad()
def original_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the original class for what `refold.unfold` returned, or `refold.fold` made of that.

    It loads with `load_state_dict(strict=True)` into a model built as the original was, which then computes the same
    in evaluation mode. A batch norm that was folded into its convolution comes back as one that only adds: mean 0,
    variance 1, a scale that cancels epsilon, and the convolution's shift. Of a model that still has its branches, only
    these are folded, and every other batch norm keeps its statistics.

    Raises `InputError` where the model was not unfolded, or where folding merged layers of the original.

    Examples:
        >>> import refold
        >>> net = refold.create_model("resnet10t")
        >>> wide = refold.unfold(net, "repvgg")
        >>> net.load_state_dict(refold.original_state_dict(wide))
        <All keys matched successfully>
    """
    report = getattr(model, "unfold_report", None)
    if not isinstance(report, UnfoldReport):
        inside = [name for name, part in model.named_children() if hasattr(part, "unfold_report")]
        what = f"its '{inside[0]}'" if inside else "what refold.unfold returned, or its fold"
        raise InputError(f"{type(model).__name__} carries no unfold report; pass {what}.")
    held = _plain_tensors(model, report)
    state: dict[str, Tensor] = {}
    shifted = {norm: conv for conv, norm in report.norms.items() if f"{norm}.running_mean" not in held}
    for name, shape in report.shapes.items():
        path, _, kind = name.rpartition(".")
        if path in shifted:
            conv = shifted[path]
            shift = None if f"{conv}.bias" in report.shapes else held.get(f"{conv}.bias")
            affine = f"{path}.weight" in report.shapes
            tensor = _pure_shift(kind, shape, shift, report.epsilons[path], affine)
            if tensor.is_floating_point():
                tensor = tensor.to(held[f"{conv}.weight"])
        elif name in held:
            tensor = held[name]
        elif kind == "bias" and f"{path}.weight" in held:
            tensor = held[f"{path}.weight"].new_zeros(shape)
        else:
            raise InputError(_lost(name))
        if tuple(tensor.shape) != shape:
            raise InputError(_lost(name))
        state[name] = tensor.detach().clone()
    unplaced = [
        path
        for path in {name.rpartition(".")[0] for name in held if name.endswith(".bias")}
        if f"{path}.bias" not in report.shapes
        and report.norms.get(path) not in shifted
        and bool(held[f"{path}.bias"].any())
    ]
    if unplaced:
        raise InputError(_lost(f"{sorted(unplaced)[0]}.bias"))
    return state


def _lost(name: str) -> str:
    return (
        f"'{name}' has no counterpart: folding changed more than the branches. Pass the model that refold.unfold "
        "returned, after training, instead of its fold."
    )


def _plain_tensors(model: nn.Module, report: UnfoldReport) -> dict[str, Tensor]:
    """The model's state dict, with kernel and bias of one convolution for each layer that was unfolded."""
    held, modules = dict(model.state_dict()), dict(model.named_modules())
    for path in (layer.path for layer in report.layers):
        if path not in modules:
            continue  # folding changed more than the branches
        module, prefix = modules[path], f"{path}."
        if isinstance(module, SamePadded):
            module, prefix = module.parallel, f"{path}.parallel."
        if isinstance(module, ParallelBranches):
            module = _folded(module)
        for name in [name for name in held if name.startswith(prefix)]:
            del held[name]
        held |= {f"{path}.{name}": tensor for name, tensor in module.state_dict().items()}
    return held


def _folded(module: ParallelBranches) -> nn.Module:
    geometry = module.geometry
    size = [
        2 * dilation * kernel + 1
        for dilation, kernel in zip(geometry.dilation, geometry.kernel_size, strict=True)
    ]
    reference = next(module.parameters())
    example = torch.randn(1, geometry.in_channels, *size, generator=torch.Generator().manual_seed(0))
    return fold(module, example.to(reference), prove=False)


def _pure_shift(
    kind: str, shape: tuple[int, ...], shift: Tensor | None, epsilon: float, affine: bool
) -> Tensor:
    """One tensor of a batch norm that adds `shift` and does nothing else."""
    nothing = torch.zeros(shape, dtype=torch.float64)
    shift = nothing if shift is None else shift.to(nothing)
    values: dict[str, Tensor] = {
        "weight": nothing + (1 + epsilon) ** 0.5,
        "bias": shift,
        "running_mean": nothing if affine else -shift,
        "running_var": nothing + (1 if affine else 1 - epsilon),
    }
    return values.get(kind, torch.zeros(shape, dtype=torch.int64))
