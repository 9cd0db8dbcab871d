"""Detectors: a head and any classifier as backbone, from images to maps."""
