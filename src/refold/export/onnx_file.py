"""ONNX files: what ONNX Runtime opens, and where the converters of other engines start."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from refold.errors import InputError, first_line
from refold.export.converting import quiet
from refold.export.metadata import port_names
from refold.export.older_torch import translations, without_statistics
from refold.export.preparing import in_precision, with_free_axes
from refold.export.request import FLOAT32, Inputs, Precision, Request
from refold.onnx_files import is_onnx_network


def write_onnx(model: nn.Module, request: Request, *, opset_version: int | None = None) -> None:
    """Write one self-contained ONNX file; with a dynamic batch the first axis of every input is ``batch``.

    Inputs and outputs have the names of `port_names`.

    ``opset_version`` is that of ONNX's operators, PyTorch's choice if not given.
    Raises `InputError` where the model cannot be converted.
    """
    import onnx  # here, for a process that only runs another engine's file needs none of it

    model = in_precision(model, request.precision)
    if is_onnx_network(model):
        _write_own_graph(model, request)
        return
    inputs, shapes = with_free_axes(model, request)
    path = request.path
    try:
        with quiet():
            program: Any = torch.onnx.export(
                model,
                inputs,
                dynamo=True,
                verbose=False,
                input_names=port_names("image", len(inputs)),
                dynamic_shapes=shapes,
                opset_version=opset_version,
                custom_translation_table=translations(),
            )
            outputs = program.model.graph.outputs
            names = request.outputs or port_names("output", len(outputs))
            for output, name in zip(outputs, names, strict=True):
                output.name = name
            program.save(path, external_data=False)
        written = onnx.load(str(path))
        _check_shapes(written.graph.input, inputs, request)
        _name_free_axes(written.graph, request)
        without_statistics(written.graph)
        _without_traces(written.graph)
        onnx.helper.set_model_props(written, dict(request.metadata))
        onnx.checker.check_model(written, full_check=True)
        onnx.save(written, str(path))
    except (OSError, InputError):
        raise
    except Exception as error:
        hint = f"; {_ADVICE} may help" if request.dynamic_batch or request.dynamic_size else ""
        raise InputError(
            f"{type(model).__name__} cannot be converted to ONNX: {first_line(error)}{hint}."
        ) from error


def _write_own_graph(model: Any, request: Request) -> None:
    """Write a network that came from an ONNX file as that file, with what was folded; its metadata stay beside ours."""
    from refold.onnx_files.saving import save_model
    from refold.onnx_files.writing import written

    graph = written(model, model.program, (request.inputs, {}))
    graph.metadata_props.update(request.metadata)
    save_model(graph, request.path)


# Under which PyTorch writes the modules around an operator for pictures of a graph.
_NAMESPACE = "namespace"
_ADVICE = "a fixed batch and size (dynamic_batch=False, dynamic_size=False)"


def _check_shapes(written: Sequence[Any], inputs: Inputs, request: Request) -> None:
    """Raise `InputError` where a file takes other shapes than were asked for; PyTorch may fall back to fixed ones."""
    for value, tensor in zip(written, inputs, strict=True):
        axes = value.type.tensor_type.shape.dim
        found: list[int | str] = [axis.dim_param or axis.dim_value for axis in axes]
        asked: list[int | str] = list(tensor.shape)
        free = request.free_axes(tensor)
        for axis in free:
            asked[axis] = found[axis] if axis < len(found) and isinstance(found[axis], str) else "any"
        if found != asked:
            raise InputError(
                f"The input '{value.name}' should be {_shape(asked)} and was written as {_shape(found)}"
                + (f"; {_ADVICE} may help." if free else ".")
            )


def _shape(axes: Sequence[int | str]) -> str:
    return " x ".join(str(axis) for axis in axes)


def _name_free_axes(graph: Any, request: Request) -> None:
    """Name the free axes ``batch``, ``height`` and ``width``, which PyTorch calls as it likes."""
    names: dict[str, str] = {}
    for value, tensor in zip(graph.input, request.inputs, strict=True):
        axes = value.type.tensor_type.shape.dim
        names |= {axes[axis].dim_param: name for axis, name in request.free_axes(tensor).items()}
    for value in [*graph.input, *graph.output, *graph.value_info]:
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param in names:
                axis.dim_param = names[axis.dim_param]


def _without_traces(graph: Any) -> None:
    """Leave out PyTorch's notes on how it converted: they hold paths of this machine, and differ from run to run."""
    from refold.onnx_files.places import SCOPES

    for part in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        kept = [entry for entry in part.metadata_props if entry.key in (SCOPES, _NAMESPACE)]
        del part.metadata_props[:]
        part.metadata_props.extend(kept)


@contextmanager
def as_onnx(
    model: nn.Module, request: Request, *, precision: Precision = FLOAT32, opset_version: int | None = None
) -> Iterator[Path]:
    """Write the model to a temporary ONNX file for the block; raises `InputError` where that fails.

    Its ``precision`` is float32 unless given, whatever the request's: most converters lower it themselves.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        write_onnx(
            model, replace(request, path=path, precision=precision, metadata={}), opset_version=opset_version
        )
        yield path
