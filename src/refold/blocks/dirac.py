"""Convolutions whose kernel is computed from parameters and holds the identity."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Where DiracNet's two scaling vectors start.
_IDENTITY_SCALE, _WEIGHT_SCALE = 1.0, 0.1


class TrivialConv2d(nn.Conv2d):
    """Convolution with the kernel I + W_norm, the identity kernel and the weight scaled to length 1 a filter.

    Between unequal channels the identity copies as many channels as both sides have, in every group.
    Arguments and shapes are those of ``nn.Conv2d``.

    Source: RepVGG report, eq. 1 with both scales constantly one, and section 4.3.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("identity", nn.init.dirac_(torch.empty_like(self.weight), self.groups))
        self.identity: Tensor

    def kernel(self) -> Tensor:
        """The kernel that is convolved with: ``(out_channels, in_channels / groups, *kernel_size)``."""
        return self.identity + self._normalised()

    def _normalised(self) -> Tensor:
        return F.normalize(self.weight.flatten(1)).reshape(self.weight.shape)

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = self._conv_forward(input, self.kernel(), self.bias)
        return out


class DiracConv2d(TrivialConv2d):
    """Convolution with DiracNet's kernel diag(a) I + diag(b) W_norm, with a and b trained for each output channel.

    Arguments and shapes are those of ``nn.Conv2d``.

    Source: RepVGG report, eq. 1.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        scale = (self.out_channels, *(1,) * (self.weight.dim() - 1))
        self.identity_scale = nn.Parameter(self.weight.new_full(scale, _IDENTITY_SCALE))
        self.weight_scale = nn.Parameter(self.weight.new_full(scale, _WEIGHT_SCALE))

    def kernel(self) -> Tensor:
        return self.identity_scale * self.identity + self.weight_scale * self._normalised()
