"""Small ONNX models, and one check that folding them is exact and changes nothing else."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

import refold

LARGEST = 1e-9
Array = Any


def model(text: str, opset: int = 17, ir_version: int = 8, **tensors: Array) -> onnx.ModelProto:
    """A model of a graph in ONNX's text form, `g (float[N,3,8,8] x) => (float[N,4,8,8] y) {...}`, and its tensors."""
    made = onnx.parser.parse_model(f'<ir_version: {ir_version}, opset_import: ["" : {opset}]> {text}')
    for name, value in tensors.items():
        made.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return made


def normal(*shape: int, dtype: Any = np.float64, seed: int = 0) -> Array:
    """Random numbers."""
    return np.random.default_rng(seed + sum(shape)).standard_normal(shape).astype(dtype)


def norm(channels: int, dtype: Any = np.float64, prefix: str = "n") -> dict[str, Array]:
    """The numbers of a batch norm: `ns`, `nb`, `nm`, `nv`."""
    names = ("s", "b", "m", "v")
    rows = np.random.default_rng(channels).random((4, channels)).astype(dtype) + 0.5
    return {f"{prefix}{name}": row for name, row in zip(names, rows, strict=True)}


def kinds(made: onnx.ModelProto) -> Counter[str]:
    """How many nodes of each kind."""
    return Counter(node.op_type for node in made.graph.node)


def answers(made: onnx.ModelProto, inputs: Sequence[Array]) -> list[Array]:
    """What ONNX's own reference implementation gives."""
    if made.opset_import[0].version < 14:  # where it takes the statistics of the batch for those of a norm
        made = onnx.version_converter.convert_version(made, 17)
    names = [v.name for v in made.graph.input if v.name not in {t.name for t in made.graph.initializer}]
    return ReferenceEvaluator(made).run(None, dict(zip(names, inputs, strict=True)))  # type: ignore[no-any-return]


def distance(before: onnx.ModelProto, after: onnx.ModelProto, inputs: Sequence[Array]) -> float:
    """The largest relative difference of all outputs, by ONNX's own reference implementation."""
    pairs = zip(answers(before, inputs), answers(after, inputs), strict=True)
    return max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in pairs)


def check_fold(
    made: onnx.ModelProto, *shapes: Sequence[int], expected: dict[str, int] | None = None, **options: Any
) -> tuple[onnx.ModelProto, Any]:
    """Fold, compare in ONNX's reference implementation in float64, check the file; the model and the report."""
    example = tuple(torch.from_numpy(normal(*shape)) for shape in shapes)
    plain, report = refold.fold(made, None, example or None, **options)
    onnx.checker.check_model(plain, full_check=True)
    if shapes:
        assert distance(made, plain, [value.numpy() for value in example]) < LARGEST
    if expected is not None:
        assert kinds(plain) == expected
    assert [v.name for v in plain.graph.output] == [v.name for v in made.graph.output]
    assert plain.opset_import == made.opset_import
    assert len(plain.graph.node) <= len(made.graph.node)
    return plain, report
