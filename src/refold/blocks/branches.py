"""What every block is made of: a convolution with its batch norm, and a sum of such branches."""

from collections.abc import Sequence
from typing import Protocol

from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from refold.blocks.parallel import ParallelBranches

KernelSize = int | tuple[int, int]


def _centred_padding(kernel_size: KernelSize) -> KernelSize:
    if isinstance(kernel_size, int):
        return kernel_size // 2
    return kernel_size[0] // 2, kernel_size[1] // 2


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm and, if asked for, ReLU.

    The zero padding is ``kernel_size // 2`` if none is given, which keeps the map's size for odd kernels at
    stride 1. ``eps`` is the batch norm's, ``conv`` the class of the convolution.
    Maps ``(batch, in_channels, height, width)`` to ``(batch, out_channels, height / stride, width /
    stride)``, rounded up.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: KernelSize = 1,
        *,
        stride: int = 1,
        padding: KernelSize | None = None,
        groups: int = 1,
        activation: bool = False,
        eps: float = 1e-5,
        conv: type[nn.Conv2d] = nn.Conv2d,
    ) -> None:
        super().__init__()
        self.conv = conv(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=_centred_padding(kernel_size) if padding is None else padding,
            groups=groups,
            bias=False,
        )
        self.bn = nn.BatchNorm2d(out_channels, eps=eps)
        self.act = nn.ReLU(inplace=True) if activation else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.bn(self.conv(x)))
        return out


class BranchSum(ParallelBranches):
    """Sum of parallel branches of one input: a ``ConvNorm`` for each kernel size, and a batch norm as skip.

    ``identity`` adds the input itself, where shapes allow it as for the skip. ``norm=False`` leaves the
    convolutions bare, ``activation`` puts a ReLU at the end of every branch, which no longer folds then.

    All branches share stride and groups, and every kernel is centred, so the sum is one convolution at
    inference: RepVGG's ``3x3 + 1x1 + identity``, MobileOne's repeated kernels, RepGhost's ``depthwise
    3x3 + batch norm``. The skip exists only where it can: equal channels and stride 1.
    Maps ``(batch, in_channels, height, width)`` to ``(batch, out_channels, height / stride, width /
    stride)``, rounded up.

    Source: RepVGG report, figure 2; RepGhost, figure 3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_sizes: Sequence[KernelSize],
        *,
        stride: int = 1,
        groups: int = 1,
        skip: bool = True,
        identity: bool = False,
        norm: bool = True,
        activation: bool = False,
        eps: float = 1e-5,
    ) -> None:
        branches = [
            ConvNorm(
                in_channels,
                out_channels,
                kernel_size,
                stride=stride,
                groups=groups,
                activation=activation,
                eps=eps,
            )
            for kernel_size in kernel_sizes
        ]
        can_skip = in_channels == out_channels and stride == 1
        skip_norm = BatchNormAct2d if activation else nn.BatchNorm2d
        super().__init__(
            branches if norm else [branch.conv for branch in branches],
            skip_norm(in_channels, eps=eps) if skip and can_skip else None,
            adds_input=identity and can_skip,
        )


class ConvFactory(Protocol):
    """Whatever builds a linear layer with ``ConvNorm``'s arguments and shapes, activated if asked for."""

    def __call__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: KernelSize = 1,
        *,
        stride: int = 1,
        groups: int = 1,
        activation: bool = False,
    ) -> nn.Module: ...


class RepeatedConvNorm(nn.Module):
    """``ConvNorm`` repeated in parallel, with a 1x1 branch and a batch norm as skip beside it, then ReLU.

    ``repeats`` branches have the given kernel; ``pointwise`` adds one 1x1 convolution where the kernel is larger
    than that, ``skip`` a batch norm where channels and stride allow it.
    Maps ``(batch, in_channels, height, width)`` to ``(batch, out_channels, height / stride, width /
    stride)``, rounded up.

    Source: GhostNetV3, section 4.1 and figure 2b.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: KernelSize = 1,
        *,
        stride: int = 1,
        groups: int = 1,
        activation: bool = False,
        repeats: int = 3,
        pointwise: bool = True,
        skip: bool = True,
    ) -> None:
        super().__init__()
        kernel_sizes = repeated_kernels(kernel_size, repeats, pointwise)
        self.conv = BranchSum(
            in_channels, out_channels, kernel_sizes, stride=stride, groups=groups, skip=skip
        )
        self.act = nn.ReLU(inplace=True) if activation else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.conv(x))
        return out


def repeated_kernels(kernel_size: KernelSize, repeats: int, pointwise: bool = True) -> list[KernelSize]:
    """The kernels of ``repeats`` equal branches and, where they are larger than 1x1, of a 1x1 branch."""
    return [kernel_size] * repeats + [1] * (pointwise and kernel_size not in (1, (1, 1)))
