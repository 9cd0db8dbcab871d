"""What is checked of a written file: its integers, its engine against float arithmetic, its answers, its time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from refold.boxes import detections
from refold.boxes.comparing import difference
from refold.boxes.detections import Detector
from refold.errors import NotEquivalent
from refold.quantization.columns import layout_of
from refold.quantization.integers import PAIR_LIMIT, Pairs
from refold.quantization.lockstep import Distance, decibels
from refold.quantization.ranges import STEPS
from refold.quantization.report import Agreement, LayerReport, Speed
from refold.quantization.skeleton import Array, Graph

# Decibels between the engine and float arithmetic of one file, beyond which the engine computes something else.
_MOST_GAP = 1.0
# Boxes that are looked at, and which two of them are one.
_LEAST_SCORE, _OVERLAP, _SCORES_APART = 0.3, 0.9, 0.05
# Noise this small is rounding of float32, whatever it is compared with.
_NO_NOISE = 60.0

Session = Callable[[Array], list[Array]]


def opened(
    path: Path, *, optimised: bool = True, threads: int | None = None, data: bytes | None = None
) -> Session:
    """A file in ONNX Runtime, or once without any optimisation, so that it computes in float.

    ``data`` is a file in memory.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        str(path) if data is None else data, options, providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name
    return lambda images: list(session.run(None, {name: images}))


def outputs_of(session: Session, parts: Sequence[Array]) -> list[Array]:
    """Each output for all images."""
    found = [session(part) for part in parts]
    return [np.concatenate(values) for values in zip(*found, strict=True)]


def layer_reports(graph: Graph, distances: Sequence[Distance], bits: int) -> list[LayerReport]:
    """What the integers in a file show of each of its layers."""
    by_name = {each.layer: each.decibels for each in distances}
    found = []
    for layer in graph.layers:
        weight = graph.constant(layer.weight.input[0])
        layout = layout_of(layer.node, weight.shape)
        rows = torch.from_numpy(layout.rows(weight.astype(np.float32))).flatten(0, 1)
        # A depthwise kernel adds in 32 bits.
        pairs = (
            rows.abs().amax(1)
            if layout.is_depthwise
            else Pairs.of(layout.columns, layout.channels).largest(rows)
        )
        found.append(
            LayerReport(
                layer.name,
                layer.node.op_type,
                by_name.get(layer.name, float("nan")),
                bits,
                len(rows),
                int(pairs.max()),
                int((pairs > PAIR_LIMIT).sum()) if graph.reads_integers(layer) else 0,
            )
        )
    return found


def check_engine(
    path: Path,
    graph: Graph,
    wanted: Sequence[Array],
    parts: Sequence[Array],
    run: Session,
    title: str,
    reopen: Callable[[Any], Session] | None = None,
) -> float:
    """How many decibels an engine, ``run``, loses against the ONNX file at ``path`` computed in float arithmetic.

    ``reopen`` opens an ONNX model in the same engine; ONNX Runtime if not given.
    Raises `NotEquivalent`, naming the layers at which it starts, where that is more than one.
    """
    in_float = outputs_of(opened(path, optimised=False), parts)
    in_engine = outputs_of(run, parts)
    gap = min(decibels(wanted, in_float), _NO_NOISE) - min(decibels(wanted, in_engine), _NO_NOISE)
    if gap > _MOST_GAP:
        names = _differing_layers(graph, parts[0], reopen or _of_model)
        raise NotEquivalent(
            f"{title} loses {gap:.1f} dB against float arithmetic of the same file on this processor, first at "
            f"{', '.join(names) or 'no single layer'}; give cpu='any', whose scales fit every arithmetic."
        )
    return gap


def _of_model(model: Any, *, optimised: bool = True) -> Session:
    return opened(Path(), optimised=optimised, data=model.SerializeToString())


def _differing_layers(graph: Graph, images: Array, reopen: Callable[[Any], Session]) -> list[str]:
    """The first layers whose values differ by more than rounding between the engine and float arithmetic."""
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    watched = {}
    for layer in graph.layers:
        quantized = graph.quantized(layer.node.output[0])
        # What is not rounded, such as the answers, is watched as it is.
        watched[(layer.node if quantized is None else quantized).output[0]] = (layer.name, quantized is None)
    del model.graph.output[:]
    model.graph.output.extend(
        onnx.helper.make_tensor_value_info(
            name, onnx.TensorProto.FLOAT if is_float else onnx.TensorProto.UINT8, None
        )
        for name, (_, is_float) in watched.items()
    )
    both = [open_model(images) for open_model in (reopen(model), _of_model(model, optimised=False))]
    shares = [_share_apart(a, b) for a, b in zip(*both, strict=True)]
    return [name for (name, _), share in zip(watched.values(), shares, strict=True) if share > 1e-3][:3]


def _share_apart(given: Array, exact: Array) -> float:
    """The share of values that are more than two of 255 steps apart."""
    step = 1.0 if exact.dtype == np.uint8 else float(np.ptp(exact)) / STEPS
    return float((np.abs(given.astype(np.float32) - exact.astype(np.float32)) > 2 * step).mean())


def agreement_of(
    wanted: Sequence[Array],
    found: Sequence[Array],
    labels: Tensor | None,
    network: nn.Module,
    size: Sequence[int],
) -> Agreement:
    """How near answers are to those of the float ``network``, for images of a size (height, width)."""
    first, other = wanted[0], found[0]
    count = len(first)
    near = decibels(list(wanted), list(found))
    if isinstance(network, Detector):
        return _agreement_of_boxes(network, wanted, found, size, near)
    is_segmenter = getattr(network, "output_kind", None) == "segmentation" and first.ndim == 4
    if not is_segmenter and (first.ndim != 2 or first.shape[1] < 2):
        return Agreement(count, near)
    answers, others = first.argmax(1), other.argmax(1)
    same = int((answers == others).sum())
    if is_segmenter:
        return Agreement(count, near, same, counted=answers.size, kind="pixels")
    if labels is None:
        return Agreement(count, near, same, counted=count)
    truth = labels.numpy()
    return Agreement(count, near, same, int((others == truth).sum()), int((answers == truth).sum()), count)


def _agreement_of_boxes(
    network: Any, wanted: Sequence[Array], found: Sequence[Array], size: Sequence[int], near: float
) -> Agreement:
    """The same of maps: what boxes they stand for."""
    decode = detections(network, threshold=_LEAST_SCORE)
    with torch.inference_mode():
        first, other = (decode.of_maps([torch.from_numpy(m) for m in maps], size) for maps in (wanted, found))
    apart = difference(first, other, overlap=_OVERLAP, score=_SCORES_APART)
    return Agreement(len(wanted[0]), near, apart.boxes - apart.unmatched, counted=apart.boxes, kind="boxes")


def speed_of(float_run: Session, int8_run: Session, image: Array, *, threads: int, calls: int = 30) -> Speed:
    """The time of one image in both files, turn by turn."""
    runs: tuple[Session, Session] = (float_run, int8_run)
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(calls + 5):
        for run, taken in zip(runs, times, strict=True):
            start = time.perf_counter()
            run(image)
            if turn >= 5:
                taken.append(1e3 * (time.perf_counter() - start))
    return Speed(median(times[0]), median(times[1]), threads, calls)
