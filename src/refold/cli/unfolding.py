"""The command `unfold`: training-time branches for a network, and the plans for them."""

# Heavy imports are inside the commands, so that --help and mistyped options answer at once.

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.table import Table

from refold.cli.shared import (
    MODEL,
    MODEL_HELP,
    AsJson,
    Checkpoint,
    InputSize,
    ModelArguments,
    NumClasses,
    console,
    example_for,
    network_from,
)
from refold.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from refold.unfolding import UnfoldReport


def unfold_command(
    target: Annotated[
        str | None,
        typer.Argument(metavar=MODEL, help=MODEL_HELP, show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The checkpoint to write (.safetensors); none writes nothing."),
    ] = None,
    plan: Annotated[
        str, typer.Option("--plan", help="A plan's name, or a YAML or JSON file with one.")
    ] = "ghostnetv3",
    show_plans: Annotated[bool, typer.Option("--list", help="Show the plans and stop.")] = False,
    layers: Annotated[
        list[str] | None,
        typer.Option(
            "--layers", metavar="PATTERN", help="Only layers whose names match, such as 'blocks.3.*'."
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", metavar="PATTERN", help="No layers whose names match.")
    ] = None,
    kinds: Annotated[
        list[str] | None,
        typer.Option("--kinds", metavar="KIND", help="Only pointwise, depthwise, dense or grouped layers."),
    ] = None,
    stages: Annotated[
        list[int] | None,
        typer.Option(
            "--stages",
            metavar="NUMBER",
            help="Only layers before whose output the image was halved so often.",
        ),
    ] = None,
    branches: Annotated[
        list[str] | None,
        typer.Option(
            "--branches",
            metavar="[PATTERN=]NUMBER",
            help="Kernels of a layer's own size, the layer's own among them.",
            show_default="the plan's",
        ),
    ] = None,
    start: Annotated[
        Literal["preserving", "random"],
        typer.Option(help="preserving: compute what the network did; random: as the papers start."),
    ] = "preserving",
    seed: Annotated[int, typer.Option("--seed", help="Seed of the new branches and of random weights.")] = 0,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Take the published weights of the named model.")
    ] = False,
    checkpoint: Checkpoint = None,
    input_size: InputSize = None,
    num_classes: NumClasses = None,
    model_args: ModelArguments = None,
    as_json: AsJson = False,
) -> None:
    """Give a network training-time branches; refold fold takes them away again.

    --layers, --exclude, --kinds, --stages and --branches can be given several times.
    """
    if show_plans:
        _print_plans(as_json)
        return
    if target is None:
        raise InputError(
            "There is nothing to unfold; give a model name or a checkpoint, or --list for the plans."
        )
    import torch

    from refold.checkpoints import save
    from refold.files import check_writable
    from refold.unfolding import unfold

    if output is not None:
        check_writable(output)
    torch.manual_seed(seed)
    chosen_kinds: Any = kinds or None
    model = network_from(target, checkpoint, num_classes, model_args, pretrained=pretrained)
    wide: Any = unfold(
        model,
        plan,
        layers=layers or "*",
        exclude=exclude or (),
        kinds=chosen_kinds,
        stages=stages or None,
        branches=_counts(branches),
        start=start,
        example_input=example_for(model, input_size),
    )
    if output is not None:
        save(wide, output)
    if as_json:
        sizes = {"parameters_before": _parameters(model), "parameters": _parameters(wide)}
        print(json.dumps({"model": target, **sizes, **wide.unfold_report.to_dict()}, indent=2))
        return
    console.print(_layer_table(f"{target} with the plan {wide.unfold_report.plan}", model, wide))
    if output is not None:
        console.print(f"Unfolded checkpoint: {escape(str(output))}", soft_wrap=True)


def _counts(given: list[str] | None) -> int | dict[str, int] | None:
    """What `branches` of `refold.unfold` is for these options."""
    counts: dict[str, int] = {}
    for text in given or ():
        pattern, _, number = text.rpartition("=")
        if not number.isdecimal():
            raise InputError(
                f"--branches '{text}' is not understood; give a number, or a pattern and a number: 'blocks.3.*=4'."
            )
        counts[pattern or "*"] = int(number)
    # The first pattern that matches counts, so the number for all comes last.
    return dict(sorted(counts.items(), key=lambda item: item[0] == "*")) or None


def _layer_table(title: str, model: nn.Module, wide: nn.Module) -> Table:
    report: UnfoldReport = wide.unfold_report  # type: ignore[assignment]  # an attribute that nn.Module does not know
    table = Table(title=title)
    table.add_column("layers")
    for heading in ("unfolded", "branches", "identities", "parameters", "with branches"):
        table.add_column(heading, justify="right")
    total_before, total_now, counted = _parameters(model), _parameters(wide), [0, 0]
    for kind in dict.fromkeys(layer.kind for layer in report.layers):
        members = [layer for layer in report.layers if layer.kind == kind]
        paths = [path for layer in members for path in (layer.path, layer.norm) if path is not None]
        before, now = (sum(_parameters(net.get_submodule(path)) for path in paths) for net in (model, wide))
        counted[0] += before
        counted[1] += now
        numbers = sorted({layer.branches + layer.skip for layer in members})
        shown = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
        skips = sum(layer.skip for layer in members)
        table.add_row(kind, str(len(members)), shown, str(skips), f"{before:,}", f"{now:,}")
    others = (total_before - counted[0], total_now - counted[1])
    table.add_row("all others", "", "", "", *(f"{number:,}" for number in others), end_section=True)
    table.add_row("", str(len(report.layers)), "", "", f"{total_before:,}", f"{total_now:,}")
    return table


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _print_plans(as_json: bool) -> None:
    import dataclasses

    from refold.unfolding import PLANS

    if as_json:
        print(json.dumps([dataclasses.asdict(plan) for plan in PLANS.values()], indent=2))
        return
    table = Table(title="Branches beside a k x k layer, whose own kernel is repeated", title_justify="left")
    for heading in ("plan", "kernels", "kind of layer", "further branches", "source"):
        table.add_column(heading)
    for plan in PLANS.values():
        for number, (kind, shapes) in enumerate(plan.rules.items()):
            first = (plan.name, str(plan.repeats)) if number == 0 else ("", "")
            table.add_row(*first, kind, "; ".join(shapes), plan.source if number == 0 else "")
        table.add_section()
    console.print(table)
