"""Batch norms with the statistics of all processes, on accelerators by PyTorch, on the CPU here."""

from __future__ import annotations

import torch
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn import functional as F

from refold.blocks.parallel.branch import scale_and_shift, uses_batch


class CPUSyncBatchNorm2d(nn.BatchNorm2d):
    """What `nn.SyncBatchNorm` is on accelerators, `[batch, channels, height, width]` in and out."""

    over_processes = True

    def forward(self, x: Tensor) -> Tensor:
        if not uses_batch(self):
            plain: Tensor = F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
            return plain
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        variance, mean = torch.var_mean(wide, dim=(0, 2, 3), correction=0)
        count = wide.numel() // wide.shape[1]
        scale, shift = scale_and_shift(
            [self], mean[None], variance[None], wide.new_empty(1, self.num_features), count
        )
        return (wide * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)).to(x.dtype)


class CPUSyncBatchNormAct2d(CPUSyncBatchNorm2d):
    """timm's batch norm with its dropout and activation."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.drop(super().forward(x)))
        return out


_ON_CPU: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm2d: CPUSyncBatchNorm2d,
    BatchNormAct2d: CPUSyncBatchNormAct2d,
}


def synchronise_norms(net: nn.Module, device: torch.device) -> nn.Module:
    """The network with batch norms, and `ParallelBranches`, that see the batches of all processes.

    ``device`` is the one that it will run on. Parameters and buffers are the same objects under the same names.
    """
    if device.type != "cpu":
        synchronised: nn.Module = convert_sync_batchnorm(net)
        return synchronised
    for module in net.modules():
        # In place, so that whatever holds the norm holds the synchronised one.
        module.__class__ = _ON_CPU.get(type(module), type(module))
    return net
