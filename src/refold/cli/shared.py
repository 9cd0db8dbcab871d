"""What the commands share: the console, the options, and how a target becomes a network."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from refold.errors import InputError, first_line, printable

if TYPE_CHECKING:
    from torch import Tensor, nn


def _console(stderr: bool) -> Console:
    # FORCE_COLOR, which notebooks and build servers set, would let bars move where nothing can.
    can_move = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, force_terminal=None if can_move else False)


console, error_console = _console(stderr=False), _console(stderr=True)

MODEL, MODEL_HELP = (
    "MODEL",
    "A name, a checkpoint, a run's folder, an ONNX file, or your own class or function: net.py:Net, "
    "package.module:net.",
)
Target = Annotated[str, typer.Argument(metavar=MODEL, help=MODEL_HELP)]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint", help="Weights for the named model: refold's, timm's or the official layout."
    ),
]
Checkpoints = Annotated[
    list[Path] | None,
    typer.Option("--checkpoint", help="Weights for a named model; repeat it, one for each in their order."),
]
ModelArguments = Annotated[
    list[str] | None,
    typer.Option(
        "--model-args",
        metavar="KEY=VALUE",
        help="An argument that builds the named model, such as width=0.5; repeatable.",
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
Precisions = Annotated[
    list[str] | None,
    typer.Option(
        "--precision",
        help="float32, float16, int8 or, with --device cuda, tf32; repeat it.",
        show_default="float32",
    ),
]
Device = Annotated[str, typer.Option("--device", help="With --engine pytorch: cpu or cuda.")]
Executions = Annotated[
    list[str] | None,
    typer.Option(
        "--execution",
        help="With --engine pytorch: eager, compiled or, with --device cuda, graphs; repeat it.",
        show_default="eager",
    ),
]
MemoryFormats = Annotated[
    list[str] | None,
    typer.Option(
        "--memory-format",
        help="With --engine pytorch: channels_first or channels_last; repeat it.",
        show_default="channels_first",
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
    target: str,
    checkpoint: Path | None = None,
    num_classes: int | None = None,
    model_args: Sequence[str] | None = None,
    *,
    form: Literal["training", "plain"] = "training",
    pretrained: bool | None = False,
) -> nn.Module:
    """`refold.targets.open_network` for the options of a command; what it says goes to stderr."""
    from refold.targets import model_arguments, open_network

    arguments = model_arguments(model_args)
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    return open_network(target, checkpoint, arguments, form=form, pretrained=pretrained, say=say)


def say(text: str) -> None:
    """Tell the user one thing that is no result, in one line on stderr."""
    print("refold:", printable(text), file=sys.stderr)


def paired(targets: Sequence[str], checkpoints: Sequence[Path] | None) -> list[Path | None]:
    """The checkpoint of each target: the named ones take them in their order, the others bring their own weights.

    Raises `InputError` where there is not one for each named target.
    """
    from refold.targets import network_file

    if not checkpoints:
        return [None] * len(targets)
    named = [network_file(target) is None for target in targets]
    if sum(named) != len(checkpoints):
        raise InputError(
            f"There are {len(checkpoints)} of --checkpoint for {sum(named)} named models; give one for each, in their "
            "order."
        )
    left = iter(checkpoints)
    return [next(left) if is_named else None for is_named in named]


def example_for(model: nn.Module, input_size: str | None) -> Tensor:
    """The image of the size that an option states, or of the model's own; raises `InputError` where it does not run.

    For an ONNX file it is whatever that takes, a tuple where these are several inputs.
    """
    import torch

    from refold.checkpoints import example_input
    from refold.onnx_files import is_onnx_network

    if is_onnx_network(model):
        from refold.onnx_files.examples import example_of

        found: Any = example_of(model, _sides(input_size))  # type: ignore[arg-type]  # that is what was asked
        return found if len(found) > 1 else found[0]  # type: ignore[no-any-return]  # as above
    example = example_input(model, parse_size(input_size, model))
    try:
        with torch.no_grad():
            model(example)
    except Exception as error:  # a network may refuse a size, or its number of channels, in any way
        size = " x ".join(map(str, example.shape[1:]))
        raise InputError(
            f"The network cannot run on an image of {size} ({first_line(error)}); give an --input-size that it takes."
        ) from error
    return example


def parse_size(text: str | None, model: nn.Module) -> list[int] | None:
    """The size that an option states as (channels, height, width); None where it is left out."""
    if text is None:
        return None
    from refold.checkpoints import example_input

    sides = _sides(text) or []
    if len(sides) == 1:
        sides *= 2
    return sides if len(sides) == 3 else [example_input(model).shape[1], *sides]


def _sides(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        sides = [int(side) for side in text.lower().split("x")]
    except ValueError:
        sides = []
    if not 1 <= len(sides) <= 3 or min(sides) < 1:
        raise InputError(f"The input size '{text}' is not understood; give 224, 192x256 or 3x192x256.")
    return sides
