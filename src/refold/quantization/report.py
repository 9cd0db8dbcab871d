"""What a quantisation tells of the file that it wrote."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class LayerReport:
    """One layer with integer weights.

    ``decibels`` is the distance of what it gives from the float network (SQNR, on the calibration images).
    ``largest_pair`` is the largest sum of two neighbouring integers of one sign, which products of 16 bits stand up to
    128; ``saturating_channels`` are the output channels that exceed it. Both are read from the file.
    """

    name: str
    operator: str
    decibels: float
    bits: int
    channels: int
    largest_pair: int
    saturating_channels: int


@dataclass(frozen=True)
class Agreement:
    """The answers of the int8 file beside the float network's, on ``images`` images.

    ``decibels`` is the SQNR of the outputs, ``same`` counts equal answers among ``counted``: classes of images, pixels
    of a segmenter, or a detector's boxes in both files, of which two are equal that overlap by 90 % with scores less
    than 0.05 apart. ``right`` and ``float_right`` are the classes that the labels call right. What a network does
    not give, or there are no labels for, is None.
    """

    images: int
    decibels: float
    same: int | None = None
    right: int | None = None
    float_right: int | None = None
    counted: int | None = None
    kind: Literal["answers", "pixels", "boxes"] = "answers"

    @property
    def drop(self) -> float | None:
        """Percentage points lost: of right answers where there are labels, else of equal answers."""
        if self.right is not None and self.float_right is not None:
            return 100 * (self.float_right - self.right) / self.images
        if self.same is None or self.counted is None:
            return None
        return 100 * (self.counted - self.same) / max(self.counted, 1)


@dataclass(frozen=True)
class Speed:
    """Medians of interleaved calls with one image, in milliseconds, on ``threads`` threads."""

    float_ms: float
    int8_ms: float
    threads: int
    calls: int

    @property
    def ratio(self) -> float:
        """The int8 file's time in parts of the float file's."""
        return self.int8_ms / self.float_ms


@dataclass(frozen=True)
class QuantizationReport:
    """What was written, how near it is to the network, and what was proved of it.

    ``engine_gap`` is the distance in decibels between the outputs of the engine and of the same file computed in float
    arithmetic, as far as it lowers the agreement; ``calibration`` and ``agreement`` count images. ``in_float`` are the
    layers that were left in float32, ``kept_out`` the branches that stay beside their kernels, ``gauges`` the exact
    changes: channels left out, scaled and rotated.

    Examples:
        >>> import torch, refold
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3)).eval()
        >>> report = refold.quantize(net, "net.onnx", torch.randn(40, 3, 16, 16))
        >>> [layer.name for layer in report.layers], report.saturating_channels
        (['0.weight', '2.weight'], 0)
    """

    path: str
    engine: str
    cpu: str
    weights: str
    bits: int
    bytes: int
    float_bytes: int
    calibration: int
    layers: list[LayerReport]
    agreement: Agreement
    engine_gap: float
    speed: Speed
    seconds: float
    in_float: list[str] = field(default_factory=list)
    kept_out: list[str] = field(default_factory=list)
    gauges: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def saturating_channels(self) -> int:
        """Channels of all layers whose sums could leave 16 bits."""
        return sum(layer.saturating_channels for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON-able values."""
        facts = {"saturating_channels": self.saturating_channels}
        found = dataclasses.asdict(self) | facts
        found["agreement"]["drop"] = self.agreement.drop
        found["speed"]["ratio"] = self.speed.ratio
        return found
