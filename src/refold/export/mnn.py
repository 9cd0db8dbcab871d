"""MNN files, run by MNN on the CPU."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from refold.errors import InputError
from refold.export.converting import run_converter, silent_stdout
from refold.export.engines import Contents, Session
from refold.export.onnx_file import as_onnx
from refold.export.preparing import rounded_to_half
from refold.export.request import FLOAT16, Request

with silent_stdout():
    import MNN

# MNN's own command line reports its use to a server and installs a package for that; the converter under it
# does neither.
_CONVERT = [sys.executable, "-c", "import sys, _tools; _tools.mnnconvert(sys.argv)"]
# From 20 on GELU is an operator of its own, which MNN computes to four digits only; through erf, it has seven.
_OPSET_WITHOUT_GELU = 18
_NO_OPERATORS = {"Const", "ConvertTensor", "Input", "Reshape", "Squeeze", "Unsqueeze"}


def write(model: nn.Module, request: Request) -> Sequence[str]:
    """Write one MNN file; the metadata is its ``bizCode``, the text that the format has room for.

    Raises `InputError` where the model cannot be converted.
    """
    half, path = request.precision == FLOAT16, request.path
    flag = json.dumps(dict(request.metadata) | {"precision": request.precision})
    if half:
        model = rounded_to_half(model)
    with as_onnx(model, request, opset_version=_OPSET_WITHOUT_GELU) as onnx_file:
        command = [*_CONVERT, "-f", "ONNX", "--modelFile", str(onnx_file), "--MNNModel", str(path)]
        run_converter([*command, "--bizCode", flag, *(["--fp16"] if half else [])], "MNN", path)
    return []


def contents(path: Path) -> Contents:
    """Count the operators of a file."""
    with TemporaryDirectory() as folder:
        described = Path(folder) / "file.json"
        command = [*_CONVERT, "-f", "MNN", "--modelFile", str(path), "--JsonFile", str(described)]
        run_converter(command, "MNN", described)
        operators = json.loads(described.read_bytes())["oplists"]
    kinds = Counter(operator["type"] for operator in operators)
    return Contents(
        parameters=None,
        macs=None,
        operators={kind: n for kind, n in kinds.most_common() if kind not in _NO_OPERATORS},
    )


def read_metadata(path: Path) -> dict[str, str]:
    """What `write` put into a file; empty for a file of another origin."""
    with silent_stdout():
        module = MNN.nn.load_module_from_file(str(path), [], [])
    try:
        found = json.loads(module.get_info()["bizCode"])
    except (AttributeError, KeyError, ValueError):
        return {}
    return dict(found) if isinstance(found, dict) else {}


def open(path: Path, *, threads: int | None = None) -> Session:
    """Load a file in MNN, with ``threads`` threads if given; raises `InputError` where MNN cannot."""
    half = read_metadata(path).get("precision") == FLOAT16
    settings: dict[str, Any] = {"backend": "CPU", "precision": "low" if half else "high"}
    if threads is not None:
        settings["numThread"] = threads
    with silent_stdout():
        runtime = MNN.nn.create_runtime_manager((settings,))
        module = MNN.nn.load_module_from_file(str(path), [], [], runtime_manager=runtime)
    if module is None:
        raise InputError(f"MNN cannot load '{path}'.")

    def run(*arguments: Tensor) -> list[Tensor]:
        results = module.onForward([_variable(argument) for argument in arguments])
        if not results:
            raise InputError(
                f"MNN cannot run '{path}' on inputs of shape {[tuple(a.shape) for a in arguments]}."
            )
        plain = [MNN.expr.convert(result, MNN.expr.NCHW) for result in results]
        return [torch.from_numpy(result.read().copy()) for result in plain]

    return run


def _variable(argument: Tensor) -> Any:
    kinds = {torch.float32: MNN.expr.float, torch.int32: MNN.expr.int}
    if argument.dtype not in kinds:
        raise InputError(f"MNN takes float32 and int32 inputs; one is {argument.dtype}.")
    return MNN.expr.const(
        argument.contiguous().numpy(), list(argument.shape), MNN.expr.NCHW, kinds[argument.dtype]
    )
