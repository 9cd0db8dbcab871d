"""ONNX files as networks: read, folded, and written back with nothing else changed."""

# What needs onnx is in the modules of this package, so that whoever asks these questions waits for none of it.

from pathlib import Path

from torch import nn

SUFFIX = ".onnx"


def is_onnx_network(model: object) -> bool:
    """Whether it is a file that was read."""
    return isinstance(model, nn.Module) and any(
        kind.__module__ == "refold.onnx_files.network" for kind in type(model).__mro__
    )


def is_onnx_file(name: str) -> bool:
    """Whether a name is that of an ONNX file."""
    return Path(name).suffix == SUFFIX
