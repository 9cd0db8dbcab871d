"""`refold.quantize`: a network as an int8 file that keeps its answers, checked in its engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
from torch import Tensor, nn

from refold.export import FORMATS
from refold.export.placing import check_destination, files_of, placed_together
from refold.files import PathLike
from refold.folding import fold
from refold.onnx_files.reading import read_network
from refold.quantization import checking
from refold.quantization.attempts import Attempt, Photos, chosen
from refold.quantization.config import QuantizationConfig
from refold.quantization.engines import engine_for
from refold.quantization.forms import forms_of
from refold.quantization.images import checked_images, checked_labels
from refold.quantization.report import QuantizationReport
from refold.quantization.skeleton import Graph


def quantize(
    model: nn.Module | PathLike,
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
    measured on. A model in training form, or an ONNX file by its path, is folded, and proved, first. The argument is
    untouched.

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
    if not isinstance(model, nn.Module):
        model = read_network(model)
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
    photos = Photos(images, measured, checked_labels(labels, measured, notes))
    plain = model if hasattr(model, "fold_report") else fold(model, images[:1])
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        aside = stack.enter_context(placed_together(target, form))
        attempts = [
            Attempt(each, folder / str(number), photos, config, quantized, class_names)
            for number, each in enumerate(forms_of(plain, images[:1], config))
        ]
        best = chosen(attempts, notes)
        quantized.write(best.int8, aside)
        return QuantizationReport(
            path=str(target),
            engine=engine,
            cpu=config.cpu,
            weights=config.weights,
            bits=config.bits,
            bytes=sum(file.stat().st_size for file in files_of(aside)),
            float_bytes=best.source.stat().st_size,
            calibration=len(images),
            layers=checking.layer_reports(
                Graph(onnx.load(str(best.int8))), best.result.distances, config.bits
            ),
            agreement=best.agreement,
            engine_gap=best.engine_gap,
            speed=best.speed,
            seconds=time.perf_counter() - began,
            in_float=best.in_float,
            kept_out=best.form.kept_out,
            gauges=best.form.gauges,
            notes=[*notes, *best.notes],
        )
