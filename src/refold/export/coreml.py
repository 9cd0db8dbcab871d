"""Core ML packages (.mlpackage), converted by coremltools; only macOS can run them."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from refold.errors import InputError, first_line
from refold.export.converting import muted
from refold.export.engines import CannotRun, Contents, Session
from refold.export.metadata import PortKind, port_names
from refold.export.preparing import with_free_axes
from refold.export.request import FLOAT16, Request

with muted():
    import coremltools

_NO_OPERATORS = {"const", "cast", "reshape"}
# The range of a free axis is part of the package.
LARGEST_BATCH = 32


def write(model: nn.Module, request: Request) -> Sequence[str]:
    """Write one package for iOS 16, macOS 13 and newer; raises `InputError` where it cannot be converted."""
    largest = max([LARGEST_BATCH, *(len(tensor) + 2 for tensor in request.inputs if tensor.dim())])
    inputs, shapes = with_free_axes(model, request, most=largest)
    precision = coremltools.precision
    try:
        with muted():
            program = torch.export.export(model, inputs, dynamic_shapes=shapes).run_decompositions({})
            package = coremltools.convert(
                program,
                minimum_deployment_target=coremltools.target.iOS16,
                compute_precision=precision.FLOAT16 if request.precision == FLOAT16 else precision.FLOAT32,
                skip_model_load=True,
            )
            package = _with_port_names(package)
            package.user_defined_metadata.update(request.metadata)
            package.save(str(request.path))
    except OSError:
        raise
    except Exception as error:
        hint = "; a fixed batch size (dynamic_batch=False) may help" if request.dynamic_batch else ""
        raise InputError(f"coremltools cannot convert the model: {first_line(error)}{hint}.") from error
    return [f"Batches of up to {largest} images are allowed."] if request.dynamic_batch else []


def _with_port_names(package: Any) -> Any:
    """The package with its inputs and outputs called as in every other format, not after the graph's nodes."""
    spec = package.get_spec()
    ports: list[tuple[PortKind, Any]] = [
        ("image", spec.description.input),
        ("output", spec.description.output),
    ]
    for kind, values in ports:
        for old, new in zip([value.name for value in values], port_names(kind, len(values)), strict=True):
            coremltools.utils.rename_feature(spec, old, new)
    return coremltools.models.MLModel(spec, weights_dir=package.weights_dir, skip_model_load=True)


def contents(path: Path) -> Contents:
    """Count the operators of a package."""
    functions = coremltools.utils.load_spec(str(path)).mlProgram.functions
    kinds = Counter(
        operation.type
        for function in functions.values()
        for block in function.block_specializations.values()
        for operation in block.operations
    )
    operators = {kind: n for kind, n in kinds.most_common() if kind not in _NO_OPERATORS}
    return Contents(parameters=None, macs=None, operators=operators)


def read_metadata(path: Path) -> dict[str, str]:
    """What `write` put into a package."""
    return dict(coremltools.utils.load_spec(str(path)).description.metadata.userDefined)


def open(path: Path, *, threads: int | None = None) -> Session:
    """Load a package on macOS; raises `CannotRun` elsewhere."""
    if sys.platform != "darwin":
        raise CannotRun("The file was not run and not compared with PyTorch: only macOS runs Core ML.")
    package: Any = coremltools.models.MLModel(str(path))
    description = package.get_spec().description

    def run(*arguments: Tensor) -> list[Tensor]:
        feed = {
            value.name: argument.numpy() for value, argument in zip(description.input, arguments, strict=True)
        }
        results = package.predict(feed)
        return [torch.from_numpy(results[value.name]) for value in description.output]

    return run
