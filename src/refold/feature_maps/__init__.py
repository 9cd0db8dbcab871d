"""What a network's layers make of one image: their maps, how alike they are, and how cheaply one gives another."""

from refold.feature_maps.capture import Maps, feature_maps, map_layers
from refold.feature_maps.pairs import Pair, Similarity, similar_pairs, similarity

__all__ = ["Maps", "Pair", "Similarity", "feature_maps", "map_layers", "similar_pairs", "similarity"]
