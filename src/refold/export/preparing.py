"""What goes into a file besides the network: normalization, softmax, half precision."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from refold.errors import InputError
from refold.export.metadata import read_description, read_preprocessing
from refold.export.request import FLOAT16, Inputs, Normalization, Precision, Request
from refold.onnx_files import is_onnx_network
from refold.recording.arguments import Arguments, as_arguments


class Prepared(nn.Module):
    """A network of one image with its normalization before it and a softmax over classes behind it.

    ``mean`` and ``std`` have one value a channel, in the units of the image.
    """

    def __init__(self, model: nn.Module, normalization: Normalization | None, *, softmax: bool) -> None:
        super().__init__()
        self.model = model
        self.softmax = softmax
        self.scale: Tensor | None
        self.shift: Tensor | None
        scale = shift = None
        if normalization is not None:
            mean, std = (torch.tensor(list(values), dtype=torch.float64) for values in normalization)
            reference = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
            scale = (1 / std).reshape(1, -1, 1, 1).to(reference.dtype)
            shift = (-mean / std).reshape(1, -1, 1, 1).to(reference.dtype)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, image: Tensor) -> Tensor:
        """Map images (batch, channels, height, width) to the network's output."""
        if self.scale is not None and self.shift is not None:
            image = image * self.scale + self.shift
        output: Tensor = self.model(image)
        return output.softmax(dim=1) if self.softmax else output


class Called(nn.Module):
    """A network that is called with tensors alone, whatever it is given besides and however: that is fixed."""

    def __init__(self, model: nn.Module, call: Arguments) -> None:
        super().__init__()
        self.model = model
        leaves, self._structure = tree_flatten(call)
        self._leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def forward(self, *tensors: Tensor) -> Any:
        """Call the network with `tensors` in the places of those of the example."""
        leaves = list(self._leaves)
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = tree_unflatten(leaves, self._structure)
        return self.model(*args, **kwargs)


def called_with_tensors(model: nn.Module, example_input: Any) -> tuple[nn.Module, Inputs]:
    """A model that takes the tensors of an example, as `refold.fold` takes it, and these.

    Raises `InputError` where the example holds no tensor.
    """
    args, kwargs = as_arguments(model, example_input)
    if args and not kwargs and all(isinstance(value, Tensor) for value in args):
        return model, args
    tensors = tuple(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
    if not tensors:
        raise InputError("The example holds no tensor; an exported network needs one input at least.")
    wrapped = Called(model, (args, kwargs)).eval()
    for name in ("card", "pretrained_cfg", "architecture", "fold_report"):
        if hasattr(model, name):
            setattr(wrapped, name, getattr(model, name))
    return wrapped, tensors


class HalfInside(nn.Module):
    """A network that computes in float16 and takes and gives float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.half()

    def forward(self, *arguments: Tensor) -> Any:
        """Call the network with its floating point arguments in float16."""
        return _cast(self.model(*_cast(arguments, torch.float16)), torch.float32)


def in_precision(model: nn.Module, precision: Precision) -> nn.Module:
    """A model that computes in a precision, its inputs and outputs as before; the given one is untouched."""
    return HalfInside(copy.deepcopy(model)).eval() if precision == FLOAT16 else model


def rounded_to_half(model: nn.Module, *, subnormal: bool = True) -> nn.Module:
    """A copy whose parameters are float16 numbers, in float32; without ``subnormal``, none of those below 6.1e-5.

    For converters that cut digits off, which makes every weight smaller and shrinks the output layer by layer, or that
    take subnormal numbers for zero: the nearest number that they keep is at most half as far away.
    """
    model = copy.deepcopy(model)
    smallest = torch.finfo(torch.float16).smallest_normal
    with torch.no_grad():
        for parameter in model.parameters():
            rounded = parameter.half().to(parameter.dtype)
            if not subnormal:
                nearest = (parameter / smallest).round() * smallest
                rounded = torch.where(parameter.abs() < smallest, nearest, rounded)
            parameter.copy_(rounded)
    return model


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _cast(part, dtype) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_cast(part, dtype) for part in value)
    return value


def prepare(
    model: nn.Module,
    arguments: tuple[Tensor, ...],
    normalization: Normalization | None,
    *,
    softmax: bool,
) -> nn.Module:
    """The model with what was asked for baked in; raises `InputError` where it does not fit."""
    if normalization is None and not softmax:
        return model
    if len(arguments) != 1:
        raise InputError(
            f"Normalization and softmax can be baked in where the model takes one image; it takes "
            f"{len(arguments)} inputs."
        )
    if normalization is not None:
        _check_normalization(normalization, arguments[0])
    return Prepared(model, normalization, softmax=softmax).eval()


def _check_normalization(normalization: Normalization, image: Tensor) -> None:
    mean, std = normalization
    channels = image.shape[1] if image.dim() == 4 else None
    if channels is None or not len(mean) == len(std) == channels:
        raise InputError(
            f"The normalization has {len(mean)} means and {len(std)} standard deviations; an input of shape "
            f"{tuple(image.shape)} needs {channels or 'images: four axes, with'} one of each a channel."
        )
    if not all(value > 0 for value in std):
        raise InputError(f"The standard deviations are {list(std)}; all must be above zero.")
    if not all(math.isfinite(value) for value in (*mean, *std)):
        raise InputError(f"The normalization is {list(mean)} and {list(std)}; all must be finite numbers.")


def known_preprocessing(model: nn.Module) -> dict[str, Any]:
    """What the model's ``pretrained_cfg`` says in timm's terms, and over it what its checkpoint or ONNX file does."""
    if is_onnx_network(model):
        program: Any = model.program
        said = {entry.key: entry.value for entry in program.model.metadata_props}
        found = read_description(said, program.path or Path(program.name)).preprocessing
        return {} if found is None else found.known()
    card = getattr(model, "card", None)
    described = getattr(card, "preprocessing", None) or {}
    configured = dict(getattr(model, "pretrained_cfg", None) or {})
    if "crop_pct" in described:
        configured.pop("crop_mode", None)  # the two belong together
    known = read_preprocessing({**configured, **described}, getattr(card, "title", type(model).__name__))
    return known.known()


def choose_normalization(
    normalize: bool | Normalization, preprocessing: Mapping[str, Any]
) -> Normalization | None:
    """The mean and the standard deviation to bake in; raises `InputError` where the model names none."""
    if normalize is False:
        return None
    if normalize is True:
        if "mean" not in preprocessing or "std" not in preprocessing:
            raise InputError(
                "The model does not say how its images are normalized; give normalize=(mean, std) "
                "(--mean and --std on the command line)."
            )
        return preprocessing["mean"], preprocessing["std"]
    return normalize


# More images than any memory holds. Said, for without a maximum PyTorch before 2.9 loses the free axis on its way
# to ONNX and writes a fixed one.
_MOST = 2**31 - 1


def with_free_axes(
    model: nn.Module, request: Request, most: int = _MOST
) -> tuple[Inputs, tuple[Any, ...] | None]:
    """Inputs and ``dynamic_shapes`` for `torch.export`.

    With a dynamic batch they leave the first axis of every input free, up to ``most``, with a dynamic size height and
    width of every image; without both no shapes are given.
    """
    if request.dynamic_size:
        free = [request.free_axes(tensor) for tensor in request.inputs]
        inputs = tuple(_larger(*pair) for pair in zip(request.inputs, free, strict=True))
        shapes: tuple[Any, ...] = tuple(dict.fromkeys(axes, torch.export.Dim.AUTO) or None for axes in free)
        return inputs, (shapes,) if isinstance(model, (HalfInside, Called)) else shapes
    if not request.dynamic_batch:
        return request.inputs, None
    batch = torch.export.Dim("batch", min=1, max=most)
    # An axis that has one element in the example would be taken for a constant.
    inputs = tuple(torch.cat([tensor, tensor]) if tensor.dim() else tensor for tensor in request.inputs)
    shapes = tuple({0: batch} if tensor.dim() else None for tensor in inputs)
    return inputs, (shapes,) if isinstance(model, (HalfInside, Called)) else shapes


# No map of a pyramid down to a stride of 128 has an axis of one element, which would be taken for a constant, and none
# is as high as it is wide.
_TRACED = {"batch": 2, "height": 320, "width": 448}


def _larger(tensor: Tensor, free: Mapping[int, str]) -> Tensor:
    """An example in which the free axes show that they are."""
    shape = [
        max(side, _TRACED[free[axis]]) if axis in free else side for axis, side in enumerate(tensor.shape)
    ]
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(tensor.dtype)
