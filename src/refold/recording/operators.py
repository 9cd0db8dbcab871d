"""The registry of operators: every name of each, its word in reports, what it is linearly, what it does to channels.

A new operator is one entry. All passes, the counting of costs and the reasons in reports read this table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from refold.errors import NotFoldable, first_line
from refold.recording import maps, meanings, parts
from refold.recording.linear import Linear, Map, Use
from refold.recording.recording import has_hooks, name_of

ChannelEffect = Literal["apart", "moved"]


@dataclass(frozen=True)
class Operator:
    """One operator. Methods, functions under all their names and in-place twins (`relu_`) are its `names`."""

    word: str
    """What it is called in reports, and counted as."""
    names: tuple[str, ...] = ()
    modules: tuple[type[nn.Module], ...] = ()
    counted: tuple[str, ...] = ()
    """The names under which PyTorch's dispatcher runs it."""
    onnx: tuple[str, ...] = ()
    """Its names in ONNX files and in ONNX Runtime, where these are others, in lower case."""
    linear: Callable[[Use], Linear | None] | None = None
    channels: ChannelEffect | None = None
    """"apart": it treats every channel alike and for itself. "moved": it averages or moves values, so that a scale
    of each channel can pass, wherever the channel lies afterwards."""
    elementwise: bool = False
    """An activation that treats every value alike."""
    homogeneous: bool = False
    """Each channel of what it gives is multiplied by a positive number where that of what it reads is."""
    idempotent: bool = False
    """It changes nothing where it is applied again."""
    takes_scale: bool = False
    """A convolution whose own weight can take up a scale of its outputs, though the algebra cannot write it."""
    free: bool = False
    """It makes or relabels a tensor; no arithmetic runs."""


def _activation(names: str, *modules: type[nn.Module], counted: str = "", **settings: Any) -> Operator:
    own = tuple(names.split())
    return Operator(
        "activation", own, modules, (*own, *counted.split()), channels="apart", elementwise=True, **settings
    )


def _pool(kind: str, counted: str = "", channels: ChannelEffect = "apart", **settings: Any) -> Operator:
    names = tuple(f"{kind}_pool{axes}d" for axes in (1, 2, 3))
    classes = tuple(
        getattr(nn, "".join(part.title() for part in name.split("_"))[:-1] + "d") for name in names
    )
    return Operator("pooling", names, classes, tuple(counted.split()), channels=channels, **settings)


_CONVOLUTIONS = ("convolution", "_convolution", "cudnn_convolution", "mkldnn_convolution")
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_PADS = tuple(getattr(nn, f"{kind}Pad{axes}d") for kind in ("Zero", "Constant") for axes in (1, 2, 3))

# The order is that of every printed table.
OPERATORS = (
    Operator(
        "convolution",
        ("conv1d", "conv2d", "conv3d"),
        (nn.Conv1d, nn.Conv2d, nn.Conv3d),
        _CONVOLUTIONS,
        ("conv", "fusedconv", "nhwcfusedconv"),
        meanings.convolution,
        takes_scale=True,
    ),
    Operator(
        "convolution",
        ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        takes_scale=True,
    ),
    Operator(
        "linear",
        ("linear",),
        (nn.Linear,),
        ("addmm", "mm", "mv", "addmv"),
        ("gemm", "fusedgemm"),
        meanings.linear,
    ),
    Operator("linear", ("addmm",), linear=meanings.added_product),
    Operator(
        "matrix product",
        ("matmul", "mm", "bmm", "einsum"),
        counted=("bmm", "baddbmm", "dot"),
        onnx=("fusedmatmul",),
        linear=meanings.product,
    ),
    Operator(
        "attention",
        ("scaled_dot_product_attention",),
        counted=(
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_fused_attention_overrideable",
        ),
    ),
    Operator(
        "batch norm",
        ("batch_norm", "_native_batch_norm_legit_no_training"),
        (_BatchNorm,),
        (
            *("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training"),
            *("_batch_norm_no_update", "cudnn_batch_norm", "miopen_batch_norm"),
        ),
        ("batchnormalization",),
        meanings.batch_norm,
    ),
    Operator(
        "other norm",
        ("layer_norm", "group_norm", "instance_norm", "normalize"),
        (nn.LayerNorm, nn.GroupNorm),
        ("native_layer_norm", "native_group_norm", "linalg_vector_norm", "_fused_rms_norm"),
        ("layernormalization", "groupnorm", "skiplayernormalization", "instancenormalization"),
    ),
    _activation("relu", nn.ReLU, idempotent=True, homogeneous=True),
    _activation("relu6 hardtanh", nn.ReLU6, nn.Hardtanh, idempotent=True),
    _activation("leaky_relu", nn.LeakyReLU, homogeneous=True),
    _activation("elu celu selu", nn.ELU, nn.CELU, nn.SELU),
    _activation("silu hardswish mish gelu", nn.SiLU, nn.Hardswish, nn.Mish, nn.GELU),
    _activation("softplus threshold", nn.Softplus, nn.Threshold),
    _activation("softshrink hardshrink tanhshrink", nn.Softshrink, nn.Hardshrink, nn.Tanhshrink),
    _activation("sigmoid hardsigmoid tanh softsign", nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.Softsign),
    _activation("logsigmoid", nn.LogSigmoid, counted="log_sigmoid_forward"),
    Operator("activation", ("prelu",), (nn.PReLU,), ("_prelu_kernel",), homogeneous=True),
    Operator("activation", onnx=("quickgelu", "fastgelu", "biasgelu", "erf", "leakyrelu")),
    Operator(
        "activation",
        ("rrelu", "glu", "clamp", "clip", "clamp_min", "clamp_max", "softmax", "log_softmax"),
        counted=(
            *("rrelu_with_noise", "glu", "clamp", "clamp_min", "clamp_max"),
            *("_softmax", "_safe_softmax", "_log_softmax"),
        ),
    ),
    Operator("add", ("add",), counted=("add", "addcmul"), linear=meanings.plus, channels="apart"),
    Operator("add", ("added",), linear=meanings.plus_all, channels="apart"),
    Operator("add", ("sub", "subtract"), counted=("sub", "rsub"), linear=meanings.minus, channels="apart"),
    Operator("multiply", ("mul", "multiply"), counted=("mul",), linear=meanings.times, channels="apart"),
    Operator(
        "multiply",
        ("div", "divide", "truediv", "true_divide"),
        counted=("div",),
        linear=meanings.divided,
        channels="apart",
    ),
    Operator("multiply", ("neg", "negative"), counted=("neg",), linear=meanings.negative, channels="apart"),
    Operator(
        "concatenation",
        ("cat", "concat", "concatenate", "stack"),
        counted=("cat", "stack"),
        onnx=("concat",),
        linear=parts.concatenation,
    ),
    _pool("avg", "avg_pool1d avg_pool2d avg_pool3d", linear=meanings.average_pool, homogeneous=True),
    _pool("max", "max_pool1d max_pool2d_with_indices max_pool3d_with_indices", homogeneous=True),
    _pool("adaptive_avg", "_adaptive_avg_pool2d _adaptive_avg_pool3d", "moved", homogeneous=True),
    _pool("adaptive_max", "adaptive_max_pool2d adaptive_max_pool3d", homogeneous=True),
    Operator("pooling", onnx=("averagepool", "maxpool", "globalaveragepool", "globalmaxpool", "reducemean")),
    Operator("pooling", ("mean",), counted=("mean",), channels="moved", homogeneous=True),
    Operator("pooling", ("sum", "amax", "max"), counted=("sum", "amax", "max")),
    Operator(
        "padding",
        ("pad", "constant_pad_nd"),
        _PADS,
        ("constant_pad_nd",),
        linear=maps.padding,
        channels="apart",
    ),
    Operator("padding", counted=("reflection_pad1d", "reflection_pad2d", "replication_pad2d")),
    Operator(
        "resizing",
        ("interpolate", "upsample"),
        (nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d),
        (
            *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact2d"),
            *(
                "upsample_bilinear2d",
                "upsample_bicubic2d",
                "_upsample_bilinear2d_aa",
                "_upsample_bicubic2d_aa",
            ),
            "grid_sampler_2d",
        ),
        ("resize",),
        channels="apart",
    ),
    Operator(
        "copy", ("contiguous", "clone"), counted=("clone", "copy"), linear=meanings.same, channels="moved"
    ),
    Operator(
        "copy", counted=("_to_copy", "permute_copy", "repeat", "pixel_shuffle", "pixel_unshuffle", "roll")
    ),
    Operator("gather", counted=("index", "index_select", "gather", "embedding")),
    Operator(
        "identity",
        ("alias", "detach", "positive"),
        (nn.Identity,),
        linear=meanings.same,
        channels="apart",
        free=True,
    ),
    Operator(
        "cast",
        ("to", "type", "type_as", "float", "double", "half", "cpu", "cuda", "requires_grad"),
        linear=meanings.idle,
    ),
    Operator("identity", ("getattr",), linear=meanings.attribute, free=True),
    Operator(
        "dropout",
        ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"),
        _DROPOUTS,
        linear=meanings.dropout,
    ),
    Operator("slice", ("getitem",), linear=parts.item, free=True),
    Operator("slice", ("narrow",), linear=parts.narrowed, free=True),
    Operator("border", ("set_item",), linear=parts.border),
    Operator("reshape", ("flatten",), (nn.Flatten,), linear=meanings.flattened, channels="moved", free=True),
    Operator("reshape", ("reshape_as", "view_as"), linear=meanings.restored, free=True),
    Operator("reshape", ("reshape", "view", "squeeze", "unsqueeze"), channels="moved", free=True),
    Operator(
        "permute",
        ("permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims"),
        linear=meanings.permuted,
        channels="moved",
        free=True,
    ),
    Operator("rounding", ("round", "floor", "ceil", "trunc", "sign", "floor_divide", "fix")),
    Operator(
        "",
        free=True,
        counted=(
            *("_unsafe_view", "_local_scalar_dense", "lift_fresh", "detach", "alias", "empty", "empty_like"),
            *("zeros", "zeros_like", "ones", "ones_like", "full", "full_like", "arange", "scalar_tensor"),
            *("new_zeros", "new_full", "new_empty", "new_ones", "empty_strided", "new_empty_strided"),
            *("as_strided", "linspace", "fill", "zero", "equal"),
        ),
    ),
)

WORDS = tuple(dict.fromkeys(operator.word for operator in OPERATORS if operator.counted and operator.word))
"""What runs, in the order of every printed table."""
COUNTED = {name: operator for operator in reversed(OPERATORS) for name in operator.counted}
"""Operators by the names under which PyTorch's dispatcher runs them."""
_BY_NAME = {name: operator for operator in reversed(OPERATORS) for name in operator.names}
_BY_ANY_NAME = {
    name: operator
    for operator in reversed(OPERATORS)
    for name in (*operator.names, *operator.counted, *operator.onnx)
    if operator.word
}
_BY_MODULE = {kind: operator for operator in reversed(OPERATORS) for kind in operator.modules}


def register(operator: Operator) -> None:
    """Let every fold know one more operator, or another way to read one that is there."""
    _BY_NAME.update(dict.fromkeys(operator.names, operator))
    _BY_MODULE.update(dict.fromkeys(operator.modules, operator))
    COUNTED.update(dict.fromkeys(operator.counted, operator))


def word_named(name: str) -> str | None:
    """The word of an operator by any of its names: of torch, of its dispatcher, of ONNX; None for a stranger."""
    found = _BY_ANY_NAME.get(name)
    return None if found is None else found.word


def operator_of(use: Use) -> Operator | None:
    """The entry of what a node runs; None for what is not in the registry, and for layers with hooks."""
    node = use.node
    if node.op == "call_module":
        module = use.layer
        if has_hooks(module):
            return None
        found = (_BY_MODULE.get(kind) for kind in type(module).__mro__)
        return next((operator for operator in found if operator is not None), None)
    return _BY_NAME.get(name_of(node.target)) if node.op in ("call_function", "call_method") else None


def meaning(use: Use) -> Linear | None:
    """How a node is linear in its inputs, None where it is not.

    Raises NotFoldable with the reason where it would be linear but cannot be folded.
    """
    node = use.node
    if node.op == "call_module":
        module = use.layer
        if has_hooks(module) and isinstance(module, (*_BY_MODULE,)):
            raise NotFoldable("it has hooks, which folding could change")
        if any(
            f"{node.target}." in name for name in use.recording.written if name.startswith(f"{node.target}.")
        ):
            raise NotFoldable("its weights are changed while the network runs")
        one_input = len(node.args) + len(node.kwargs) == 1 and set(node.kwargs) <= {"input"}
        if not one_input or len(node.all_input_nodes) != 1:
            return None
    operator = operator_of(use)
    if operator is None and node.op == "call_function":
        return meanings.idle(use)  # a function such as stochastic depth, which returned what it was given
    if operator is None or operator.linear is None:
        return None
    try:
        return operator.linear(use)
    except NotFoldable:
        raise
    except Exception as error:  # one strange call of a known function must not stop the rest
        raise NotFoldable(f"it is called in a way that is not understood ({first_line(error)})") from error


def is_batch_norm(use: Use) -> bool:
    """Whether the node runs a batch norm."""
    if use.node.op == "call_module":
        return isinstance(use.module, _BatchNorm)
    operator = operator_of(use)
    return operator is not None and operator.word == "batch norm"


def takes_scale(use: Use) -> bool:
    """Whether the node is a convolution that is opaque to the algebra but can take up a scale of its outputs."""
    operator = operator_of(use)
    return operator is not None and operator.takes_scale and meanings.takes_scale(use)


def word_of(use: Use, linear: Linear | None) -> str:
    """What the node is, in words: "convolution", "batch norm", "add", or the name of its module or function."""
    node = use.node
    if is_batch_norm(use):
        return "batch norm"
    if isinstance(linear, Map) and linear.multiplies:
        return "convolution" if linear.structure.spatial_axes else "linear"
    if node.op == "call_module":
        return type(use.module).__name__
    if node.op in ("placeholder", "output"):
        return f"the {'input' if node.op == 'placeholder' else 'output'} of the model"
    operator = operator_of(use)
    named = operator.word if operator is not None and linear is not None else name_of(node.target)
    return named or str(getattr(node.target, "__name__", node.target))
