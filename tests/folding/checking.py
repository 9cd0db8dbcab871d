"""Small hand-made networks, and one check that folding them is exact."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map
from torchvision.ops import FrozenBatchNorm2d

import refold
from refold.folding import count

LARGEST = 1e-9
SIZES = ((12, 12), (9, 14), (16, 7))


class Net(nn.Module):
    """A network whose forward is a function of itself and its input."""

    def __init__(self, function: Callable[[Any, Any], Any], **layers: Any) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Any) -> Any:
        return self.function(self, x)


class Parallel(nn.Module):
    """The sum of branches of one input, and an activation."""

    def __init__(self, *branches: nn.Module, act: nn.Module | None = None) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.act = act or nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.branches[0](x)
        for branch in self.branches[1:]:
            y = y + branch(x)
        return self.act(y)


class Deciding(nn.Module):
    """Calls `body` from code that depends on the data, so that nothing may be folded across it."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if float(x.abs().sum()) >= 0 else x


def conv_bn(in_channels: int, out_channels: int, kernel_size: Any = 3, **settings: Any) -> nn.Sequential:
    """A convolution that keeps the size of the map unless told otherwise, and a batch norm."""
    if "padding" not in settings:
        settings["padding"] = (
            kernel_size // 2 if isinstance(kernel_size, int) else [k // 2 for k in kernel_size]
        )
    settings.setdefault("bias", False)
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, **settings), nn.BatchNorm2d(out_channels)
    )


def trained(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with batch norms as if it had been trained (some scales are negative), in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)

    def fill(tensor: Tensor | None, low: float, high: float) -> None:
        if tensor is not None:
            values = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.data.copy_(values * (high - low) + low)

    for module in model.modules():
        if isinstance(module, (_BatchNorm, FrozenBatchNorm2d)):
            fill(module.running_mean, -1.0, 1.0)
            fill(module.running_var, 0.5, 1.5)
            fill(module.weight, -0.5, 1.5)
            fill(module.bias, -1.0, 1.0)
    return model.eval()


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def images(channels: int, sizes: Sequence[Sequence[int]] = SIZES, batch: int = 2) -> list[Tensor]:
    """One float64 batch of each size; `sizes` may have one or three axes too."""
    return [normal(batch + i, channels, *size, seed=i) for i, size in enumerate(sizes)]


def copied(values: Any) -> Any:
    """The same structure with copies of its tensors, since a network may change its input."""
    return tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, values)


def call(model: nn.Module, example: Any) -> Any:
    """What a model returns for an example input as `fold` takes it."""
    with torch.no_grad():
        return model(*copied(example)) if isinstance(example, tuple) else model(copied(example))


def distance(expected: Any, found: Any) -> float:
    """The largest difference relative to the largest value of any tensor of two structures; shapes must be equal."""
    expected, found = (
        [v for v in tree_leaves(values) if isinstance(v, Tensor)] for values in (expected, found)
    )
    assert [e.shape for e in expected] == [f.shape for f in found]
    assert [e.dtype for e in expected] == [f.dtype for f in found]
    return max(
        float((e - f).abs().max() / e.abs().max().clamp(min=1e-30))
        for e, f in zip(expected, found, strict=True)
    )


def check_fold(
    model: nn.Module,
    examples: Sequence[Any],
    *,
    convolutions: int | None = None,
    batch_norms: int | None = 0,
    left: Sequence[str] = (),
) -> Any:
    """Fold in float64 and compare on every example with the original; return the folded model.

    Neither multiply-accumulates nor operators may have risen, no region may have been undone by its proof, and
    `left` are words of the reasons: each reason must contain one of them, and each of them must occur.
    """
    model = trained(model.double())
    plain: Any = refold.fold(model, examples[0])
    for example in examples:
        assert distance(call(model, example), call(plain, example)) <= LARGEST
        before, after = (
            count(m, example if isinstance(example, tuple) else (example,)) for m in (model, plain)
        )
        assert after.macs <= before.macs
        assert after.operator_count <= before.operator_count
    # The proof undoes what is wrong; without it, nothing wrong may have been planned in the first place.
    unproved = refold.fold(model, examples[0], prove=False)
    assert distance(call(model, examples[0]), call(unproved, examples[0])) <= LARGEST
    report = plain.fold_report
    assert not [reason for _, reason in report.left if "proof failed" in reason]
    assert not [note for note in report.notes if "less was folded" in note]
    if convolutions is not None:
        assert report.after.convolutions == convolutions
    if batch_norms is not None:
        assert report.after.batch_norms == batch_norms
    assert report.left or not report.after.batch_norms
    reasons = {reason for _, reason in report.left}
    assert not [reason for reason in reasons if not any(words in reason for words in left)], reasons
    assert not [words for words in left if not any(words in reason for reason in reasons)], reasons
    return plain
