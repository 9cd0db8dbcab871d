"""Where the time of a call goes, by kind of operator (RepGhost, figure 2; RepNeXt, figure 5)."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

DEPTHWISE, POINTWISE, SPATIAL = "depthwise convolution", "1x1 convolution", "k x k convolution"

# The order of every chart and table. Names on the right are those of PyTorch's profiler and of ONNX Runtime's,
# in lower case, without underscores around.
_KINDS: dict[str, tuple[str, ...]] = {
    SPATIAL: (),
    POINTWISE: (),
    DEPTHWISE: (),
    "linear": ("linear", "addmm", "mm", "matmul", "bmm", "gemm", "fusedmatmul", "fusedgemm", "einsum"),
    "batch norm": ("batch_norm", "batchnormalization"),
    "other norm": ("layer_norm", "group_norm", "layernormalization", "groupnorm", "skiplayernormalization"),
    "activation": (
        *(
            "relu",
            "relu6",
            "hardtanh",
            "clamp",
            "clip",
            "silu",
            "hardswish",
            "hardsigmoid",
            "sigmoid",
            "gelu",
        ),
        *("tanh", "softmax", "quickgelu", "erf", "leakyrelu", "leaky_relu", "prelu", "mish", "fastgelu"),
        *("biasgelu", "elu", "softplus"),
    ),
    "add": ("add", "sub", "sum", "rsub"),
    "multiply": ("mul", "div"),
    "concatenation": ("cat", "concat", "stack"),
    "pooling": (
        *("avg_pool2d", "adaptive_avg_pool2d", "max_pool2d", "adaptive_max_pool2d", "mean"),
        *("averagepool", "globalaveragepool", "maxpool", "globalmaxpool", "reducemean"),
    ),
    "resizing": ("upsample_nearest2d", "upsample_bilinear2d", "resize", "upsample"),
    "layout": (
        *(
            "reorderinput",
            "reorderoutput",
            "transpose",
            "reshape",
            "flatten",
            "slice",
            "split",
            "pad",
            "chunk",
        ),
        *(
            "view",
            "permute",
            "contiguous",
            "clone",
            "copy",
            "constant_pad_nd",
            "squeeze",
            "unsqueeze",
            "select",
        ),
        *("expand", "gather", "split_with_sizes", "narrow", "to", "dropout", "detach"),
    ),
    "other": (),
}
_KIND_OF = {name: kind for kind, names in _KINDS.items() for name in names}
KINDS = tuple(_KINDS)
_CONVOLUTIONS = {
    "conv2d",
    "convolution",
    "conv1d",
    "conv3d",
    "conv",
    "fusedconv",
    "nhwcfusedconv",
}


def kind_of(operator: str, shapes: Sequence[Sequence[int]]) -> str:
    """The kind of an operator by its name in a profile; `shapes` are those of its inputs.

    Convolutions are told apart by the shapes of their input and weight, (batch, in_channels, ...) and
    (out_channels, in_channels / groups, ...).
    """
    name = operator.lower().removeprefix("aten::").strip("_")
    if name not in _CONVOLUTIONS:
        return _KIND_OF.get(name, "other")
    if len(shapes) < 2 or len(shapes[1]) < 3:
        return SPATIAL
    image, weight = shapes[0], shapes[1]
    if weight[1] == 1 and image[1] > 1:
        return DEPTHWISE
    return POINTWISE if set(weight[2:]) == {1} else SPATIAL


def profile_torch(model: nn.Module, image: Tensor, calls: int = 5, warm_up: int = 3) -> dict[str, float]:
    """Milliseconds a call by kind of operator, from PyTorch's profiler; what an operator calls counts as its own."""
    with torch.inference_mode():
        for _ in range(warm_up):
            model(image)
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
        ) as profile:
            for _ in range(calls):
                model(image)
    times: Counter[str] = Counter()
    for event in profile.events() or ():
        if event.cpu_parent is None and event.name.startswith("aten::"):
            times[kind_of(event.name, event.input_shapes)] += event.cpu_time_total / 1000 / calls
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
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        feed = {session.get_inputs()[0].name: image.numpy()}
        for _ in range(warm_up + calls):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return from_onnxruntime(events, warm_up)


def from_onnxruntime(events: Sequence[dict[str, Any]], warm_up: int) -> dict[str, float]:
    """Milliseconds a call by kind of operator, from the events of ONNX Runtime's profile, less the first calls."""
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
        times[kind_of(event["args"]["op_name"], shapes)] += event["dur"] / 1000 / len(counted)
    return _ordered(times)


def _ordered(times: Counter[str]) -> dict[str, float]:
    return {kind: times[kind] for kind in KINDS if times[kind]}


# Engines whose time can be taken apart; each is told the exported file, an image and the threads.
PROFILERS: dict[str, Callable[[Path, Tensor, int], dict[str, float]]] = {"onnxruntime": profile_onnxruntime}
