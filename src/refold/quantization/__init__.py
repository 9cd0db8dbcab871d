"""int8 files that keep the answers: scales that cannot saturate, both streams in one pass, checked in the engine."""

from refold.quantization.config import QuantizationConfig
from refold.quantization.quantize import quantize
from refold.quantization.report import Agreement, LayerReport, QuantizationReport, Speed

__all__ = ["Agreement", "LayerReport", "QuantizationConfig", "QuantizationReport", "Speed", "quantize"]
