"""A network that rounds as its int8 file does, with weights that learn: quantisation-aware training.

The operators are those of the file, the rounding is torch's own (`torch.fake_quantize_per_tensor_affine` and
`torch.fake_quantize_per_channel_affine`), whose gradient passes through where nothing is cut off (Jacob et al. 2018,
section 3). Scales and zero points stay as they were found, and so do the bounds within which no sum can saturate.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from refold.errors import InputError
from refold.onnx_files.evaluating import Evaluated
from refold.onnx_files.network import filled
from refold.onnx_files.reading import read_network
from refold.onnx_files.steps import Step, last_uses, names_in, own_names
from refold.quantization.columns import Layout, layout_of
from refold.quantization.filling import Filled
from refold.quantization.integers import PAIR_LIMIT, Pairs
from refold.quantization.skeleton import DEQUANTIZE, QUANTIZE, Graph, Layer

# The largest size of an integer of 32 bits.
_LARGEST_BIAS = 2**31 - 1
# Steps of a bias that do as much as one step of a weight does on the middle of the range of what it reads.
_BIAS_UNIT = 128
# How far from its integer, in steps, a weight starts at most: nearer to the edge, the first steps would undo what was
# found. And what is taken for half a step.
_INSIDE, _TIES = 0.25, 1e-3


class RoundedValue(nn.Module):
    """A value rounded to one of the 256 numbers that its bytes stand for."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, scale: Tensor, zero_point: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point.to(torch.int32))

    def forward(self, value: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(value, self.scale, self.zero_point, 0, 255)


class RoundedParameter(nn.Module):
    """A weight or a bias, rounded to whole numbers of steps, at most ``largest`` of them.

    ``scale`` is the size of a step, one for all or one for each place along ``axis``. The parameter itself is the value
    in ``unit`` steps: so one learning rate fits layers of any size, weights of any number of bits, and biases.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, value: Tensor, scale: Tensor, axis: int, largest: int, unit: int = 1) -> None:
        super().__init__()
        self.axis, self.largest, self.unit = axis, largest, unit
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", torch.zeros_like(scale, dtype=torch.int32))
        self._shape = [-1 if scale.dim() and place == axis else 1 for place in range(value.dim())]
        self.value = nn.Parameter(value / (self.steps * unit))

    @property
    def steps(self) -> Tensor:
        """The scale, as a factor of the value."""
        return self.scale.view(self._shape)

    def forward(self) -> Tensor:
        return self.rounded(self.value * (self.steps * self.unit))

    def rounded(self, value: Tensor) -> Tensor:
        """The nearest whole numbers of steps."""
        bounds = -self.largest, self.largest
        if self.scale.dim():
            return torch.fake_quantize_per_channel_affine(
                value, self.scale, self.zero_point, self.axis, *bounds
            )
        return torch.fake_quantize_per_tensor_affine(value, self.scale, self.zero_point, *bounds)

    @property
    @torch.no_grad()
    def integers(self) -> Tensor:
        """The whole numbers, in float64."""
        found: Tensor = (self().double() / self.steps.double()).round()
        return found

    @integers.setter
    def integers(self, whole: Tensor) -> None:
        self.value.data = (whole.to(self.value.device) / self.unit).to(self.value.dtype)


class RoundedWeight(RoundedParameter):
    """A weight of which no two neighbours can leave 16 bits, however it is trained.

    ``partners`` ``[n, weights]`` are the places, in the flattened weight, of each weight's neighbours. A pair that
    would be rounded to more than `PAIR_LIMIT` is scaled down before it is rounded.
    """

    partners: Tensor

    def __init__(self, value: Tensor, scale: Tensor, axis: int, largest: int, partners: Tensor) -> None:
        super().__init__(value, scale, axis, largest)
        self.register_buffer("partners", partners, persistent=False)

    def forward(self) -> Tensor:
        return self.rounded(self.value * self._shares() * self.steps)

    @torch.no_grad()
    def _shares(self) -> Tensor:
        """What is left of each weight: less than one where its pair would be too large."""
        flat = self.value.flatten().clamp(-self.largest, self.largest)
        size, places = flat.abs(), torch.arange(len(flat), device=flat.device)
        rounded, shares = (size + _TIES).round(), torch.ones_like(flat)
        for partner in self.partners:
            other = size[partner]
            beyond = (
                (rounded + rounded[partner] > PAIR_LIMIT) & (flat * flat[partner] > 0) & (partner != places)
            )
            # One less than the limit, for rounding can add one half to each of the two.
            shares = torch.where(beyond, torch.minimum(shares, (PAIR_LIMIT - 1) / (size + other)), shares)
        return shares.view_as(self.value)


@dataclass(frozen=True)
class _Program:
    """What all copies of a network share: the float network, the file, and what is run."""

    plain: nn.Module
    model: Any
    steps: tuple[Step, ...]
    done: tuple[tuple[str, ...], ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    rounding: dict[str, str]
    """The modules that take the place of steps, by the name of what these give."""
    constants: dict[str, str]
    stored: dict[str, tuple[str, str]]
    """The constants of the file that come from modules: the module, and what of it."""

    def __deepcopy__(self, memo: Any) -> _Program:
        return self


class RoundedNetwork(nn.Module):
    """A filled skeleton as a network: what its int8 file computes, in float32, with weights and biases that learn.

    What else ``plain``, the float network, knows of itself (its number of classes, say) is known of this one, too; it
    is no part of it.
    Raises `InputError` where an operator of the file has no gradient.
    """

    def __init__(self, found: Filled, plain: nn.Module) -> None:
        super().__init__()
        graph = found.graph
        network = read_network(graph.model)
        program = network.program
        self.rounding = nn.ModuleDict()
        self._stored: dict[str, tuple[str, str]] = {}
        modules = self._keep_parameters(found)
        steps = list(program.steps)
        for step in steps:
            if isinstance(step.function.run, Evaluated):
                raise InputError(
                    f"The operator {step.function.kind} of the network has no gradient here, so that rounding cannot "
                    "be learnt; quantise it without training (refold quantize)."
                )
            if step.function.kind == QUANTIZE:
                modules[step.outputs[0]] = self._value(graph, step)
        read = dict.fromkeys(
            name
            for step in steps
            if step.outputs[0] not in modules
            for name in names_in((step.args, step.kwargs))
        )
        constants = {known: own for own, known in program.constants.items() if known in read}
        for own in constants.values():
            self.register_buffer(own, getattr(network, own).detach().clone())
        self._program = _Program(
            plain,
            graph.model,
            tuple(steps),
            last_uses(steps, program.outputs),
            program.inputs,
            program.outputs,
            modules,
            constants,
            self._stored,
        )

    @property
    def plain(self) -> nn.Module:
        """The float network."""
        return self._program.plain

    def forward(self, images: Tensor) -> Any:
        # Rounding to bytes is what is learnt: no other rounding comes in between.
        with torch.autocast(images.device.type, enabled=False):
            return self._run(images.float())

    def _run(self, images: Tensor) -> Any:
        program = self._program
        values: dict[str, Any] = {program.inputs[0]: images}
        values |= {known: getattr(self, own) for known, own in program.constants.items()}
        for step, done in zip(program.steps, program.done, strict=True):
            (first, *_) = names = step.outputs
            if first in program.rounding:
                module = self.rounding[program.rounding[first]]
                given = () if isinstance(module, RoundedParameter) else (values[names_in(step.args)[0]],)
                values[first] = module(*given)
            elif step.function.kind == DEQUANTIZE:
                values[first] = values[names_in(step.args)[0]]  # rounded values are floats here
            else:
                args, kwargs = (filled(each, values) for each in (step.args, step.kwargs))
                result = step.function(*args, **kwargs)
                several = isinstance(result, (tuple, list))
                values.update(zip(names, result if several else (result,), strict=True))
            for name in done:
                values.pop(name, None)
        results = tuple(values[name] for name in program.outputs)
        return results if len(results) > 1 else results[0]

    def write(self, path: Path) -> None:
        """Write the int8 file with the integers that the weights and biases are rounded to now, and the scales."""
        model = onnx.ModelProto()
        model.CopyFrom(self._program.model)
        graph = Graph(model)
        for name, (place, attribute) in self._program.stored.items():
            value = getattr(self.rounding[place], attribute)
            graph.set_constant(name, value.cpu().numpy().astype(graph.constant(name).dtype))
        onnx.save(model, str(path))

    @property
    def start(self) -> bytes:
        """The int8 file as it was before the weights learnt."""
        data: bytes = self._program.model.SerializeToString()
        return data

    def with_integers(self, path: Path) -> RoundedNetwork:
        """A copy whose weights and biases are those of an int8 file that one of its copies wrote."""
        copied, graph = copy.deepcopy(self), Graph(onnx.load(str(path)))
        for name, (place, attribute) in self._program.stored.items():
            if attribute == "integers":
                kept: Any = copied.rounding[place]
                kept.integers = torch.from_numpy(graph.constant(name).astype(np.float64))
        return copied

    def _keep_parameters(self, found: Filled) -> dict[str, str]:
        """Keep the weights and biases of all layers; which module gives which value."""
        graph = found.graph
        modules: dict[str, str] = {}
        names = [name for layer in graph.layers for name in (layer.name, layer.bias_name) if name]
        own = own_names(dict.fromkeys(names))
        for layer in graph.layers:
            for dequantize, name, build in (
                (layer.weight, layer.name, _weight),
                (layer.bias, layer.bias_name, _bias),
            ):
                if dequantize is None:
                    continue
                if own[name] not in self.rounding:  # layers may share one
                    self.rounding[own[name]] = build(found, layer)
                modules[dequantize.output[0]] = own[name]
                for constant, attribute in zip(dequantize.input, ("integers", "scale"), strict=False):
                    self._stored[constant] = (own[name], attribute)
        return modules

    def _value(self, graph: Graph, step: Step) -> str:
        """Keep how a value is rounded; the name of the module."""
        node = graph.maker[step.outputs[0]]
        scale, zero = (torch.from_numpy(np.array(graph.constant(name))) for name in node.input[1:3])
        place = f"value_{len(self.rounding)}"
        self.rounding[place] = RoundedValue(scale, zero)
        self._stored |= {node.input[1]: (place, "scale"), node.input[2]: (place, "zero_point")}
        return place

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            program = self.__dict__.get("_program")
            if program is None or name.startswith("_"):
                raise
            return getattr(program.plain, name)


def _weight(found: Filled, layer: Layer) -> RoundedParameter:
    """The weight of a layer as near to the float network's as the integers that were found allow."""
    graph, config = found.graph, found.config
    integers, scale = (graph.constant(name) for name in layer.weight.input[:2])
    layout = layout_of(layer.node, integers.shape)
    shape = [1] * integers.ndim
    if scale.ndim:
        shape[layout.channel_axis] = -1
    steps, whole = scale.reshape(shape), integers.astype(np.float32)
    value = np.clip(found.plain.constant(layer.name), (whole - _INSIDE) * steps, (whole + _INSIDE) * steps)
    given = torch.from_numpy(value), torch.from_numpy(np.array(scale)), layout.channel_axis
    largest = 2 ** (config.bits - 1) - 1
    if layout.is_depthwise or not config.adds_in_pairs:
        return RoundedParameter(*given, largest)
    return RoundedWeight(*given, largest, _partners(layout))


def _bias(found: Filled, layer: Layer) -> RoundedParameter:
    assert layer.bias is not None
    integers, scale = (found.graph.constant(name) for name in layer.bias.input[:2])
    value = (integers.astype(np.float64) * scale).astype(np.float32)
    given = torch.from_numpy(value), torch.from_numpy(np.array(scale)), 0, _LARGEST_BIAS
    return RoundedParameter(*given, _BIAS_UNIT)


def _partners(layout: Layout) -> Tensor:
    """The places of all weights' neighbours in the flattened weight, ``[n, weights]``."""
    count = prod(layout.shape)
    places = layout.rows(np.arange(count).reshape(layout.shape)).reshape(-1, layout.columns)
    found = torch.empty(0, count, dtype=torch.int64)
    for partner in Pairs.of(layout.columns, layout.channels).partners:
        beside = torch.empty(1, count, dtype=torch.int64)
        beside[0, places.ravel()] = torch.from_numpy(places[:, partner.numpy()].ravel())
        found = torch.cat([found, beside])
    return found
