"""What the commands share: the console, the options, and how a target becomes a network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from refold.errors import InputError

if TYPE_CHECKING:
    from torch import nn

console = Console()

CHECKPOINT_SUFFIXES = {".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".tar"}

Target = Annotated[
    str, typer.Argument(metavar="NAME|CHECKPOINT", help="A model name, or a file of refold.save.")
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint", help="Weights for the named model: refold's, timm's or the official layout."
    ),
]
InputSize = Annotated[
    str | None,
    typer.Option("--input-size", help="Size of the image: 224, 192x256 (height x width) or 3x192x256."),
]
NumClasses = Annotated[
    int | None, typer.Option("--num-classes", help="Number of classes of the named model.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

# What `bench` and `paper` measure with.
Engines = Annotated[
    list[str] | None,
    typer.Option(
        "--engine", help="pytorch, an engine of export, or all; repeat it.", show_default="onnxruntime"
    ),
]
ThreadCounts = Annotated[
    list[int] | None, typer.Option("--threads", help="Threads of the engine; repeat it.", show_default="1")
]
Rounds = Annotated[int, typer.Option("--rounds", help="Rounds in which each takes a turn.")]
WarmUp = Annotated[int, typer.Option("--warm-up", help="Rounds before them that do not count.")]
Plots = Annotated[Path | None, typer.Option("--plots", help="A folder for every plot as PNG and as SVG.")]
MachineName = Annotated[
    str | None, typer.Option("--machine", help="The name of this machine.", show_default="its processor's")
]
MachineNote = Annotated[str, typer.Option("--note", help="Kept with the machine's facts.")]
TimeLimit = Annotated[
    float, typer.Option("--time-limit", help="Seconds after which a silent engine is given up.")
]


def network_from(
    target: str, checkpoint: Path | None, num_classes: int | None, *, pretrained: bool = False
) -> nn.Module:
    """Load a checkpoint file, or create a named model and fill it from ``checkpoint`` or its published weights."""
    from refold.checkpoints import load
    from refold.models import create_model, load_checkpoint

    arguments: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    path = Path(target)
    if pretrained and (checkpoint is not None or path.suffix in CHECKPOINT_SUFFIXES):
        raise InputError("The weights come from one place; leave --pretrained or the checkpoint out.")
    if path.is_file() or path.suffix in CHECKPOINT_SUFFIXES:
        if checkpoint is not None:
            raise InputError(f"'{target}' is a checkpoint already; leave --checkpoint out or name a model.")
        return load(path, **arguments)
    model = create_model(target, pretrained, **arguments)
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model.eval()


def parse_size(text: str | None, model: nn.Module) -> list[int] | None:
    """The size that an option states as (channels, height, width); None where it is left out."""
    if text is None:
        return None
    from refold.checkpoints import example_input

    try:
        sides = [int(side) for side in text.lower().split("x")]
    except ValueError:
        sides = []
    if not 1 <= len(sides) <= 3 or min(sides) < 1:
        raise InputError(f"The input size '{text}' is not understood; give 224, 192x256 or 3x192x256.")
    if len(sides) == 1:
        sides *= 2
    return sides if len(sides) == 3 else [example_input(model).shape[1], *sides]
