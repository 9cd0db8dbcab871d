"""What one forward pass of a model costs: parameters, multiply-accumulates, activations and operators."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from refold.errors import InputError, first_line
from refold.recording.arguments import as_arguments, copy_tensors, shapes_listed
from refold.recording.operators import COUNTED, WORDS


def _attention_flops(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> int:
    flops: int = sdpa_flop_count(query.shape, key.shape, value.shape)
    return flops


# Attention on the CPU has an operator of its own, which older versions do not count.
_FLOPS: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    **flop_registry,
}


@dataclass(frozen=True)
class Cost:
    """The cost of one eval-mode forward pass, for the whole batch of the example input.

    `macs` are the multiply-accumulates of convolutions and matrix products; biases, norms, pooling and
    element-wise operations are not counted. `winograd_multiplications` are the multiplications left of them where
    every 3x3 convolution of stride 1, of any groups, runs as Winograd's F(2x2, 3x3): 16 in place of 36 for 2x2
    outputs, odd maps not rounded up, the transformations not counted (RepVGG report, figure 4).
    `activations` are the elements that convolutions write, `norm_elements` those that batch norms write. `operators`
    counts what runs by kind ("convolution", "batch norm", "add", …); views are not counted.
    """

    parameters: int
    macs: int
    winograd_multiplications: int
    activations: int
    operators: dict[str, int]
    norm_elements: int = 0  # reports of older versions do not have them

    @property
    def macs_and_norms(self) -> int:
        """`macs`, and four for each of `norm_elements`, as RepNeXt counts (table 4)."""
        return self.macs + 4 * self.norm_elements

    @property
    def convolutions(self) -> int:
        """Convolutions that run."""
        return self.operators.get("convolution", 0)

    @property
    def batch_norms(self) -> int:
        """Batch norms that run as an operator of their own."""
        return self.operators.get("batch norm", 0)

    @property
    def operator_count(self) -> int:
        """All operators that run."""
        return sum(self.operators.values())

    def to_dict(self) -> dict[str, Any]:
        """The same numbers as plain JSON-able values."""
        return dataclasses.asdict(self)


def count(model: nn.Module, example_input: Any) -> Cost:
    """Count what one eval-mode forward pass costs, on any device (meta included).

    `example_input` is what `fold` takes. The operators are counted as they run. Parameters are counted once each,
    used or not; the model, its training flags and the example are left as they were.

    Raises `InputError` where the forward pass fails on the example.
    """
    arguments = as_arguments(model, example_input)
    # A forward pass may begin with an in-place activation.
    args, kwargs = copy_tensors(arguments)
    with evaluating(model), torch.no_grad(), Counting() as counting:
        try:
            model(*args, **kwargs)
        except Exception as error:
            raise InputError(
                f"{type(model).__name__} cannot run on an input of shape {shapes_listed(arguments)}: "
                f"{first_line(error)}; give an example input that its forward pass accepts."
            ) from error
    cost: Cost = counting.cost(model)
    return cost


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Hold every module in eval mode, each flag put back as it was; attention runs its visible operators."""
    flags = [(module, module.training) for module in model.modules()]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for module, _ in flags:
            module.training = False
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, training in flags:
            module.training = training


class Counting(TorchDispatchMode):
    """Counts what runs while it is entered."""

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.macs = 0
        self.winograd_multiplications = 0
        self.activations = 0
        self.norm_elements = 0
        self.operators: Counter[str] = Counter()

    def cost(self, model: nn.Module) -> Cost:
        """What was counted, with the parameters of `model`."""
        order = [word for word in WORDS if self.operators[word]]
        order += sorted(set(self.operators) - set(WORDS))
        return Cost(
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            macs=self.macs,
            winograd_multiplications=self.winograd_multiplications,
            activations=self.activations,
            operators={word: self.operators[word] for word in order},
            norm_elements=self.norm_elements,
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        name = packet.__name__.removesuffix("_")
        entry = COUNTED.get(name)
        if name == "dropout" and len(args) == 3 and not args[2]:
            return args[0]  # nothing runs; taken apart, it would be a copy in older versions
        if entry is None and packet not in _FLOPS:
            with self:  # inference mode hands over composite operators whole
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if func.is_view or (entry is not None and entry.free) or func.namespace == "prim":
            return result
        kind = name.strip("_").replace("_", " ") if entry is None else entry.word
        if kind == "batch norm" and args[3] is None:
            kind = "other norm"  # no running statistics: an instance norm, or one that never folds
        self.operators[kind] += 1
        if packet in _FLOPS:
            macs = _FLOPS[packet](*args, **kwargs, out_val=result) // 2
            self.macs += macs
            self.winograd_multiplications += (
                macs * 16 // 36 if _runs_as_winograd(func, args, kwargs) else macs
            )
        if kind == "convolution":
            self.activations += result.numel()
        elif kind == "batch norm":
            self.norm_elements += result[0].numel()
        return result


def _word(name: str) -> str:
    entry = COUNTED.get(name)
    return "" if entry is None else entry.word


def _runs_as_winograd(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether the operator is a 3x3 convolution of stride 1, neither dilated nor transposed."""
    given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
    given |= kwargs
    weight = given.get("weight")
    if _word(func._overloadpacket.__name__) != "convolution" or weight is None:
        return False
    steps = {*given["stride"], *given["dilation"]}
    return tuple(weight.shape[2:]) == (3, 3) and steps == {1} and not given.get("transposed", False)
