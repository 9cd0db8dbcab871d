"""ExecuTorch programs (.pte), lowered to XNNPACK and run by ExecuTorch on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from refold.errors import InputError, first_line
from refold.export.comparing import tensors_in
from refold.export.converting import quiet
from refold.export.engines import Contents, Session
from refold.export.preparing import in_precision, with_free_axes
from refold.export.request import Request

# Memory is planned ahead for the largest batch.
LARGEST_BATCH = 32


def write(model: nn.Module, request: Request) -> Sequence[str]:
    """Write one program; every entry of the metadata is a method that returns it.

    Raises `InputError` where the model cannot be lowered.
    """
    model = in_precision(model, request.precision)
    largest = max([LARGEST_BATCH, *(len(tensor) + 2 for tensor in request.inputs if tensor.dim())])
    inputs, shapes = with_free_axes(model, request, most=largest)
    try:
        with quiet(), torch.no_grad():
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import to_edge_transform_and_lower

            program = torch.export.export(model, inputs, dynamic_shapes=shapes)
            lowered = to_edge_transform_and_lower(
                program, partitioner=[XnnpackPartitioner()], constant_methods=dict(request.metadata)
            ).to_executorch()
        request.path.write_bytes(lowered.buffer)
    except OSError:
        raise
    except Exception as error:
        raise InputError(f"ExecuTorch cannot lower the model: {first_line(error)}.") from error
    return [f"Batches of up to {largest} images fit the planned memory."] if request.dynamic_batch else []


def contents(path: Path) -> Contents:
    """Nothing is counted: the network is a part that XNNPACK alone reads."""
    return Contents(parameters=None, macs=None, operators={})


def _load(path: Path) -> Any:
    from executorch.runtime import Runtime

    try:
        return Runtime.get().load_program(str(path))
    except Exception as error:
        raise InputError(f"ExecuTorch cannot load '{path}': {first_line(error)}.") from error


def read_metadata(path: Path) -> dict[str, str]:
    """What `write` put into a file."""
    program = _load(path)
    names = sorted(program.method_names - {"forward"})
    return {name: program.load_method(name).execute([])[0] for name in names}


def open(path: Path, *, threads: int | None = None) -> Session:
    """Load a program, with ``threads`` threads if given; raises `InputError` where ExecuTorch cannot."""
    if threads is not None:
        from executorch.extension.pybindings import portable_lib

        portable_lib._unsafe_reset_threadpool(threads)
    program = _load(path)
    method = program.load_method("forward")

    def run(*arguments: Tensor) -> list[Tensor]:
        inputs = [argument.contiguous() for argument in arguments]
        # The program owns its outputs' memory and writes the next call's over them.
        return [output.clone() for output in tensors_in(method.execute(inputs))]

    return run
