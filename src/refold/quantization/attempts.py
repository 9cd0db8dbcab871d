"""One way to quantise a network, from its float file to what is measured of the int8 file; the choice among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from math import prod
from pathlib import Path

import onnx
from torch import Tensor

from refold.errors import InputError
from refold.export import FORMATS, export
from refold.quantization import checking
from refold.quantization.config import QuantizationConfig
from refold.quantization.engines import Quantized
from refold.quantization.forms import PlainForm
from refold.quantization.lockstep import Lockstep
from refold.quantization.mixing import by_gain
from refold.quantization.skeleton import LAYERS, Array, Graph, write_skeleton

# Images that run through the network at once.
_PART = 20
# Photos on which the engine is held to float arithmetic, and layers are compared.
_CHECKED = 64
# Values of one activation in both streams, five bytes each.
_MOST_VALUES = 120_000_000
# What branches beside their kernels must be worth, and what they may cost.
_LEAST_GAIN, _MOST_TIME = 1.0, 1.25


@dataclass(frozen=True)
class Photos:
    """Images to take the ranges from, those to measure on, and the classes of these."""

    images: Tensor
    measured: Tensor
    labels: Tensor | None


class Attempt:
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
        self.form, self.photos, self.config = form, photos, config
        self.source, self.int8 = folder / "float.onnx", folder / "int8.onnx"
        self.notes: list[str] = []
        export(form.network, self.source, photos.images[:1], class_names=class_names)
        self.plain = Graph(onnx.load(str(self.source)))
        self.in_float = self._named(config.in_float)
        self.parts = _parts(photos.measured)
        self.wanted = checking.outputs_of(checking.opened(self.source), self.parts)
        self._images = _parts(self._that_fit(photos.images))
        self._until_within_drop()
        self.notes += self.result.notes
        self._measure(engine, folder)

    def _measure(self, engine: Quantized, folder: Path) -> None:
        file = folder / f"engine{FORMATS[engine.engine].suffix}"
        engine.write(self.int8, file)
        run = engine.open(file)
        found = checking.outputs_of(run, self.parts)
        self.agreement = checking.agreement_of(self.wanted, found, self.photos.labels)
        some = self.parts[: max(1, _CHECKED // _PART)]
        count = sum(map(len, some))
        title = FORMATS[engine.engine].title
        self.engine_gap = checking.check_engine(
            self.int8, self.graph, [output[:count] for output in self.wanted], some, run, title
        )
        runs = engine.open_float(self.source, folder), engine.open(file, threads=1)
        self.speed = checking.speed_of(*runs, self.photos.images[:1].numpy(), threads=1)

    def _that_fit(self, images: Tensor) -> Tensor:
        """As many of the images, evenly spread, as both streams can hold of the largest value in the network."""
        graph = onnx.shape_inference.infer_shapes(self.plain.model).graph
        sizes = [prod(axis.dim_value or 1 for axis in v.type.tensor_type.shape.dim) for v in graph.value_info]
        most = max(1, _MOST_VALUES // max([1, *sizes]))
        if len(images) <= most:
            return images
        self.notes = [
            f"The ranges were taken from {most} of {len(images)} images: more would take too much memory."
        ]
        return images[[int(index * len(images) / most) for index in range(most)]]

    def _named(self, wanted: Sequence[str]) -> list[str]:
        """The names of the weights of the layers that were named, by these or by the layers' paths."""
        known = {name for node in self.plain.nodes if node.op_type in LAYERS for name in node.input[1:2]}
        found = [name if name in known else f"{name}.weight" for name in wanted]
        for name, given in zip(found, wanted, strict=True):
            if name not in known:
                near = ", ".join(get_close_matches(given, sorted(known), 3)) or ", ".join(sorted(known)[:3])
                raise InputError(f"There is no layer '{given}' to leave in float; there are: {near}.")
        return found

    def _until_within_drop(self) -> None:
        """Quantise, and leave layers in float32 until no more is lost than is allowed.

        Raises `InputError` where that is not reached with any layer left in int8.
        """
        self._quantise()
        most = self.config.max_drop
        if most is not None and (drop := self._drop()) > most:
            some = self._images[: max(1, _CHECKED // _PART)]
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
                self._quantise()
                drop, count = self._drop(), 2 * count

    def _quantise(self) -> None:
        example = dict.fromkeys(self.plain.inputs, self._images[0][:1])
        self.graph = write_skeleton(
            self.source,
            self.int8,
            example,
            per_channel=self.config.weights == "channel",
            in_float=self.in_float,
        )
        self.result = Lockstep(self.graph, self.plain, self._images, self.config).run()
        onnx.save(self.graph.model, str(self.int8))

    def _drop(self) -> float:
        found = checking.outputs_of(checking.opened(self.int8), self.parts)
        drop = checking.agreement_of(self.wanted, found, self.photos.labels).drop
        if drop is None:
            raise InputError("max_drop counts answers, and the network gives no classes; leave it out.")
        return drop


def _parts(images: Tensor) -> list[Array]:
    return [part.numpy() for part in images.split(_PART)]


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
