"""What one forward pass of a model costs: parameters, multiply-accumulates, activations and operators."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from refold.errors import InputError, first_line

# What runs, in plain English, by the name of the ATen operator, in the order of every printed table.
_KINDS: dict[str, tuple[str, ...]] = {
    "convolution": ("convolution", "_convolution", "cudnn_convolution", "mkldnn_convolution"),
    "linear": ("addmm", "mm", "mv", "addmv"),
    "matrix product": ("bmm", "baddbmm", "dot"),
    "attention": (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
    ),
    "batch norm": (
        "native_batch_norm",
        "_native_batch_norm_legit",
        "_native_batch_norm_legit_no_training",
        "_batch_norm_no_update",
        "cudnn_batch_norm",
        "miopen_batch_norm",
    ),
    "other norm": ("native_layer_norm", "native_group_norm", "linalg_vector_norm", "_fused_rms_norm"),
    "activation": (
        *("relu", "hardtanh", "leaky_relu", "elu", "celu", "selu", "_prelu_kernel", "rrelu_with_noise"),
        *("silu", "hardswish", "mish", "gelu", "glu", "softplus", "threshold", "softshrink", "hardshrink"),
        *("sigmoid", "hardsigmoid", "tanh", "log_sigmoid_forward", "clamp", "clamp_min", "clamp_max"),
        *("_softmax", "_safe_softmax", "_log_softmax"),
    ),
    "add": ("add", "sub", "rsub", "addcmul"),
    "multiply": ("mul", "div", "neg"),
    "concatenation": ("cat", "stack"),
    "pooling": (
        *("max_pool2d_with_indices", "adaptive_max_pool2d", "avg_pool2d", "_adaptive_avg_pool2d"),
        *("max_pool3d_with_indices", "adaptive_max_pool3d", "avg_pool3d", "_adaptive_avg_pool3d"),
        *("mean", "sum", "amax", "max"),
    ),
    "padding": ("constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad2d"),
    "resizing": (
        *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact2d"),
        *("upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
        "grid_sampler_2d",
    ),
    "copy": (
        "clone",
        "copy",
        "_to_copy",
        "permute_copy",
        "repeat",
        "pixel_shuffle",
        "pixel_unshuffle",
        "roll",
    ),
    "gather": ("index", "index_select", "gather", "embedding"),
}
_KIND_OF = {operator: kind for kind, operators in _KINDS.items() for operator in operators}

# These make or relabel a tensor; no arithmetic runs.
_FREE = {
    *("_unsafe_view", "_local_scalar_dense", "lift_fresh", "detach", "alias", "empty", "empty_like", "zeros"),
    *(
        "zeros_like",
        "ones",
        "ones_like",
        "full",
        "full_like",
        "arange",
        "scalar_tensor",
        "new_zeros",
        "new_full",
    ),
    *(
        "new_empty",
        "new_ones",
        "empty_strided",
        "new_empty_strided",
        "as_strided",
        "linspace",
        "fill",
        "zero",
    ),
}


@dataclass(frozen=True)
class Cost:
    """The cost of one eval-mode forward pass, for the whole batch of the example input.

    `macs` are the multiply-accumulates of convolutions and matrix products; biases, norms, pooling and
    element-wise operations are not counted. `winograd_multiplications` are the multiplications left of them where
    every 3x3 convolution of stride 1, of any groups, runs as Winograd's F(2x2, 3x3): 16 in place of 36 for 2x2
    outputs, odd maps not rounded up, the transformations not counted (RepVGG report, figure 4).
    `activations` are the elements that convolutions write. `operators` counts what runs by kind ("convolution",
    "batch norm", "add", …); views are not counted.
    """

    parameters: int
    macs: int
    winograd_multiplications: int
    activations: int
    operators: dict[str, int]

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


def count(model: nn.Module, example_input: Tensor | tuple[Any, ...]) -> Cost:
    """Count what one eval-mode forward pass costs, on any device (meta included).

    `example_input` is a tensor, or the tuple of positional arguments. The model need not be traceable: the
    operators are counted as they run. Parameters are counted once each, used or not; the model, its training
    flags and the example are left as they were.

    Raises `InputError` where the forward pass fails on the example.
    """
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    # A forward pass may begin with an in-place activation.
    arguments = tuple(value.detach().clone() if isinstance(value, Tensor) else value for value in arguments)
    with _evaluating(model), torch.no_grad(), _Counter() as counter:
        try:
            model(*arguments)
        except Exception as error:
            shapes = ", ".join(str(tuple(v.shape)) for v in arguments if isinstance(v, Tensor))
            reason = first_line(error)
            raise InputError(
                f"{type(model).__name__} cannot run on an input of shape {shapes}: {reason}; "
                "give an example input that its forward pass accepts."
            ) from error
    order = [kind for kind in _KINDS if counter.operators[kind]]
    order += sorted(set(counter.operators) - set(_KINDS))
    return Cost(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        macs=counter.macs,
        winograd_multiplications=counter.winograd_multiplications,
        activations=counter.activations,
        operators={kind: counter.operators[kind] for kind in order},
    )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
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


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.macs = 0
        self.winograd_multiplications = 0
        self.activations = 0
        self.operators: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        name = packet.__name__.removesuffix("_")
        if name not in _KIND_OF and packet not in flop_registry:
            with self:  # inference mode hands over composite operators whole
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if func.is_view or name in _FREE or func.namespace == "prim":
            return result
        kind = _KIND_OF.get(name, name.strip("_").replace("_", " "))
        if kind == "batch norm" and args[3] is None:
            kind = "other norm"  # no running statistics: an instance norm, or one that never folds
        self.operators[kind] += 1
        if packet in flop_registry:
            macs = flop_registry[packet](*args, **kwargs, out_val=result) // 2
            self.macs += macs
            self.winograd_multiplications += (
                macs * 16 // 36 if _runs_as_winograd(func, args, kwargs) else macs
            )
        if kind == "convolution":
            self.activations += result.numel()
        return result


def _runs_as_winograd(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether the operator is a 3x3 convolution of stride 1, neither dilated nor transposed."""
    given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
    given |= kwargs
    weight = given.get("weight")
    if _KIND_OF.get(func._overloadpacket.__name__) != "convolution" or weight is None:
        return False
    steps = {*given["stride"], *given["dilation"]}
    return tuple(weight.shape[2:]) == (3, 3) and steps == {1} and not given.get("transposed", False)
