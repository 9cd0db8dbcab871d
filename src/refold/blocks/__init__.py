"""The building blocks of the papers, each written once, in its training form."""

from refold.blocks.attention import DFCAttention
from refold.blocks.branches import BranchSum, ConvFactory, ConvNorm, RepeatedConvNorm, repeated_kernels
from refold.blocks.ghost import (
    GhostBottleneck,
    GhostModule,
    GhostModuleFactory,
    GhostResidual,
    RepGhostModule,
)
from refold.blocks.inverted import InvertedBottleneck, depthwise
from refold.blocks.repnext import RepNeXtBlock, RepUnit1, RepUnit2, RepUnit3
from refold.blocks.repvgg import RepVGGBlock

__all__ = [
    "BranchSum",
    "ConvFactory",
    "ConvNorm",
    "DFCAttention",
    "GhostBottleneck",
    "GhostModule",
    "GhostModuleFactory",
    "GhostResidual",
    "InvertedBottleneck",
    "RepGhostModule",
    "RepNeXtBlock",
    "RepUnit1",
    "RepUnit2",
    "RepUnit3",
    "RepVGGBlock",
    "RepeatedConvNorm",
    "depthwise",
    "repeated_kernels",
]
