"""ncnn files (.param, and .bin with the weights), converted by pnnx and run by ncnn on the CPU."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ncnn
import numpy
import torch
from torch import Tensor, nn

from refold.errors import InputError
from refold.export.converting import run_converter
from refold.export.engines import Contents, Session
from refold.export.metadata import port_names
from refold.export.onnx_file import as_onnx
from refold.export.placing import read_beside, write_beside
from refold.export.preparing import rounded_to_half
from refold.export.request import FLOAT16, Request

_NO_OPERATORS = {"Input", "MemoryData", "Noop", "Reshape", "Split"}
# Stands before the weights of a layer that are float16; as a weight it would be 3e-38.
_HALF = 0x01306B47


def write(model: nn.Module, request: Request) -> Sequence[str]:
    """Write the layers, and beside it the weights and the metadata, for which the format has no room.

    Raises `InputError` where an input is not float32 with a batch axis or the model cannot be converted.
    """
    half, path = request.precision == FLOAT16, request.path
    for argument in request.inputs:
        if argument.dtype != torch.float32 or not 1 < argument.dim() < 5:
            raise InputError(
                f"ncnn takes float32 inputs of two to four axes, batch first; one is {argument.dtype} of shape "
                f"{tuple(argument.shape)}; export model.float(), with half=True for float16 weights."
            )
    if half:
        model = rounded_to_half(model, subnormal=False)
    single = tuple(argument[:1] for argument in request.inputs)
    shapes = ",".join(f"[{','.join(map(str, argument.shape))}]f32" for argument in single)
    one_image = replace(request, inputs=single, dynamic_batch=False)
    with as_onnx(model, one_image) as onnx_file, TemporaryDirectory() as folder:
        unused = {
            name: Path(folder) / name for name in ("pnnxparam", "pnnxbin", "pnnxpy", "pnnxonnx", "ncnnpy")
        }
        run_converter(
            [
                str(_converter()),
                str(onnx_file),
                f"inputshape={shapes}",
                f"fp16={int(half)}",
                f"ncnnparam={path}",
                f"ncnnbin={_weights(path)}",
                *(f"{name}={file}" for name, file in unused.items()),
            ],
            "pnnx",
            _weights(path),
        )
    unknown = [kind for kind in _layers(path) if "." in kind or "::" in kind]
    if unknown:
        raise InputError(f"ncnn has no layer for {', '.join(sorted(set(unknown)))}; choose another engine.")
    _name_ports(path, len(request.inputs))
    write_beside(path, request.metadata)
    return ["An ncnn file takes one image a call; a batch is run image by image."]


def _converter() -> Path:
    """The program in the package pnnx; importing the package would start another PyTorch."""
    package = find_spec("pnnx")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).with_name("pnnx.exe" if sys.platform == "win32" else "pnnx")


def _weights(path: Path) -> Path:
    return path.with_suffix(".bin")


def _layers(path: Path) -> list[str]:
    # Two lines of numbers come first.
    return [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines()[2:] if line.strip()]


def _name_ports(path: Path, inputs: int) -> None:
    """Call the inputs and outputs as in every other format, not in0 and out0."""
    rows = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    # A row is the layer's kind and name, the numbers of its inputs and outputs, their names, and its settings.
    blobs = [range(4, 4 + int(row[2]) + int(row[3])) if len(row) > 3 else range(0) for row in rows]
    outputs = {row[place] for row, places in zip(rows, blobs, strict=True) for place in places}
    names = {f"in{index}": name for index, name in enumerate(port_names("image", inputs))}
    found = _in_order([name for name in outputs if re.fullmatch(r"out\d+", name)])
    names |= dict(zip(found, port_names("output", len(found)), strict=True))
    for row, places in zip(rows, blobs, strict=True):
        for place in places:
            row[place] = names.get(row[place], row[place])
    path.write_text("".join(f"{' '.join(row)}\n" for row in rows), encoding="utf-8")


def contents(path: Path) -> Contents:
    """Count the layers of a file."""
    kinds = Counter(kind for kind in _layers(path) if kind not in _NO_OPERATORS)
    return Contents(parameters=None, macs=None, operators=dict(kinds.most_common()))


def read_metadata(path: Path) -> dict[str, str]:
    """What `write` put beside a file; empty for a file of another origin."""
    return read_beside(path)


def open(path: Path, *, threads: int | None = None) -> Session:
    """Load a file in ncnn, with ``threads`` threads if given; raises `InputError` where ncnn cannot."""
    net = ncnn.Net()
    if threads is not None:
        net.opt.num_threads = threads
    if not _is_half(_weights(path)):
        net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    if net.load_param(str(path)) or net.load_model(str(_weights(path))):
        raise InputError(f"ncnn cannot load '{path}'; a layer may be unknown to this version of ncnn.")
    inputs, outputs = _in_order(net.input_names()), _in_order(net.output_names())

    def run_one(images: list[Any]) -> list[Tensor]:
        extractor = net.create_extractor()
        for name, image in zip(inputs, images, strict=True):
            extractor.input(name, ncnn.Mat(image))
        results = []
        for name in outputs:
            failed, result = extractor.extract(name)
            if failed:
                raise InputError(f"ncnn cannot run '{path}': the output {name} fails.")
            results.append(torch.from_numpy(numpy.array(result)))
        return results

    def run(*arguments: Tensor) -> list[Tensor]:
        images = [argument.contiguous().numpy() for argument in arguments]
        rows = [run_one([image[row] for image in images]) for row in range(len(arguments[0]))]
        return [torch.stack(parts) for parts in zip(*rows, strict=True)]

    return run


def _is_half(weights: Path) -> bool:
    words = numpy.fromfile(weights, dtype="<u4", count=weights.stat().st_size // 4)
    return bool((words == _HALF).any())


def _in_order(names: Sequence[str]) -> list[str]:
    """By number: input_0, input_1, …, input_10."""
    return sorted(names, key=lambda name: int(re.sub(r"\D", "", name) or 0))
