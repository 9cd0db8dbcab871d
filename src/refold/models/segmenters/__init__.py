"""Segmenters: a head and any classifier as backbone, from images to a score of each class for every pixel."""
