"""The command `quantize`."""

# Heavy imports are inside the command, so that --help and mistyped options answer at once.

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from refold.cli.shared import (
    AsJson,
    Checkpoint,
    InputSize,
    ModelArguments,
    NumClasses,
    Target,
    console,
    example_for,
    network_from,
    say,
)
from refold.files import check_writable, write_text

if TYPE_CHECKING:
    from refold.quantization import QuantizationReport

# Layers that are shown: those furthest from the float network.
_SHOWN = 5


def quantize_command(
    target: Target,
    data: Annotated[
        Path,
        typer.Option("--data", help="Photos such as the network will see: a folder, or folders of classes."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write, such as net.int8.onnx.")],
    labels: Annotated[
        bool,
        typer.Option(
            "--labels", help="The folders are the classes, in the network's order: count right answers."
        ),
    ] = False,
    engine: Annotated[
        str, typer.Option("--engine", help="onnxruntime or openvino; an error says why not another.")
    ] = "onnxruntime",
    cpu: Annotated[
        str, typer.Option("--cpu", help="The arithmetic to be safe for: avx2, vnni, arm or any.")
    ] = "any",
    weights: Annotated[
        str, typer.Option("--weights", help="One scale a channel, or a tensor: channel or tensor.")
    ] = "channel",
    activations: Annotated[
        str, typer.Option("--activations", help="int8, or float32: then the weights alone are integers.")
    ] = "int8",
    bits: Annotated[int, typer.Option("--bits", help="Bits of a weight, 8 or fewer.")] = 8,
    keep_identity: Annotated[
        str,
        typer.Option("--keep-identity", help="Leave identities out of the kernels: auto, never or always."),
    ] = "auto",
    max_drop: Annotated[
        float | None,
        typer.Option(
            "--max-drop",
            help="Percentage points that may be lost; layers are left in float32 until it is so.",
        ),
    ] = None,
    in_float: Annotated[
        list[str] | None, typer.Option("--in-float", help="A layer to leave in float32; repeat it.")
    ] = None,
    calibration: Annotated[
        int, typer.Option("--images", min=1, help="Photos to take the ranges from; the others measure.")
    ] = 200,
    report: Annotated[
        Path | None, typer.Option("--report", help="A .json file for the whole report.")
    ] = None,
    checkpoint: Checkpoint = None,
    input_size: InputSize = None,
    num_classes: NumClasses = None,
    model_args: ModelArguments = None,
    as_json: AsJson = False,
) -> None:
    """Write a network as an int8 file that keeps its answers, checked in its engine."""
    from refold.quantization import QuantizationConfig, quantize
    from refold.quantization.engines import engine_for
    from refold.training.calibration import split_photos

    choices: Any = {
        "cpu": cpu,
        "weights": weights,
        "activations": activations,
        "keep_identity": keep_identity,
    }
    config = QuantizationConfig(**choices, bits=bits, max_drop=max_drop, in_float=in_float or ())
    engine_for(engine, config)
    if report is not None:
        check_writable(report)
    check_writable(output)
    model = network_from(target, checkpoint, num_classes, model_args, form="training")
    size = tuple(example_for(model, input_size).shape[1:])
    photos = split_photos(data, model, size, calibration, labelled=labels, say=say)
    result = quantize(
        model,
        output,
        photos.images,
        engine=engine,
        config=config,
        held_out=photos.held_out,
        labels=photos.labels,
    )
    if report is not None:
        write_text(report, json.dumps(result.to_dict(), indent=1))
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
        return
    console.print(_summary(result))
    console.print(_layers(result))


def _summary(report: QuantizationReport) -> Table:
    table = Table.grid(padding=(0, 2))
    found, speed = report.agreement, report.speed
    share = report.bytes / report.float_bytes
    table.add_row("file", f"{escape(report.path)} ({report.bytes / 1e6:.2f} MB, {share:.2f} of float32)")
    table.add_row("distance", f"{found.decibels:.1f} dB on {found.images} images")
    if found.same is not None:
        table.add_row(f"same {found.kind}", f"{found.same:,} of {found.counted:,}")
    if found.right is not None:
        table.add_row("right answers", f"{found.right} of {found.images}; in float32 {found.float_right}")
    channels = sum(layer.channels for layer in report.layers)
    table.add_row("could saturate", f"{report.saturating_channels} of {channels} channels")
    table.add_row("engine against float arithmetic", f"{report.engine_gap:+.2f} dB")
    table.add_row(
        "latency", f"{speed.int8_ms:.2f} ms, {speed.ratio:.2f} of float32's, {speed.threads} thread"
    )
    for title, names in (("in float32", report.in_float), ("kept out", report.kept_out)):
        if names:
            table.add_row(title, escape(", ".join(names)))
    for gauge in report.gauges:
        table.add_row("exactly", escape(gauge))
    for note in report.notes:
        table.add_row("note", escape(note))
    return table


def _layers(report: QuantizationReport) -> Table:
    table = Table(title="The layers that are furthest from float32", title_justify="left")
    table.add_column("layer")
    for title in ("distance", "largest pair", "could saturate"):
        table.add_column(title, justify="right")
    for layer in sorted(report.layers, key=lambda each: each.decibels)[:_SHOWN]:
        table.add_row(
            escape(layer.name),
            f"{layer.decibels:.1f} dB",
            str(layer.largest_pair),
            f"{layer.saturating_channels} of {layer.channels}",
        )
    return table
