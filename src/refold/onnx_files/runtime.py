"""Run a file in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


def in_runtime(model: Path | bytes, names: Sequence[str], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of a file, on the CPU. Raises whatever ONNX Runtime raises."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model if isinstance(model, bytes) else str(model), options, providers=["CPUExecutionProvider"]
    )
    feed = {name: value.detach().cpu().numpy() for name, value in zip(names, inputs, strict=True)}
    return [torch.from_numpy(output) for output in session.run(None, feed)]
