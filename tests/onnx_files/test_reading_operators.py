"""The table of operators computes what ONNX says: its own tests of single operators, thousands of numbers."""

import warnings
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from onnx.backend.test.case.node import collect_testcases

from refold.errors import InputError
from refold.onnx_files.evaluating import Evaluated
from refold.onnx_files.reading import read_network

# Random numbers; a maximum of nothing.
_LEFT_OUT = ("test_bernoulli", "test_reduce_max_empty", "test_reduce_min_empty")


def _tensors(values: Any) -> list[torch.Tensor] | None:
    """As tensors; None where they have types that PyTorch has not, or ONNX's test data hold as whole numbers."""
    arrays = [np.asarray(value) for value in values]
    if any(array.dtype.kind not in "fib" and array.dtype != np.uint8 for array in arrays):
        return None
    return [torch.from_numpy(np.array(array)) for array in arrays]


@pytest.fixture(scope="module")
def cases() -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(collect_testcases(None))  # type: ignore[arg-type]  # None is all of them


def test_every_operator_of_the_table_computes_what_onnx_says(cases: list[Any]) -> None:
    checked: Counter[str] = Counter()
    wrong = []
    for case in cases:
        if case.name.startswith(_LEFT_OUT) or "BFLOAT16" in case.name:
            continue
        try:
            network = read_network(case.model)
        except InputError:  # older than any that is read, or of sequences and texts
            continue
        if all(isinstance(step.function.run, Evaluated) for step in network.program.steps):
            continue
        inputs, expected = (_tensors(values) for values in case.data_sets[0])
        if inputs is None or expected is None or len(inputs) != len(network.program.inputs):
            continue
        with torch.no_grad():
            found = network(*inputs)
        found = found if isinstance(found, tuple) else (found,)
        tolerance = 1e-2 if any(value.dtype == torch.float16 for value in expected) else 1e-4
        for own, value in zip(found, expected, strict=True):
            same = own.shape == value.shape and own.dtype == value.dtype
            if not same or not torch.allclose(own, value, rtol=tolerance, atol=tolerance, equal_nan=True):
                wrong.append(case.name)
        checked.update({node.op_type for node in case.model.graph.node})
    assert not wrong
    assert sum(checked.values()) > 500
    linear = {
        "Conv",
        "ConvTranspose",
        "BatchNormalization",
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Concat",
        "Split",
        "Slice",
    }
    linear |= {"Pad", "AveragePool", "Gemm", "MatMul", "Transpose", "Reshape", "Identity", "Cast"}
    assert linear <= set(checked)
