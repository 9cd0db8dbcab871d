"""Measuring cost and latency."""
