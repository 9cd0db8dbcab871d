"""How the convolutions of any model run: in which order, on what maps, and what reads their outputs."""

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from refold.errors import InputError, first_line
from refold.recording.recording import has_hooks

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct2d)
_ACTIVATION_FILES = ("torch.nn.modules.activation", "timm.layers.activations")
# What these give for one channel depends on others, or has another shape.
_NOT_ELEMENTWISE = (nn.GLU, nn.MultiheadAttention, nn.Softmax, nn.Softmax2d, nn.Softmin, nn.LogSoftmax)
_FUNCTIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "hardswish": nn.Hardswish,
    "mish": nn.Mish,
}


@dataclass
class ConvolutionRun:
    """How a convolution ran: its place in the order, how often, and the shape of its first output.

    ``norm`` is the batch norm that alone reads the output, if one does. ``activation`` computes what reads the output
    or that of the norm first, if that is an activation; it never works in place.
    ``is_looked_into`` says whether code around it read its parameters, as can be seen of the classes in `WATCHED`.
    """

    place: int
    times: int
    shape: torch.Size
    norm: nn.Module | None = None
    activation: nn.Module | None = None
    is_looked_into: bool = False

    @property
    def pixels(self) -> int:
        """Pixels of the output."""
        return self.shape[-2:].numel()


def observe_convolutions(
    model: nn.Module, arguments: tuple[Any, ...]
) -> tuple[dict[int, ConvolutionRun], list[Tensor]]:
    """How each ``nn.Conv2d`` of the model runs on the positional arguments, by its id, and what the model returns.

    Those that do not run have no entry. The model runs once, in evaluation mode, and is left as it was.
    Raises ``InputError`` where it does not run.
    """
    watch = _Watch()
    with _parameters_watched(model) as looked_into, watch.hooked(model), watch:
        try:
            outputs = run_once(model, arguments)
        except Exception as error:
            sizes = (str(tuple(v.shape)) for v in tree_leaves(arguments) if isinstance(v, Tensor))
            shapes = ", ".join(sizes) or "none"
            raise InputError(
                f"{type(model).__name__} cannot run on the example input (shape {shapes}): {first_line(error)}; "
                "give an example_input that its forward pass accepts."
            ) from error
        for output in outputs:
            watch.note(output, "return")
    return {key: watch.run_of(key, key in looked_into) for key in watch.outputs}, outputs


@torch.no_grad()
def run_once(model: nn.Module, arguments: tuple[Any, ...]) -> list[Tensor]:
    """The floating-point tensors that the model returns in evaluation mode; it is left in the mode that it was in.

    Raises whatever its code raises.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled parts show nothing of what they run
            leaves = tree_leaves(model(*copy.deepcopy(arguments)))
    finally:
        for module, training in modes:
            module.training = training
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


class _Watch(TorchFunctionMode):
    """Notes what reads the outputs of convolutions and of batch norms, first readers first."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[int, Tensor] = {}
        self.norm_outputs: dict[int, Tensor] = {}
        self.norms: dict[int, nn.Module] = {}
        self.times: Counter[int] = Counter()
        self.readers: dict[int, list[nn.Module | str]] = {}
        # Whatever has readers, so that no other tensor gets its id.
        self.held: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(out)):
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor):
                    self.note(leaf, str(getattr(func, "__name__", func)))
        return out

    def _watch(self, tensor: Tensor) -> None:
        self.held.append(tensor)
        self.readers.setdefault(id(tensor), [])

    def note(self, tensor: Tensor, reader: nn.Module | str) -> None:
        """Note what reads a tensor, if it is one of those watched."""
        if id(tensor) in self.readers:
            self.readers[id(tensor)].append(reader)

    @contextmanager
    def hooked(self, model: nn.Module) -> Iterator[None]:
        """Watch the layers of the model meanwhile."""
        handles = []
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                handles.append(module.register_forward_hook(self._after_convolution))
            elif isinstance(module, _BatchNorm):
                handles.append(module.register_forward_pre_hook(self._before_norm))
                handles.append(module.register_forward_hook(self._after_norm))
            elif _is_activation(module):
                handles.append(module.register_forward_pre_hook(self._before_activation))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _after_convolution(self, module: nn.Module, args: Any, out: Tensor) -> None:
        self.times[id(module)] += 1
        self._watch(out)
        self.outputs.setdefault(id(module), out)

    def _before_norm(self, module: nn.Module, args: Any) -> None:
        self.times[id(module)] += 1
        if args and id(args[0]) in self.readers:
            self.norms[id(args[0])] = module

    def _after_norm(self, module: nn.Module, args: Any, out: Tensor) -> None:
        self._watch(out)
        self.norm_outputs.setdefault(id(module), out)

    def _before_activation(self, module: nn.Module, args: Any) -> None:
        if args:
            self.note(args[0], module)

    def run_of(self, convolution: int, is_looked_into: bool) -> ConvolutionRun:
        """What the run showed of the convolution with this id."""
        out = self.outputs[convolution]
        place = list(self.outputs).index(convolution)
        found = ConvolutionRun(place, self.times[convolution], out.shape, is_looked_into=is_looked_into)
        norm = self.norms.get(id(out))
        is_own = (
            norm is not None
            and type(norm) in _NORMS
            and not has_hooks(norm)
            and self.times[convolution] == self.times[id(norm)] == len(self.readers[id(out)]) == 1
        )
        if norm is None or not is_own:
            found.activation = _activation(self.readers[id(out)])
            return found
        found.norm = norm
        inner = getattr(norm, "act", None)
        if isinstance(inner, nn.Module) and not isinstance(inner, nn.Identity):
            found.activation = _activation([inner])
        else:
            found.activation = _activation(self.readers[id(self.norm_outputs[id(norm)])])
        return found


def _is_activation(module: nn.Module) -> bool:
    return type(module).__module__ in _ACTIVATION_FILES and not isinstance(module, _NOT_ELEMENTWISE)


def _activation(readers: list[nn.Module | str]) -> nn.Module | None:
    """A copy of the activation that reads first, which leaves its input alone; None where something else does."""
    if not readers:
        return None
    first = readers[0]
    if isinstance(first, str):
        function = _FUNCTIONS.get(first.removesuffix("_"))
        return None if function is None else function()
    own = copy.deepcopy(first)
    if hasattr(own, "inplace"):
        own.inplace = False  # type: ignore[assignment]  # an attribute of activations, which nn.Module does not know
    return own


@contextmanager
def _parameters_watched(model: nn.Module) -> Iterator[set[int]]:
    """The ids of the convolutions whose parameters are read by code around them meanwhile."""
    looked_into: set[int] = set()
    changed = [module for module in model.modules() if type(module) in WATCHED]
    for module in changed:
        vars(module)["_look"] = partial(looked_into.add, id(module))
        module.__class__ = WATCHED[type(module)]
    try:
        yield looked_into
    finally:
        for module in changed:
            module.__class__ = type(module).__bases__[-1]
            del vars(module)["_look"]


class _Watched:
    """A convolution that notes when code around it asks for its parameters."""

    _runs = False

    def forward(self, *inputs: Any, **others: Any) -> Any:
        self._runs = True
        try:
            return super().forward(*inputs, **others)  # type: ignore[misc]  # that of the convolution
        finally:
            del self._runs

    def __getattr__(self, name: str) -> Any:
        if name in ("weight", "bias") and not self._runs:
            vars(self)["_look"]()
        return super().__getattr__(name)  # type: ignore[misc]  # that of nn.Module


class _WatchedConv2d(_Watched, nn.Conv2d):
    pass


class _WatchedConv2dSame(_Watched, Conv2dSame):  # type: ignore[misc]  # timm is not typed
    pass


WATCHED: dict[type, type] = {nn.Conv2d: _WatchedConv2d, Conv2dSame: _WatchedConv2dSame}
"""The classes of convolutions that are seen being looked into, and what they are meanwhile."""
