"""TensorRT engines (.engine), built from ONNX and run on an NVIDIA card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tensorrt
import torch
from torch import Tensor, nn

from refold.errors import InputError, first_line
from refold.export.engines import CannotRun, Contents, Session
from refold.export.metadata import port_names
from refold.export.onnx_file import as_onnx
from refold.export.placing import read_beside, write_beside
from refold.export.request import Inputs, Request

# The range of a free axis is part of the engine.
LARGEST_BATCH = 32
_DEVICE = "cuda"
_DTYPES = {
    tensorrt.DataType.FLOAT: torch.float32,
    tensorrt.DataType.HALF: torch.float16,
    tensorrt.DataType.INT32: torch.int32,
    tensorrt.DataType.INT64: torch.int64,
    tensorrt.DataType.BOOL: torch.bool,
}


def write(model: nn.Module, request: Request) -> Sequence[str]:
    """Write an engine for this machine's card, and the metadata beside it.

    Raises `InputError` where there is no card or the model cannot be converted.
    """
    batch = max(len(argument) for argument in request.inputs if argument.dim())
    batches = (1, batch, max(LARGEST_BATCH, batch + 2)) if request.dynamic_batch else None
    if not _has_card():
        raise InputError(
            "TensorRT builds an engine on the card that is to run it, and PyTorch finds no NVIDIA card here; "
            "export for onnxruntime here, and build where the card is: "
            f"{_build_command(request.inputs, batches)}"
        )
    with as_onnx(model, request, precision=request.precision) as onnx_file:
        request.path.write_bytes(_build(onnx_file, batches))
    write_beside(request.path, request.metadata)
    notes = ["The engine is for this kind of card and this version of TensorRT."]
    return [*notes, f"Batches of up to {batches[-1]} images are allowed."] if batches else notes


def _has_card() -> bool:
    return torch.cuda.is_available()


def _build_command(inputs: Inputs, batches: Sequence[int] | None) -> str:
    shapes = ""
    for kind, batch in zip(("min", "opt", "max"), batches or (), strict=False):
        sizes = [
            f"{name}:{'x'.join(map(str, (batch, *argument.shape[1:])))}"
            for name, argument in zip(port_names("image", len(inputs)), inputs, strict=True)
            if argument.dim()
        ]
        shapes += f" --{kind}Shapes={','.join(sizes)}"
    return f"trtexec --onnx=net.onnx --saveEngine=net.engine --stronglyTyped --noTF32{shapes}"


def _build(onnx_file: Path, batches: Sequence[int] | None) -> bytes:
    logger = tensorrt.Logger(tensorrt.Logger.ERROR)
    builder = tensorrt.Builder(logger)
    # Every tensor keeps the dtype that it has in the ONNX file; from version 11 on there is no other way.
    network = builder.create_network(1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = tensorrt.OnnxParser(network, logger)
    if not parser.parse(onnx_file.read_bytes()):
        reasons = "; ".join(str(parser.get_error(index).desc()) for index in range(parser.num_errors))
        raise InputError(f"TensorRT cannot read the model: {reasons.rstrip('.')}.")
    config = builder.create_builder_config()
    # TF32 keeps 10 of float32's 23 bits.
    config.clear_flag(tensorrt.BuilderFlag.TF32)
    if batches is not None:
        config.add_optimization_profile(_profile(builder, network, batches))
    built = builder.build_serialized_network(network, config)
    if built is None:
        raise InputError("TensorRT cannot build an engine of the model; its log says why.")
    return bytes(built)


def _profile(builder: Any, network: Any, batches: Sequence[int]) -> Any:
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        value = network.get_input(index)
        shape = tuple(value.shape)
        if shape:
            profile.set_shape(value.name, *((batch, *shape[1:]) for batch in batches))
    return profile


def contents(path: Path) -> Contents:
    """Nothing is counted: the operators have become kernels."""
    return Contents(parameters=None, macs=None, operators={})


def read_metadata(path: Path) -> dict[str, str]:
    """What `write` put beside an engine; empty for one of another origin."""
    return read_beside(path)


def open(path: Path, *, threads: int | None = None) -> Session:
    """Load an engine; a call includes the way to the card and back. ``threads`` changes nothing.

    Raises `CannotRun` where there is no card and `InputError` where TensorRT cannot load the file.
    """
    if not _has_card():
        raise CannotRun("The file was not run and not compared with PyTorch: there is no NVIDIA card here.")
    try:
        engine = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.ERROR)).deserialize_cuda_engine(
            path.read_bytes()
        )
    except Exception as error:
        raise InputError(f"TensorRT cannot load '{path}': {first_line(error)}.") from error
    if engine is None:
        raise InputError(f"TensorRT cannot load '{path}'; build it with this version, on this kind of card.")
    context = engine.create_execution_context()
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    inputs = [name for name in names if engine.get_tensor_mode(name) == tensorrt.TensorIOMode.INPUT]
    outputs = [name for name in names if name not in inputs]
    stream = torch.cuda.Stream()

    def run(*arguments: Tensor) -> list[Tensor]:
        with torch.cuda.stream(stream):
            tensors = {
                name: argument.to(_DEVICE).contiguous()
                for name, argument in zip(inputs, arguments, strict=True)
            }
            for name, tensor in tensors.items():
                context.set_input_shape(name, tuple(tensor.shape))
            for name in outputs:
                dtype = _DTYPES[engine.get_tensor_dtype(name)]
                shape = tuple(context.get_tensor_shape(name))
                tensors[name] = torch.empty(shape, dtype=dtype, device=_DEVICE)
            for name, tensor in tensors.items():
                context.set_tensor_address(name, tensor.data_ptr())
            if not context.execute_async_v3(stream.cuda_stream):
                raise InputError(
                    f"TensorRT cannot run '{path}' on inputs of shape {[tuple(a.shape) for a in arguments]}."
                )
        stream.synchronize()
        return [tensors[name].cpu() for name in outputs]

    return run
