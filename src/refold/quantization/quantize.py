"""`refold.quantize`: a network as an int8 file that keeps its answers, checked in its engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from difflib import get_close_matches
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
from torch import Tensor, nn

from refold.errors import InputError
from refold.export import FORMATS, export
from refold.export.placing import check_destination, files_of, placed_together
from refold.files import PathLike
from refold.folding import fold
from refold.folding.fold import apply_passes
from refold.folding.streams import rotated_streams
from refold.quantization import checking
from refold.quantization.config import QuantizationConfig
from refold.quantization.engines import engine_for
from refold.quantization.images import checked_images, checked_labels
from refold.quantization.lockstep import Lockstep
from refold.quantization.mixing import by_gain
from refold.quantization.report import QuantizationReport
from refold.quantization.skeleton import LAYERS, Array, Graph, write_skeleton

# Images that run through the network at once.
_PART = 20
# Photos on which the engine is held to float arithmetic.
_CHECKED = 64
# Values of one activation in both streams, five bytes each.
_MOST_VALUES = 120_000_000


def quantize(
    model: nn.Module,
    path: PathLike,
    images: Tensor,
    *,
    engine: str = "onnxruntime",
    config: QuantizationConfig | None = None,
    held_out: Tensor | None = None,
    labels: Sequence[int] | Tensor | None = None,
    class_names: Sequence[str] | None = None,
) -> QuantizationReport:
    """Write the eval-mode function of a model as an int8 file, and check the file by running it in its engine.

    ``images`` are what the ranges are taken from, ``(n, channels, height, width)``, prepared as the network takes them;
    a few hundred will do (`refold.read_images` reads a folder). The agreement in the report is measured on
    ``held_out`` images where there are some, else on the same; ``labels`` are the classes of those that are
    measured on. A model in training form is folded, and proved, first. The argument is untouched.

    Weights are integers of 8 bits (`QuantizationConfig` has the choices), activations 0 to 255, sums 32 bits. The
    scales are such that no processor of ``config.cpu`` can leave the 16 bits in which it may add two products; that is
    proved from the integers in the file. The file is run in its engine and once in float arithmetic.

    Raises `NotEquivalent` where these two differ by more than 1 dB or a fold is not exact, and `InputError` where the
    engine has no int8, the images are of no use, or the file cannot be written; no file is left then.

    Examples:
        >>> import torch, refold
        >>> net = refold.create_model("repghostnet_050", num_classes=10)
        >>> report = refold.quantize(net, "net.int8.onnx", torch.randn(40, 3, 64, 64))
        >>> report.saturating_channels, report.agreement.decibels > 10
        (0, True)
    """
    began = time.perf_counter()
    config = config or QuantizationConfig()
    quantized = engine_for(engine, config)
    form = FORMATS[engine]
    target = check_destination(path, form)
    notes: list[str] = []
    if model.training:
        notes.append(
            "The network was in training mode; what was quantised is what it computes in evaluation mode."
        )
    images = checked_images(images, "The images", notes)
    measured = (
        images if held_out is None else checked_images(held_out, "The held-out images", [], like=images)
    )
    if held_out is None:
        notes.append("The agreement was measured on the images that the ranges were taken from.")
    truth = checked_labels(labels, measured, notes)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        aside = stack.enter_context(placed_together(target, form))
        source, int8 = folder / "float.onnx", folder / "int8.onnx"
        plain, gauges = _plain(model, images[:1], config)
        export(plain, source, images[:1], class_names=class_names)
        run = _Run(source, int8, images, measured, truth, config)
        notes += run.until_within_drop()
        quantized.write(int8, aside)
        found = checking.outputs_of(quantized.open(aside), run.parts)
        checked = run.parts[: max(1, _CHECKED // _PART)]
        return QuantizationReport(
            path=str(target),
            engine=engine,
            cpu=config.cpu,
            weights=config.weights,
            bits=config.bits,
            bytes=sum(file.stat().st_size for file in files_of(aside)),
            float_bytes=source.stat().st_size,
            calibration=len(images),
            layers=checking.layer_reports(Graph(onnx.load(str(int8))), run.result.distances, config.bits),
            agreement=checking.agreement_of(run.wanted, found, truth),
            engine_gap=checking.check_engine(
                int8, run.graph, [part[: sum(map(len, checked))] for part in run.wanted], checked
            ),
            speed=checking.speed_of(
                quantized.open_float(source, folder),
                quantized.open(aside, threads=1),
                images[:1].numpy(),
                threads=1,
            ),
            seconds=time.perf_counter() - began,
            in_float=list(run.in_float),
            gauges=gauges,
            notes=notes,
        )


def _plain(model: nn.Module, example: Tensor, config: QuantizationConfig) -> tuple[nn.Module, list[str]]:
    """The plain network with its free choices made for integers, proved, and what they are."""
    plain = model if hasattr(model, "fold_report") else fold(model, example)
    if not config.rotate:
        return plain, []
    free = apply_passes(plain, example, [rotated_streams])
    report: Any = free.fold_report
    if not report.regions:
        return plain, []
    report.record = None  # a file of integers is not rebuilt from it
    return free, [f"{region.path}: {region.layer}" for region in report.regions]


class _Run:
    """The float file, the images, and the passes over them until the answers are near enough."""

    def __init__(
        self,
        source: Path,
        target: Path,
        images: Tensor,
        measured: Tensor,
        labels: Tensor | None,
        config: QuantizationConfig,
    ) -> None:
        self.said: list[str] = []
        self._source, self._target, self._config, self._labels = source, target, config, labels
        self.parts = _parts(measured)
        self.wanted = checking.outputs_of(checking.opened(source), self.parts)
        self.plain = Graph(onnx.load(str(source)))
        self._images = _parts(self._that_fit(images))
        self.in_float: list[str] = self._named(config.in_float)

    def _that_fit(self, images: Tensor) -> Tensor:
        """As many of the images, evenly spread, as both streams can hold of the largest value in the network."""
        graph = onnx.shape_inference.infer_shapes(self.plain.model).graph
        sizes = [prod(axis.dim_value or 1 for axis in v.type.tensor_type.shape.dim) for v in graph.value_info]
        most = max(1, _MOST_VALUES // max([1, *sizes]))
        if len(images) <= most:
            return images
        self.said = [
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

    def until_within_drop(self) -> list[str]:
        """Quantise, and leave layers in float32 until no more is lost than is allowed; returns notes.

        Raises `InputError` where that is not reached with any layer left in int8.
        """
        self._quantise()
        most = self._config.max_drop
        if most is None:
            return [*self.said, *self.result.notes]
        drop = self._drop()
        if drop > most:
            some = self._images[: max(1, _CHECKED // _PART)]
            order = by_gain(
                self.graph, self.plain, some, checking.outputs_of(checking.opened(self._source), some)
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
        return [*self.said, *self.result.notes]

    def _quantise(self) -> None:
        example = dict.fromkeys(self.plain.inputs, self._images[0][:1])
        self.graph = write_skeleton(
            self._source,
            self._target,
            example,
            per_channel=self._config.weights == "channel",
            in_float=self.in_float,
        )
        self.result = Lockstep(self.graph, self.plain, self._images, self._config).run()
        onnx.save(self.graph.model, str(self._target))

    def _drop(self) -> float:
        found = checking.outputs_of(checking.opened(self._target), self.parts)
        drop = checking.agreement_of(self.wanted, found, self._labels).drop
        if drop is None:
            raise InputError("max_drop counts answers, and the network gives no classes; leave it out.")
        return drop


def _parts(images: Tensor) -> list[Array]:
    return [part.numpy() for part in images.split(_PART)]
