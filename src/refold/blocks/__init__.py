"""The building blocks of the papers, each written once, in its training form."""

from refold.blocks.branches import BranchSum, ConvNorm
from refold.blocks.ghost import GhostBottleneck, GhostModule, GhostModuleFactory, RepGhostModule
from refold.blocks.inverted import InvertedBottleneck, depthwise
from refold.blocks.repnext import RepNeXtBlock, RepUnit1, RepUnit2, RepUnit3
from refold.blocks.repvgg import RepVGGBlock

__all__ = [
    "BranchSum",
    "ConvNorm",
    "GhostBottleneck",
    "GhostModule",
    "GhostModuleFactory",
    "InvertedBottleneck",
    "RepGhostModule",
    "RepNeXtBlock",
    "RepUnit1",
    "RepUnit2",
    "RepUnit3",
    "RepVGGBlock",
    "depthwise",
]
