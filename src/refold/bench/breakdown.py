"""Where the time of a call goes, by kind of operator (RepGhost, figure 2; RepNeXt, figure 5)."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from refold.recording.operators import word_named

DEPTHWISE, POINTWISE, SPATIAL = "depthwise convolution", "1x1 convolution", "k x k convolution"

KINDS = (
    *(SPATIAL, POINTWISE, DEPTHWISE, "linear", "batch norm", "other norm", "activation", "add", "multiply"),
    *("concatenation", "pooling", "resizing", "layout", "other"),
)
"""What is told apart, in the order of every chart and table."""
_TOGETHER = {
    **dict.fromkeys(("matrix product", "attention"), "linear"),
    **dict.fromkeys(("padding", "copy", "gather", "reshape", "permute", "slice", "cast"), "layout"),
    **dict.fromkeys(("identity", "dropout"), "layout"),
}
"""Words of the registry of operators that are one kind here."""
_SUMS = ("sum", "rsub")
_LAYOUT = (
    *("reorderinput", "reorderoutput", "split", "chunk", "split_with_sizes", "select", "expand", "slice"),
    *("shape", "quantizelinear", "dequantizelinear"),
)
"""What moves memory, or tells how it lies, and is no operator of its own in the registry."""
_OF_INTEGERS = ("qlinear", "q")
"""What ONNX Runtime puts before the names of operators on integers; the longer first."""
_QUANTIZED_CONVOLUTION, _QUANTIZED_WEIGHT = "QLinearConv", 3
"""The convolution of integers, and the place of its weight among its inputs."""


def kind_of(operator: str, shapes: Sequence[Sequence[int]]) -> str:
    """The kind of an operator by its name in a profile; `shapes` are those of its inputs.

    Convolutions are told apart by the shapes of their input and weight, (batch, in_channels, ...) and
    (out_channels, in_channels / groups, ...).
    """
    name = operator.lower().removeprefix("aten::").strip("_")
    names = (name, *(name.removeprefix(prefix) for prefix in _OF_INTEGERS if name.startswith(prefix)))
    found = next(filter(None, map(word_named, names)), "other")
    word = "add" if name in _SUMS else "layout" if name in _LAYOUT else found
    if word != "convolution":
        kind = _TOGETHER.get(word, word)
        return kind if kind in KINDS else "other"
    if len(shapes) < 2 or len(shapes[1]) < 3:
        return SPATIAL
    image, weight = shapes[0], shapes[1]
    if weight[1] == 1 and image[1] > 1:
        return DEPTHWISE
    return POINTWISE if set(weight[2:]) == {1} else SPATIAL


def profile_torch(model: nn.Module, image: Tensor, calls: int = 5, warm_up: int = 3) -> dict[str, float]:
    """Milliseconds a call by kind of operator, from PyTorch's profiler; what an operator calls counts as its own.

    On a card the time is that of its kernels.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_card := image.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.inference_mode():
        for _ in range(warm_up):
            model(image)
        with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
            for _ in range(calls):
                model(image)
            if on_card:
                torch.cuda.synchronize()
    times: Counter[str] = Counter()
    for event in profile.events() or ():
        if event.cpu_parent is None and event.name.startswith("aten::"):
            microseconds = event.device_time_total if on_card else event.cpu_time_total
            times[kind_of(event.name, event.input_shapes)] += microseconds / 1000 / calls
    return _ordered(times)


def profile_onnxruntime(
    path: Path, image: Tensor, threads: int, calls: int = 10, warm_up: int = 3
) -> dict[str, float]:
    """Milliseconds a call by kind of operator, from ONNX Runtime's own profile of an ONNX file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        optimised = Path(folder) / "optimised.onnx"
        options.optimized_model_filepath = str(optimised)
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        feed = {session.get_inputs()[0].name: image.numpy()}
        for _ in range(warm_up + calls):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        return from_onnxruntime(events, warm_up, _integer_weights(optimised))


def _integer_weights(optimised: Path) -> dict[str, Sequence[int]]:
    """The shapes of the weights of convolutions on integers, by the names of these, which the profile leaves out."""
    import onnx

    graph = onnx.load(str(optimised)).graph
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    return {
        node.name: shapes.get(node.input[_QUANTIZED_WEIGHT], [])
        for node in graph.node
        if node.op_type == _QUANTIZED_CONVOLUTION
    }


def from_onnxruntime(
    events: Sequence[dict[str, Any]], warm_up: int, integer_weights: Mapping[str, Sequence[int]] | None = None
) -> dict[str, float]:
    """Milliseconds a call by kind of operator, from the events of ONNX Runtime's profile, less the first calls.

    ``integer_weights`` are the shapes of the weights of convolutions on integers, by the names of these.
    """
    weights = integer_weights or {}
    starts = sorted(event["ts"] for event in events if event["name"] == "model_run")
    counted = starts[warm_up:]
    times: Counter[str] = Counter()
    for event in events:
        if (
            event.get("cat") != "Node"
            or not event["name"].endswith("_kernel_time")
            or event["ts"] < counted[0]
        ):
            continue
        shapes = [shape for entry in event["args"].get("input_type_shape", []) for shape in entry.values()]
        name = event["name"].removesuffix("_kernel_time")
        if name in weights:
            shapes = [*shapes[:1], weights[name]]
        times[kind_of(event["args"]["op_name"], shapes)] += event["dur"] / 1000 / len(counted)
    return _ordered(times)


def _ordered(times: Counter[str]) -> dict[str, float]:
    return {kind: times[kind] for kind in KINDS if times[kind]}


# Engines whose time can be taken apart; each is told the exported file, an image and the threads.
PROFILERS: dict[str, Callable[[Path, Tensor, int], dict[str, float]]] = {"onnxruntime": profile_onnxruntime}
