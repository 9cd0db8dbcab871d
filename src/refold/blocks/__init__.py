"""The building blocks of the papers, each written once, in its training form."""

from refold.blocks.attention import DFCAttention
from refold.blocks.basic import BasicBlock, PaddedIdentity, basic_stage
from refold.blocks.bottleneck import ResidualBottleneck
from refold.blocks.branches import BranchSum, ConvFactory, ConvNorm, RepeatedConvNorm, repeated_kernels
from refold.blocks.c3 import AddedC3
from refold.blocks.dirac import DiracConv2d, TrivialConv2d
from refold.blocks.gghost import (
    BlockFactory,
    Cheap,
    GGhostMix,
    GGhostStage,
    gghost_compression,
    gghost_speed_up,
    gghost_stage,
    thin_width,
)
from refold.blocks.ghost import (
    GhostBottleneck,
    GhostConv2d,
    GhostModule,
    GhostModuleFactory,
    GhostResidual,
    RepGhostModule,
    ghost_compression,
    ghost_speed_up,
)
from refold.blocks.inverted import InvertedBottleneck, depthwise
from refold.blocks.pointwise import PointwiseLinear
from refold.blocks.repnext import RepNeXtBlock, RepUnit1, RepUnit2, RepUnit3
from refold.blocks.repvgg import REPARAMETERIZATIONS, RepVGGBlock

__all__ = [
    "REPARAMETERIZATIONS",
    "AddedC3",
    "BasicBlock",
    "BlockFactory",
    "BranchSum",
    "Cheap",
    "ConvFactory",
    "ConvNorm",
    "DFCAttention",
    "DiracConv2d",
    "GGhostMix",
    "GGhostStage",
    "GhostBottleneck",
    "GhostConv2d",
    "GhostModule",
    "GhostModuleFactory",
    "GhostResidual",
    "InvertedBottleneck",
    "PaddedIdentity",
    "PointwiseLinear",
    "RepGhostModule",
    "RepNeXtBlock",
    "RepUnit1",
    "RepUnit2",
    "RepUnit3",
    "RepVGGBlock",
    "RepeatedConvNorm",
    "ResidualBottleneck",
    "TrivialConv2d",
    "basic_stage",
    "depthwise",
    "gghost_compression",
    "gghost_speed_up",
    "gghost_stage",
    "ghost_compression",
    "ghost_speed_up",
    "repeated_kernels",
    "thin_width",
]
