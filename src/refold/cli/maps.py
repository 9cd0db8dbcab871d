"""The command `maps`: what the layers of a network make of a photo."""

# Heavy imports are inside the command, so that --help and mistyped options answer at once.

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    network_from,
    parse_size,
    say,
)
from refold.errors import InputError

if TYPE_CHECKING:
    from refold.feature_maps.report import LayerReport

_PAIRS = 3


def maps_command(
    target: Target,
    image: Annotated[Path, typer.Option("--image", help="The photo.")],
    layer: Annotated[
        list[str] | None,
        typer.Option(
            "--layer", help="A layer to show, such as stages.2.0; repeat it.", show_default="list all"
        ),
    ] = None,
    pairs: Annotated[
        bool,
        typer.Option("--pairs", help="Mark the maps that are most alike, and say how one gives the other."),
    ] = False,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A folder for the pictures and the page.")
    ] = Path("maps"),
    checkpoint: Checkpoint = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="With the published weights of the named network.")
    ] = False,
    input_size: InputSize = None,
    num_classes: NumClasses = None,
    model_args: ModelArguments = None,
    as_json: AsJson = False,
) -> None:
    """Draw the feature maps of a network's layers for a photo; without --layer, list the layers that have some."""
    from refold.feature_maps import map_layers
    from refold.feature_maps.report import report_layers, save_maps
    from refold.onnx_files import is_onnx_file
    from refold.targets import weights_file
    from refold.training.calibration import read_images

    if is_onnx_file(target):
        raise InputError(
            f"'{target}' is an ONNX file, whose nodes are no layers with names; give the network."
        )
    if image.is_dir():
        raise InputError(f"'{image}' is a folder; give one photo.")
    network = network_from(target, checkpoint, num_classes, model_args, pretrained=pretrained).eval()
    if not pretrained and checkpoint is None and weights_file(target) is None:
        say(f"{target} has random weights; --pretrained or --checkpoint gives it others.")
    size = parse_size(input_size, network)
    prepared = read_images(image, network, size=None if size is None else tuple(size))
    if not layer:
        _list(map_layers(network, prepared), as_json)
        return
    reports = report_layers(network, prepared, layer, pairs=_PAIRS if pairs else 0)
    paths = save_maps(reports, output, network=target, image=image.name)
    if as_json:
        print(json.dumps([_described(report) for report in reports], indent=2))
        return
    for report in reports:
        _print(report)
    console.print(f"{paths[-1]} shows them, and each is a PNG file beside it.", highlight=False)


def _list(layers: dict[str, tuple[int, ...]], as_json: bool) -> None:
    if as_json:
        print(json.dumps({name: list(shape) for name, shape in layers.items()}, indent=2))
        return
    for name, shape in layers.items():
        print(f"{name}  {' x '.join(map(str, shape))}")


def _print(report: LayerReport) -> None:
    from refold.feature_maps.report import HEADINGS

    maps = report.maps
    parts = ", ".join(f"{count} {name}" for name, count in maps.parts)
    shape = " x ".join(map(str, maps.values.shape[1:]))
    console.print(
        escape(f"{maps.layer}: {maps.channels} maps of {shape} pixels{f' ({parts})' if parts else ''}"),
        highlight=False,
    )
    if report.similar is None:
        return
    table = Table()
    for heading in HEADINGS:
        table.add_column(heading, justify="right", overflow="fold")
    for cells in report.rows:
        table.add_row(*cells)
    console.print(table)


def _described(report: LayerReport) -> dict[str, object]:
    return {
        "layer": report.maps.layer,
        "shape": list(report.maps.values.shape),
        "parts": dict(report.maps.parts),
        "pairs": [
            {
                "source": pair.source,
                "target": pair.target,
                "correlation": pair.correlation,
                "variance": pair.variance,
                "mean_square": pair.square,
                "errors": {str(size): error for size, error in pair.errors.items()},
            }
            for pair in report.pairs
        ],
    }
