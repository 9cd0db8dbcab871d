"""The commands on networks: `list`, `profile`, `unfold`, `fold` and `verify`."""

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
    Checkpoints,
    InputSize,
    ModelArguments,
    NumClasses,
    Target,
    console,
    example_for,
    network_from,
    paired,
)
from refold.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from refold.folding import Cost, FoldReport


def list_command(
    pattern: Annotated[str, typer.Argument(help="A shell-style pattern such as 'repghost*'.")] = "",
    timm: Annotated[bool, typer.Option("--timm", help="Include the models of timm.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the names of models, one a line."""
    from refold.models import list_models

    names = list_models(pattern, include_timm=timm)
    if not names:
        hint = "" if timm else " or --timm to include timm's"
        wider = f"*{pattern.strip('*')}*"
        raise InputError(f"No model matches '{pattern}'; try a wider pattern such as '{wider}'{hint}.")
    print(json.dumps(names, indent=2) if as_json else "\n".join(names))


def profile(
    target: Target,
    checkpoint: Checkpoint = None,
    input_size: InputSize = None,
    num_classes: NumClasses = None,
    model_args: ModelArguments = None,
    as_json: AsJson = False,
) -> None:
    """Show what one image costs: the training form beside the plain form."""
    from refold.folding import count, fold

    model = network_from(target, checkpoint, num_classes, model_args)
    example = example_for(model, input_size)
    if hasattr(model, "fold_report"):
        costs = {"plain": count(model, example)}
    else:
        plain = fold(model, example, prove=False)
        costs = {"training form": count(model, example), "plain": count(plain, example)}
    size = _size(example)
    if as_json:
        described = {form: cost.to_dict() for form, cost in costs.items()}
        print(json.dumps({"model": target, "input_size": size, **described}, indent=2))
    else:
        what = "inputs of" if isinstance(example, tuple) else "one image"
        console.print(_cost_table(f"{target}, {what} {' x '.join(map(str, size))}", costs))


def _size(example: Any) -> list[Any]:
    """The axes of an image, or of each of several inputs, without the batch."""
    if isinstance(example, tuple):
        return [list(value.shape[1:]) for value in example]
    return list(example.shape[1:])


def fold_command(
    target: Target,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="The plain checkpoint to write (.safetensors); for an ONNX file another."
        ),
    ],
    report: Annotated[Path | None, typer.Option("--report", help="Also write the report as JSON.")] = None,
    picture: Annotated[
        Path | None,
        typer.Option("--picture", help="Also draw what became what, block by block (.svg or .html)."),
    ] = None,
    original: Annotated[
        bool,
        typer.Option(
            "--original",
            help="Take away what refold unfold added and nothing else: the weights of the original class.",
        ),
    ] = False,
    objective: Annotated[
        Literal["macs", "operators", "latency"],
        typer.Option(
            help="macs: never more multiply-accumulates; operators: those of depthwise kernels may grow; "
            "latency: keep of all exact rewrites what a measurement on --engine says pays."
        ),
    ] = "macs",
    engine: Annotated[
        str | None,
        typer.Option(
            "--engine",
            help="For --objective latency: pytorch or an engine of export.",
            show_default="onnxruntime",
        ),
    ] = None,
    threads: Annotated[
        int, typer.Option("--threads", min=1, help="For --objective latency: threads of the engine.")
    ] = 1,
    shortcuts: Annotated[
        Literal["keep", "fold"],
        typer.Option(help="fold: take shortcuts into the convolutions around, at more cost."),
    ] = "keep",
    checkpoint: Checkpoint = None,
    input_size: InputSize = None,
    num_classes: NumClasses = None,
    model_args: ModelArguments = None,
) -> None:
    """Fold a network into its plain form, prove it, and write the plain checkpoint."""
    from refold.files import check_writable, write_text
    from refold.onnx_files import is_onnx_file
    from refold.picture import check_picture, save_picture

    for path in (output, report):
        if path is not None:
            check_writable(path)
    if picture is not None:
        check_picture(picture)
    if objective != "latency" and engine is not None:
        raise InputError(f"--engine is {engine}; it is for --objective latency alone, which measures on it.")
    if original and (report or picture or (objective, shortcuts) != ("macs", "keep")):
        raise InputError(
            "--original folds branches only; leave --report, --picture, --objective and --shortcuts out."
        )
    if is_onnx_file(target):
        if original:
            raise InputError(
                "--original is for checkpoints of refold unfold, not for ONNX files; leave it out."
            )
        from refold.onnx_files.saving import check_onnx

        check_onnx(output)
    model = network_from(target, checkpoint, num_classes, model_args)
    example = example_for(model, input_size)
    if original:
        _save_original(target, model, example, output)
        return
    with console.status("folding") as status:
        chosen: Any = objective
        if objective == "latency":
            from refold.bench.objective import Latency

            tell = lambda text: status.update(f"measuring {escape(text)}")  # noqa: E731
            chosen = Latency(engine or "onnxruntime", threads=threads, on_progress=tell)
        account, title = _folded(model, example, output, chosen, shortcuts)
    console.print(account)
    what = "Plain file" if is_onnx_file(target) else "Plain checkpoint"
    console.print(f"{what}: {escape(str(output))}", soft_wrap=True)
    if report is not None:
        write_text(report, account.to_json())
        console.print(f"Report: {escape(str(report))}", soft_wrap=True)
    if picture is not None:
        save_picture(account, picture, title=title)
        console.print(f"Picture: {escape(str(picture))}", soft_wrap=True)


def _folded(
    model: nn.Module, example: Any, output: Path, objective: Any, shortcuts: Literal["keep", "fold"]
) -> tuple[FoldReport, str | None]:
    """Fold a network, write it as what it came from, a checkpoint or an ONNX file; the report and the name."""
    from refold.onnx_files import is_onnx_network

    if is_onnx_network(model):
        from refold.onnx_files.folding import fold_onnx

        found: FoldReport = fold_onnx(model, output, example, objective=objective, shortcuts=shortcuts)
        return found, found.model
    from refold.checkpoints import save
    from refold.folding import fold

    plain: Any = fold(model, example, objective=objective, shortcuts=shortcuts)
    save(plain, output)
    return plain.fold_report, (getattr(plain, "architecture", None) or {}).get("name")


def _save_original(target: str, model: nn.Module, example: Tensor, output: Path) -> None:
    from refold.checkpoints import save
    from refold.folding import verify as verify_networks
    from refold.targets import original_network

    back = original_network(target, model)
    proof = verify_networks(model, back, example)
    save(back, output)
    name: Any = getattr(back, "architecture", None) or {"name": target}
    console.print(f"{name['name']} computes the same without the branches, to {proof.distance_float64:.0e}")
    console.print(f"Checkpoint with the names of its class: {escape(str(output))}", soft_wrap=True)


def verify(
    reference: Annotated[str, typer.Argument(metavar=MODEL, help=MODEL_HELP)],
    candidate: Annotated[str, typer.Argument(metavar=MODEL, help="The model to compare with it.")],
    checkpoint: Checkpoints = None,
    input_size: InputSize = None,
    model_args: ModelArguments = None,
    as_json: AsJson = False,
) -> None:
    """Prove that two networks compute the same function; exit code 2 where they do not."""
    from refold.folding import verify as verify_networks
    from refold.targets import distinct_names

    targets = (reference, candidate)
    weights = paired(targets, checkpoint)
    first, second = (
        network_from(target, file, model_args=model_args)
        for target, file in zip(targets, weights, strict=True)
    )
    proof = verify_networks(first, second, example_for(first, input_size))
    if as_json:
        print(json.dumps(proof.to_dict(), indent=2))
        return
    names = distinct_names(targets, weights)
    title = f"{' and '.join(map(escape, names))} compute the same"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    table.add_column("distance", justify="right")
    table.add_row("both in float64", f"{proof.distance_float64:.1e}")
    for name, distance in (
        (names[0], proof.original_distance),
        (names[1], proof.folded_distance),
    ):
        if distance is not None:
            table.add_row(f"{escape(name)} in its own dtype, from float64", f"{distance:.1e}")
    console.print(table)


def _cost_table(title: str, costs: dict[str, Cost]) -> Table:
    table = Table(title=title)
    table.add_column("")
    for form in costs:
        table.add_column(form, justify="right")
    table.add_row("parameters", *(f"{cost.parameters:,}" for cost in costs.values()))
    table.add_row("multiply-accumulates", *(f"{cost.macs:,}" for cost in costs.values()))
    table.add_row(
        "multiplications, 3x3 as Winograd", *(f"{cost.winograd_multiplications:,}" for cost in costs.values())
    )
    table.add_row("activations", *(f"{cost.activations:,}" for cost in costs.values()))
    table.add_row("operators", *(f"{cost.operator_count:,}" for cost in costs.values()), end_section=True)
    kinds = dict.fromkeys(kind for cost in costs.values() for kind in cost.operators)
    for kind in kinds:
        table.add_row(kind, *(str(cost.operators.get(kind, 0)) for cost in costs.values()))
    return table


def push_command(
    checkpoint: Annotated[
        Path,
        typer.Argument(metavar="FILE|RUN", help="A file of refold.save, or a run's folder: its plain form."),
    ],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Where on the Hugging Face hub.")],
    private: Annotated[bool, typer.Option("--private", help="Let nobody else see it.")] = False,
) -> None:
    """Publish a network with its model card; refold.load("hf-hub:OWNER/NAME") and predict take it from there."""
    from refold.hub import push
    from refold.targets import weights_file

    file = weights_file(str(checkpoint), "plain") or checkpoint
    console.print(push(file, repository, private=private), markup=False, soft_wrap=True)
