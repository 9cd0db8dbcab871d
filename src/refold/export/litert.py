"""LiteRT files (.tflite), converted by litert-torch and run by LiteRT on the CPU."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flatbuffers
import torch
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from torch import Tensor, nn

from refold.errors import InputError, first_line
from refold.export.converting import muted
from refold.export.engines import Contents, Session
from refold.export.metadata import PortKind, port_names
from refold.export.request import FLOAT16, Request
from refold.export.resizing import resizes_as_choices

_ENTRY = "refold"
_NO_OPERATORS = {"RESHAPE", "TRANSPOSE"}
_FLOAT16_WEIGHTS = {
    "regex": ".*",
    "operation": "*",
    "algorithm_key": "float_casting",
    "op_config": {
        "weight_tensor_config": {"num_bits": 16, "symmetric": True, "dtype": "FLOAT"},
        "compute_precision": "FLOAT",
        "explicit_dequantize": True,
        "skip_checks": False,
    },
}


def write(model: nn.Module, request: Request) -> Sequence[str]:
    """Write one LiteRT file, the metadata in an entry of its own.

    Raises `InputError` where the model cannot be converted.
    """
    half, path, inputs = request.precision == FLOAT16, request.path, request.inputs
    if request.dynamic_batch:
        inputs = tuple(tensor[:1] if tensor.dim() else tensor for tensor in inputs)
    try:
        with muted():
            import litert_torch

            # Its own nearest-neighbour resize has half-pixel centres, PyTorch's has not.
            model = resizes_as_choices(model, inputs)
            litert_torch.convert(model, inputs).export(str(path))
            # The quantizer puts the weights behind the flatbuffer, where packing it anew would lose them.
            _add_names_and_metadata(path, request.metadata)
            if half:
                _halve_weights(path)
    except OSError:
        raise
    except Exception as error:
        raise InputError(f"LiteRT cannot convert the model: {first_line(error)}.") from error
    notes = ["The weights are float16; LiteRT computes in float32 on this processor."] if half else []
    if request.dynamic_batch:
        notes.append("The file takes one image a call; a batch is run image by image.")
    return notes


def _halve_weights(path: Path) -> None:
    from ai_edge_quantizer.quantizer import Quantizer

    quantizer = Quantizer(str(path), [_FLOAT16_WEIGHTS])
    path.write_bytes(quantizer.quantize().quantized_model)


def _read(path: Path) -> Any:
    return schema.ModelT.InitFromObj(schema.Model.GetRootAs(path.read_bytes()))


def _add_names_and_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    model = _read(path)
    buffer, entry = schema.BufferT(), schema.MetadataT()
    buffer.data = list(json.dumps(dict(metadata)).encode())
    entry.name, entry.buffer = _ENTRY, len(model.buffers)
    model.buffers.append(buffer)
    model.metadata = [*(model.metadata or []), entry]
    for signature in model.signatureDefs:
        _name_ports(signature.inputs, "image")
        _name_ports(signature.outputs, "output")
    builder = flatbuffers.Builder(path.stat().st_size + 4096)
    builder.Finish(model.Pack(builder), b"TFL3")
    path.write_bytes(builder.Output())


def _name_ports(ports: Sequence[Any], kind: PortKind) -> None:
    """Call the inputs or the outputs of a signature as in every other format; the converter numbers them."""
    in_order = sorted(ports, key=lambda port: _number(port.name.decode()))
    for port, name in zip(in_order, port_names(kind, len(in_order)), strict=True):
        port.name = name


def read_metadata(path: Path) -> dict[str, str]:
    """What `write` put into a file; empty for a file of another origin."""
    model = _read(path)
    for entry in model.metadata or []:
        if entry.name.decode() == _ENTRY:
            buffer = model.buffers[entry.buffer]
            outside = path.read_bytes()[buffer.offset : buffer.offset + buffer.size]
            return dict(json.loads(outside if buffer.data is None else bytes(buffer.data)))
    return {}


def contents(path: Path) -> Contents:
    """Count the operators of a file."""
    model = _read(path)
    names = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}
    kinds = Counter(
        names[model.operatorCodes[operator.opcodeIndex].builtinCode]
        for graph in model.subgraphs
        for operator in graph.operators
    )
    operators = {kind: n for kind, n in kinds.most_common() if kind not in _NO_OPERATORS}
    return Contents(parameters=None, macs=None, operators=operators)


def open(path: Path, *, threads: int | None = None) -> Session:
    """Load a file in LiteRT, with ``threads`` threads if given; raises `InputError` where LiteRT cannot.

    A batch larger than the file's is run in parts of the file's size.
    """
    try:
        interpreter = Interpreter(model_path=str(path), num_threads=threads)
        interpreter.allocate_tensors()
    except Exception as error:
        raise InputError(f"LiteRT cannot load '{path}': {first_line(error)}.") from error
    # Several inputs or outputs are numbered in the names of the signature.
    runner = interpreter.get_signature_runner()
    inputs, outputs = runner.get_input_details(), list(runner.get_output_details())
    names = sorted(inputs, key=_number)
    part = int(inputs[names[0]]["shape"][0]) if len(inputs[names[0]]["shape"]) else 1

    def run(*arguments: Tensor) -> list[Tensor]:
        batch = len(arguments[0]) if arguments[0].dim() else 1
        if batch % part:
            raise InputError(f"'{path}' takes {part} images a call; {batch} cannot be split into such parts.")
        results = []
        for start in range(0, batch, part):
            feed = {
                name: (argument[start : start + part] if argument.dim() else argument).numpy()
                for name, argument in zip(names, arguments, strict=True)
            }
            result = runner(**feed)
            results.append([torch.from_numpy(result[name].copy()) for name in sorted(outputs, key=_number)])
        return [torch.cat(parts) for parts in zip(*results, strict=True)]

    return run


def _number(name: str) -> int:
    digits = "".join(character for character in name if character.isdigit())
    return int(digits or 0)
