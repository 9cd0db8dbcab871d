"""One pass over a network with both streams, float and int8: ranges, rounding, bias correction, distances."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import log10
from typing import Any

import numpy as np
import torch
from torch import Tensor

from refold.quantization.columns import Layout, layout_of, products_of_columns
from refold.quantization.config import QuantizationConfig
from refold.quantization.integers import Pairs, nearest, rounded_together, scales_of
from refold.quantization.operators import Stream, squared
from refold.quantization.ranges import Range, chosen_range
from refold.quantization.skeleton import DEQUANTIZE, QUANTIZE, Array, Graph, Layer

# More columns than this take minutes to be rounded together.
_MOST_COLUMNS = 4608
# Leaves a bias, in steps of its scale, inside 32 bits.
_LARGEST_BIAS = 2.0**30
# A channel that is alive at fewer places has no mean to speak of.
_LEAST_LIVE = 50


@dataclass
class Distance:
    """How far a value of the int8 stream is from the float stream's, in decibels (SQNR)."""

    layer: str
    operator: str
    decibels: float


@dataclass
class Result:
    """What a pass found: distances in the order the layers run, the network's outputs, and sentences."""

    distances: list[Distance] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def decibels(wanted: Iterable[Array], found: Iterable[Array]) -> float:
    """The ratio of signal to the noise of quantisation, 10·log10; infinite where they are equal."""
    signal = noise = 0.0
    for expected, given in zip(wanted, found, strict=True):
        signal += squared(expected)
        noise += squared(expected - given)
    return float("inf") if not noise else -float("inf") if not signal else 10 * log10(signal / noise)


class Lockstep:
    """Walks the operators of a skeleton and fills in its scales, integers and biases."""

    def __init__(
        self, skeleton: Graph, plain: Graph, images: list[Array], config: QuantizationConfig
    ) -> None:
        (self.input,) = skeleton.inputs
        self.skeleton, self.plain, self.config = skeleton, plain, config
        self.parts = len(images)
        self.float = Stream(plain, {self.input: images})
        self.int8 = Stream(skeleton, {self.input: images})
        self.ranges: dict[str, Range] = {}
        self.weights: dict[str, tuple[Tensor, Tensor]] = {}
        self.result = Result()

    def run(self) -> Result:
        """Fill the skeleton in."""
        graph = self.skeleton
        for node in graph.nodes:
            layer = graph.layer(node)
            if node.op_type == QUANTIZE:
                self._quantize(node)
            elif layer is not None:
                self._layer(layer)
            elif node.op_type != DEQUANTIZE:
                self.int8.values(node.output[0])
        return self.result

    def _quantize(self, node: Any) -> None:
        """Choose the range of a value and let the int8 stream hold its integers."""
        name, scale, zero = node.input
        given = self.int8.values(name)
        if scale not in self.ranges:  # operators that only move values share it
            wanted = self.float.values(name) if name in self.plain.maker or name == self.input else given
            self.ranges[scale] = chosen_range(given, wanted, clip=self.config.clip_ranges)
        found = self.ranges[scale]
        self.skeleton.set_constant(scale, np.array(found.scale, np.float32))
        self.skeleton.set_constant(zero, np.array(found.zero_point, np.uint8))
        self.int8.hold(node.output[0], [found.integers(part) for part in given], found)
        self.int8.release(node)

    def _layer(self, layer: Layer) -> None:
        node = layer.node
        source, output = node.input[0], node.output[0]
        layout = layout_of(node, self.plain.constant(layer.name).shape)
        step = self._step(layer, source)
        bias = self.plain.constant(layer.bias_name) if layer.bias_name in self.plain.constants else None
        if layer.name not in self.weights:  # layers may share one
            self.weights[layer.name] = self._weight(layer, layout, step, bias)
        scale, integers = self.weights[layer.name]
        weight = layout.weight((integers * scale[:, None]).numpy().astype(np.float32))
        answers = [self._answer(node, part, weight, bias) for part in self.int8.parts(source)]
        wanted = self.float.values(output)
        if bias is not None and self.config.correct_bias:
            missed = _missing_bias(answers, wanted, axis=1 if layout.kind == "Conv" else -1)
            _add(answers, missed, layout)
            bias = bias + missed
        self._store(layer, layout, integers, scale, step, bias)
        self.int8.hold(output, answers)
        self.int8.operators.forget(node)
        self.int8.release(node)
        self.result.distances.append(
            Distance(layer.name, node.op_type, decibels(wanted, _within(answers, wanted)))
        )

    def _step(self, layer: Layer, source: str) -> float:
        """The scale of what a layer reads; zero where it reads floats."""
        maker = self.skeleton.maker[source] if self.skeleton.reads_integers(layer) else None
        return self.ranges[maker.input[1]].scale if maker is not None else 0.0

    def _weight(self, layer: Layer, layout: Layout, step: float, bias: Array | None) -> tuple[Tensor, Tensor]:
        """The scales, one a row, and the integers, ``[rows, columns]``, of a layer."""
        config = self.config
        grouped = torch.from_numpy(layout.rows(self.plain.constant(layer.name).astype(np.float32)))
        rows = grouped.flatten(0, 1)
        pairs = (
            Pairs.of(layout.columns, layout.channels)
            if config.adds_in_pairs and not layout.is_depthwise
            else None
        )
        scale = scales_of(rows, pairs, config.bits, per_channel=config.weights == "channel")
        if bias is not None and step:  # the bias is rounded to 32 bits in steps of this scale
            scale = torch.maximum(scale, torch.from_numpy(np.abs(bias) / (step * _LARGEST_BIAS)).to(scale))
        if not config.round_together:
            return scale, nearest(rows, scale, config.bits)
        if layout.columns > _MOST_COLUMNS:
            self.result.notes.append(
                f"The {layout.columns:,} weights a channel of {layer.name} were rounded one by one: too many together."
            )
            return scale, nearest(rows, scale, config.bits)
        products = products_of_columns(layout, self.int8.parts(layer.node.input[0]), self.parts)
        steps = scale.view(layout.groups, -1)
        return scale, rounded_together(grouped, steps, products, pairs, config.bits).flatten(0, 1).float()

    def _answer(self, node: Any, x: Array, weight: Array, bias: Array | None) -> Array:
        return self.int8.operators.run(node, [x, weight, bias][: len(node.input)])

    def _store(
        self,
        layer: Layer,
        layout: Layout,
        integers: Tensor,
        scale: Tensor,
        step: float,
        bias: Array | None,
    ) -> None:
        graph, one_scale = self.skeleton, self.config.weights == "tensor"
        graph.set_constant(layer.weight.input[0], layout.weight(integers.numpy()).astype(np.int8))
        scales = scale[:1].squeeze() if one_scale else scale
        graph.set_constant(layer.weight.input[1], scales.numpy().astype(np.float32))
        graph.set_constant(layer.weight.input[2], np.zeros(scales.shape, np.int8))
        if bias is not None and layer.bias is None:
            graph.set_constant(layer.bias_name, bias.astype(np.float32))
        if bias is None or layer.bias is None:
            return
        steps = scale.numpy().astype(np.float32) * np.float32(step)
        limit = 2**31 - 1
        whole = np.clip(np.rint(bias.astype(np.float64) / steps), -limit, limit).astype(np.int32)
        graph.set_constant(layer.bias.input[0], whole)
        graph.set_constant(
            layer.bias.input[1], (steps[:1].squeeze() if one_scale else steps).astype(np.float32)
        )
        graph.set_constant(
            layer.bias.input[2], np.zeros(steps[:1].squeeze().shape if one_scale else steps.shape, np.int32)
        )


def _within(answers: Sequence[Array], wanted: Sequence[Array]) -> Iterator[Array]:
    """Answers cut to the range of what is wanted, as an activation that was taken into the rounding does it."""
    low, high = min(float(p.min()) for p in wanted), max(float(p.max()) for p in wanted)
    return (np.clip(part, low, high) for part in answers)


def _missing_bias(answers: Sequence[Array], wanted: Sequence[Array], axis: int) -> Array:
    """What is missing to each channel for the mean of the float stream, behind the activation, by Newton's steps."""
    low, high = min(float(p.min()) for p in wanted), max(float(p.max()) for p in wanted)
    rows = [_by_channel(part, axis) for part in answers]
    targets = sum(part.sum(axis=1, dtype=np.float64) for part in (_by_channel(p, axis) for p in wanted))
    shift: Array = np.zeros(len(rows[0]), np.float64)
    for _ in range(3):
        given, live = np.zeros_like(shift), np.zeros_like(shift)
        for part in rows:
            moved = part + shift[:, None].astype(np.float32)
            live += ((moved > low) & (moved < high)).sum(axis=1)
            given += np.clip(moved, low, high).sum(axis=1, dtype=np.float64)
        shift = shift + np.where(live > _LEAST_LIVE, (targets - given) / np.maximum(live, 1), 0.0)
    return shift.astype(np.float32)


def _by_channel(part: Array, axis: int) -> Array:
    return np.moveaxis(part, axis, 0).reshape(part.shape[axis], -1)


def _add(answers: Sequence[Array], bias: Array, layout: Layout) -> None:
    """Add a bias to answers where they are."""
    shape = (1, -1, *(1,) * (answers[0].ndim - 2)) if layout.kind == "Conv" else (-1,)
    for part in answers:
        part += bias.reshape(shape)
