"""OpenVINO files (.xml, and .bin with the weights), run by OpenVINO on the CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import openvino
import torch
from torch import Tensor, nn

from refold.errors import InputError, first_line
from refold.export.engines import Contents, Session
from refold.export.onnx_file import as_onnx
from refold.export.request import FLOAT16, Precision, Request

_NO_OPERATORS = {"Constant", "Convert", "Parameter", "Reshape", "Result", "Squeeze", "Unsqueeze"}
_SECTION = "refold"


def write(model: nn.Module, request: Request) -> Sequence[str]:
    """Write the graph and the weights beside it; raises `InputError` where the model cannot be converted."""
    with as_onnx(model, request) as onnx_file:
        try:
            converted = openvino.convert_model(onnx_file)
            save(converted, request.path, request.metadata, request.precision)
        except Exception as error:
            raise InputError(f"OpenVINO cannot convert the model: {first_line(error)}.") from error
    return []


def save(converted: Any, path: Path, metadata: Mapping[str, str], precision: Precision) -> None:
    """Save what OpenVINO converted, with the metadata in it."""
    for key, value in metadata.items():
        converted.set_rt_info(value, [_SECTION, key])
    converted.set_rt_info(precision, [_SECTION, "precision"])
    openvino.save_model(converted, path, compress_to_fp16=precision == FLOAT16)


def contents(path: Path) -> Contents:
    """Count what a file holds; the batch counts as one if it is free, and images without a size tell no MACs."""
    model = _core().read_model(path)
    operators = model.get_ops()
    is_sized = not any(
        axis.is_dynamic for value in model.inputs for axis in list(value.get_partial_shape())[1:]
    )
    kinds = Counter(operator.get_type_name() for operator in operators)
    constants = [operator for operator in operators if operator.get_type_name() == "Constant"]
    # Single numbers are the settings of an operator: bounds, slopes, the shift of a hard sigmoid.
    sizes = [_size(constant.output(0)) for constant in constants if _is_real(constant)]
    return Contents(
        parameters=sum(size for size in sizes if size > 1),
        macs=sum(_macs(operator) for operator in operators) if is_sized else None,
        operators={kind: n for kind, n in kinds.most_common() if kind not in _NO_OPERATORS},
    )


def _is_real(constant: Any) -> bool:
    real: bool = constant.get_element_type().is_real()
    return real


@cache
def _core() -> Any:
    """One for the whole process.

    The CPU plugin gives the thread that loads it another stack for signals, and frees that when the last core goes, in
    whatever thread this is: the next signal, such as that of a child that ends, would end the process.
    """
    return openvino.Core()


def _shape(value: Any) -> list[int]:
    return [1 if axis.is_dynamic else axis.get_length() for axis in value.get_partial_shape()]


def _size(value: Any) -> int:
    return prod(_shape(value))


def _macs(operator: Any) -> int:
    kind = operator.get_type_name()
    if kind not in ("Convolution", "GroupConvolution", "MatMul"):
        return 0
    written, weight = _size(operator.output(0)), _shape(operator.input_value(1))
    if kind == "MatMul":
        return int(written * weight[-1 if operator.get_attributes()["transpose_b"] else -2])
    # Weights are (out, in, height, width), with a leading axis of groups in a GroupConvolution.
    return int(written * prod(weight[2 if kind == "GroupConvolution" else 1 :]))


def read_metadata(path: Path) -> dict[str, str]:
    """What `write` put into a file; empty for a file of another origin."""
    model = _core().read_model(path)
    if not model.has_rt_info([_SECTION]):
        return {}
    return {key: str(entry) for key, entry in model.get_rt_info([_SECTION]).value.items()}


def open(path: Path, *, threads: int | None = None) -> Session:
    """Load a file in OpenVINO, with ``threads`` threads if given; raises `InputError` where it cannot."""
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    try:
        core = _core()
        model = core.read_model(path)
        # OpenVINO would take bfloat16 by itself where the processor has it.
        settings["INFERENCE_PRECISION_HINT"] = "f16" if _wants_half(model) and _has_half(core) else "f32"
        compiled = core.compile_model(model, "CPU", settings)
    except Exception as error:
        raise InputError(f"OpenVINO cannot load '{path}': {first_line(error)}.") from error

    def run(*arguments: Tensor) -> list[Tensor]:
        results = compiled([argument.numpy() for argument in arguments])
        return [torch.from_numpy(results[output].copy()) for output in compiled.outputs]

    return run


def _has_half(core: Any) -> bool:
    return "FP16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _wants_half(model: Any) -> bool:
    key = [_SECTION, "precision"]
    return bool(model.has_rt_info(key)) and model.get_rt_info(key).value == FLOAT16
