"""One way to quantise a network, from its float file to what is measured of the int8 file; the choice among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from torch import Tensor

from refold.errors import InputError
from refold.export import FORMATS
from refold.quantization import checking
from refold.quantization.config import QuantizationConfig
from refold.quantization.engines import Quantized
from refold.quantization.filling import PART, Filled, in_parts
from refold.quantization.forms import PlainForm
from refold.quantization.mixing import by_gain
from refold.quantization.report import Agreement
from refold.quantization.skeleton import Array

# Photos on which the engine is held to float arithmetic, and layers are compared.
_CHECKED = 64
# What branches beside their kernels must be worth, and what they may cost.
_LEAST_GAIN, _MOST_TIME = 1.0, 1.25


@dataclass(frozen=True)
class Photos:
    """Images to take the ranges from, those to measure on, and the classes of these."""

    images: Tensor
    measured: Tensor
    labels: Tensor | None


class Attempt(Filled):
    """A plain form as an int8 file in a folder of its own, measured in its engine.

    Raises what `refold.quantize` does.
    """

    def __init__(
        self,
        form: PlainForm,
        folder: Path,
        photos: Photos,
        config: QuantizationConfig,
        engine: Quantized,
        class_names: Sequence[str] | None,
    ) -> None:
        folder.mkdir()
        super().__init__(form.network, folder, photos.images, config, class_names)
        self.form, self.photos = form, photos
        self.parts = in_parts(photos.measured)
        self.wanted = checking.outputs_of(checking.opened(self.source), self.parts)
        self._until_within_drop()
        self.notes += self.result.notes
        self._measure(engine, folder)

    def _measure(self, engine: Quantized, folder: Path) -> None:
        file = folder / f"engine{FORMATS[engine.engine].suffix}"
        engine.write(self.int8, file)
        run = engine.open(file)
        found = checking.outputs_of(run, self.parts)
        self.agreement = self._agreement(found)
        some = self.parts[: max(1, _CHECKED // PART)]
        count = sum(map(len, some))
        title = FORMATS[engine.engine].title

        def reopened(model: Any) -> checking.Session:
            aside = folder / "watched.onnx"
            onnx.save(model, str(aside))
            engine.write(aside, file)
            return engine.open(file)

        self.engine_gap = checking.check_engine(
            self.int8, self.graph, [output[:count] for output in self.wanted], some, run, title, reopened
        )
        runs = engine.open_float(self.source, folder), engine.open(file, threads=1)
        self.speed = checking.speed_of(*runs, self.photos.images[:1].numpy(), threads=1)

    def _until_within_drop(self) -> None:
        """Quantise, and leave layers in float32 until no more is lost than is allowed.

        Raises `InputError` where that is not reached with any layer left in int8.
        """
        self.fill()
        most = self.config.max_drop
        if most is not None and (drop := self._drop()) > most:
            some = self.images[: max(1, _CHECKED // PART)]
            order = by_gain(
                self.graph, self.plain, some, checking.outputs_of(checking.opened(self.source), some)
            )
            count = 1
            while drop > most:
                if len(self.in_float) >= len(order) - 1:
                    raise InputError(
                        f"The answers lose {drop:.2f} percentage points, and {most:g} are not reached with any "
                        "layer in int8; allow more, or give more images."
                    )
                self.in_float = list(dict.fromkeys([*self.in_float, *order[: min(count, len(order) - 1)]]))
                self.fill()
                drop, count = self._drop(), 2 * count

    def _agreement(self, found: Sequence[Array]) -> Agreement:
        size = self.photos.images.shape[-2:]
        return checking.agreement_of(self.wanted, found, self.photos.labels, self.form.network, size)

    def _drop(self) -> float:
        found = checking.outputs_of(checking.opened(self.int8), self.parts)
        drop = self._agreement(found).drop
        if drop is None:
            raise InputError(
                "max_drop counts answers, and the network gives no classes, pixels or boxes; leave it out."
            )
        return drop


def chosen(attempts: Sequence[Attempt], notes: list[str]) -> Attempt:
    """The attempt to keep: the first, or a later one that is worth what it takes more; says what was measured."""
    best = attempts[0]
    for other in attempts[1:]:
        gain = other.agreement.decibels - best.agreement.decibels
        taken = other.speed.int8_ms / best.speed.int8_ms
        keep = gain >= _LEAST_GAIN and taken <= _MOST_TIME
        notes.append(
            f"Branches beside their kernels: {gain:+.1f} dB for {taken:.2f} of the time; they were "
            f"{'left there' if keep else 'folded'}."
        )
        best = other if keep else best
    return best
