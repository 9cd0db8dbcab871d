"""Conversions of any network, each in a copy: another kind of layer, ghost modules, ghost stages."""

from refold.conversion.ghost_modules import convolutions_to_ghost
from refold.conversion.ghost_stages import stages_to_gghost
from refold.conversion.layer_kinds import (
    concatenation_to_addition,
    linear_to_pointwise,
    pointwise_to_linear,
)

__all__ = [
    "concatenation_to_addition",
    "convolutions_to_ghost",
    "linear_to_pointwise",
    "pointwise_to_linear",
    "stages_to_gghost",
]
