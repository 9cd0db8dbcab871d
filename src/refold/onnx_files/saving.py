"""Write ONNX files: with their tensors inside, or beside where that is how they came or they are too large."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from refold.errors import InputError
from refold.files import PathLike, check_writable
from refold.onnx_files import SUFFIX

_LARGEST = 1_900_000_000
"""Bytes of tensors that are still written into the file itself; protobuf ends at two gigabytes."""


def check_onnx(path: PathLike) -> Path:
    """The path, if an ONNX file can go there; raises `InputError` where it cannot or is named otherwise."""
    target = check_writable(path)
    if target.suffix != SUFFIX:
        raise InputError(f"'{target}' cannot be an ONNX file; give a name that ends in {SUFFIX}.")
    return target


def save_model(model: ir.Model, path: Path, *, beside: bool = False) -> None:
    """Write the model, with its tensors in a file `beside` it, or where they are too large."""
    tensors = [
        value.const_value for value in model.graph.initializers.values() if value.const_value is not None
    ]
    beside = beside or any(isinstance(tensor, ir.ExternalTensor) for tensor in tensors)
    if beside or sum(tensor.nbytes for tensor in tensors) > _LARGEST:
        ir.save(model, path, external_data=f"{path.name}.data")
    else:
        ir.save(model, path)
