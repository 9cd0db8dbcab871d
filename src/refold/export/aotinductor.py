"""Packages of torch.export (.pt2), compiled by AOTInductor and run by PyTorch on the CPU."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from refold.errors import InputError, first_line
from refold.export.comparing import tensors_in
from refold.export.converting import quiet
from refold.export.engines import Contents, Session
from refold.export.preparing import in_precision, with_free_axes
from refold.export.request import Request


def write(model: nn.Module, request: Request) -> Sequence[str]:
    """Write one package of compiled code and weights for this machine's processor.

    Raises `InputError` where there is no C++ compiler or the model cannot be exported or compiled.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise InputError(
            f"AOTInductor needs a C++ compiler and finds no '{compiler}'; install one, or set CXX."
        )
    model = in_precision(model, request.precision)
    inputs, shapes = with_free_axes(model, request)
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(model, inputs, dynamic_shapes=shapes)
            torch._inductor.aoti_compile_and_package(
                program,
                package_path=str(request.path),
                inductor_configs={"aot_inductor.metadata": dict(request.metadata)},
            )
    except Exception as error:
        raise InputError(f"AOTInductor cannot compile the model: {first_line(error)}.") from error
    return ["The package holds code for this kind of processor and this version of PyTorch."]


def contents(path: Path) -> Contents:
    """Nothing is counted: the operators have become code."""
    return Contents(parameters=None, macs=None, operators={})


def read_metadata(path: Path) -> dict[str, str]:
    """What `write` put into a package, and what PyTorch says of the machine it is for."""
    return dict(torch._inductor.aoti_load_package(str(path)).get_metadata())


def open(path: Path, *, threads: int | None = None) -> Session:
    """Load a package, to be run with ``threads`` threads if given; raises `InputError` where it cannot."""
    try:
        compiled = torch._inductor.aoti_load_package(str(path))
    except Exception as error:
        raise InputError(f"PyTorch cannot load '{path}': {first_line(error)}.") from error

    def run(*arguments: Tensor) -> list[Tensor]:
        before = torch.get_num_threads()
        if threads is not None and threads != before:
            torch.set_num_threads(threads)
        try:
            with torch.inference_mode():
                return tensors_in(compiled(*arguments))
        finally:
            if threads is not None and threads != before:
                torch.set_num_threads(before)

    return run
