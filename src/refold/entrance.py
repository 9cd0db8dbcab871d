"""`refold.fold` and `refold.verify`: networks of PyTorch and ONNX files go in, each by its own way."""

# What reads ONNX files is imported where one is given: folding needs nothing but PyTorch.

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, TypeVar, overload

from torch import nn

from refold.errors import InputError, naming_packages
from refold.files import PathLike
from refold.folding import FoldReport, Objective, Proof
from refold.folding import fold as fold_network
from refold.folding import verify as verify_networks
from refold.folding.comparing import TOLERANCE
from refold.folding.fold import Named, Shortcuts
from refold.onnx_files import is_onnx_network

if TYPE_CHECKING:
    import onnx
    import onnx_ir

    OnnxModel = TypeVar("OnnxModel", onnx.ModelProto, onnx_ir.Model)


@overload
def fold(
    model: nn.Module,
    example_input: Any,
    *,
    prove: bool = ...,
    objective: Named | Objective = ...,
    shortcuts: Shortcuts = ...,
    rewrites: Any = ...,
    tolerance: float = ...,
) -> nn.Module: ...
@overload
def fold(
    model: PathLike,
    output: PathLike,
    example_input: Any = ...,
    *,
    prove: bool = ...,
    objective: Named | Objective = ...,
    shortcuts: Shortcuts = ...,
    tolerance: float = ...,
) -> FoldReport: ...
@overload
def fold(
    model: OnnxModel,
    output: None = ...,
    example_input: Any = ...,
    *,
    prove: bool = ...,
    objective: Named | Objective = ...,
    shortcuts: Shortcuts = ...,
    tolerance: float = ...,
) -> tuple[OnnxModel, FoldReport]: ...
def fold(model: Any, *arguments: Any, **options: Any) -> Any:
    """A plain network that computes what the given one does, or a plain ONNX file: every linear part one layer, proved.

    `fold(model, example_input)` folds a network of PyTorch, which stays untouched, and returns a new one of its class,
    dtype, device, hooks and methods, in evaluation mode, with a `FoldReport` as `fold_report`. `example_input` is what
    the model is called with: a tensor, `[batch, channels, *size]` as a rule, a tuple of positional arguments, or a
    dictionary, by keyword where the forward pass has parameters of all its names.

    `fold("net.onnx", "plain.onnx")` folds a file into a file and returns the report; `fold(onnx_model)`, an
    `onnx.ModelProto` or `onnx_ir.Model`, returns (model, report). Only what was folded changes: inputs and outputs,
    their names and free axes, the versions of operators, metadata and all other nodes stay as they are, and tensors
    beside a file stay beside. `example_input` is a tensor for each input; random ones are taken where it is left out.
    The file is read again and compared with what was proved, and run in ONNX Runtime beside the original.

    With `prove` (the default) every region is proved in float64, borders included, at two sizes, and then the whole;
    `tolerance` is the largest difference, relative to the largest output, that counts as rounding.
    No fold may raise the multiply-accumulates, unless the `objective` is "operators": then those of depthwise
    convolutions, which memory holds up rather than arithmetic, do not count (RepNeXt, eq. 2).
    `refold.Latency("onnxruntime")` as objective measures on an engine which exact rewrites pay there.
    `shortcuts="fold"` also takes each shortcut around a chain of convolutions into them, at the price of more channels
    (RepNeXt, eq. 5 to 8). `rewrites`, of networks, chooses among exact rewrites (`refold.folding.alternatives`).

    Raises `InputError` where a model does not run on the example, a file cannot be read or written, or an option is
    unknown, `NotEquivalent` where the proof fails; no file is written then.

    Examples:
        >>> import torch, refold
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> image = torch.randn(1, 3, 32, 32)
        >>> plain = refold.fold(net, image)
        >>> plain.fold_report.after.operators
        {'convolution': 1, 'activation': 1}
        >>> report = refold.export(net, "net.onnx", image, fold=False)
        >>> report = refold.fold("net.onnx", "plain.onnx")
        >>> report.after.operators
        {'convolution': 1, 'activation': 1}
    """
    if isinstance(model, nn.Module) and not is_onnx_network(model):
        return fold_network(model, *arguments, **options)
    with naming_packages("refold.fold of ONNX files"):
        from refold.onnx_files.folding import fold_onnx
    return fold_onnx(_readable(model), *arguments, **options)


def verify(
    reference: Any, candidate: Any, example_input: Any = None, *, tolerance: float = TOLERANCE
) -> Proof:
    """Measure how far `candidate` is from `reference`: networks of PyTorch, or ONNX files by their paths.

    Both run in evaluation mode on `example_input` (as for `fold`; for a reference that is a file it may be left out).
    In float64 they must agree to `tolerance` of the largest output; in lower precision the candidate may be no further
    from the float64 result than 4 times the distance of the reference run in the same dtype. Outputs that sorting,
    thresholds or suppression decide, and that differ, are compared through the tensors that these look at.

    Raises `NotEquivalent`, which carries the proof, where they do not; `InputError` where one of them does not run.

    Examples:
        >>> import torch, refold
        >>> net = refold.create_model("repghostnet_050", num_classes=10)
        >>> image = torch.randn(1, 3, 64, 64)
        >>> refold.verify(net, refold.fold(net, image), image).distance_float64 < 1e-9
        True
    """
    networks = [each if isinstance(each, nn.Module) else _network(each) for each in (reference, candidate)]
    if example_input is None:
        example_input = _example(networks[0])
    return verify_networks(networks[0], networks[1], example_input, tolerance=tolerance)


def _network(model: Any) -> nn.Module:
    with naming_packages("refold.verify of ONNX files"):
        from refold.onnx_files.reading import read_network
    return read_network(_readable(model))


def _example(network: nn.Module) -> Any:
    if not is_onnx_network(network):
        raise InputError("There is no example input; give one that the networks take.")
    from refold.onnx_files.examples import example_of

    return example_of(network)  # type: ignore[arg-type]  # that is what was asked


def _readable(model: Any) -> Any:
    """A path, or a model of ONNX; raises `InputError` for anything else."""
    kinds = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(model).__mro__}
    in_memory = kinds & {"onnx.ModelProto", "onnx_ir.Model"} or is_onnx_network(model)
    if not isinstance(model, (str, os.PathLike)) and not in_memory:
        raise InputError(
            f"A {type(model).__name__} is neither a network of PyTorch (nn.Module) nor the path of an ONNX file; give "
            "one of them."
        )
    return model
