"""The commands on inference engines: `export` and `bench`."""

# Heavy imports are inside the commands, so that --help and mistyped options answer at once.

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape
from rich.table import Table

from refold.cli.shared import (
    MODEL,
    MODEL_HELP,
    AsJson,
    Checkpoint,
    Checkpoints,
    Device,
    Engines,
    Executions,
    InputSize,
    MachineName,
    MachineNote,
    MemoryFormats,
    ModelArguments,
    NumClasses,
    Plots,
    Precisions,
    Rounds,
    Target,
    ThreadCounts,
    TimeLimit,
    WarmUp,
    console,
    error_console,
    example_for,
    network_from,
    paired,
    parse_size,
    say,
)
from refold.errors import InputError
from refold.export import FORMATS, export, get_engine

if TYPE_CHECKING:
    from torch import nn

    from refold.export import ExportReport, Normalization


def export_command(
    target: Target,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write, such as net.onnx.")],
    engine: Annotated[
        str, typer.Option("--engine", help=f"The inference engine: {', '.join(FORMATS)}.")
    ] = "onnxruntime",
    keep_branches: Annotated[
        bool, typer.Option("--no-fold", help="Export the branches as they are.")
    ] = False,
    fixed_batch: Annotated[bool, typer.Option("--fixed-batch", help="Fix the batch size to one.")] = False,
    half: Annotated[bool, typer.Option("--half", help="float16 inside; inputs and outputs stay.")] = False,
    normalize: Annotated[
        bool, typer.Option("--normalize", help="Bake in the mean and std that the model names.")
    ] = False,
    mean: Annotated[
        str | None, typer.Option("--mean", help="Bake in this mean, such as 0.485,0.456,0.406.")
    ] = None,
    std: Annotated[str | None, typer.Option("--std", help="The standard deviation to go with it.")] = None,
    softmax: Annotated[bool, typer.Option("--softmax", help="Give probabilities, not logits.")] = False,
    detections: Annotated[
        bool,
        typer.Option(
            "--detections", help="A detector's boxes, scores, labels, masks and image_index, not its maps."
        ),
    ] = False,
    dynamic_size: Annotated[
        bool, typer.Option("--dynamic-size", help="Take images of any height and width.")
    ] = False,
    class_names: Annotated[
        Path | None, typer.Option("--class-names", help="A text file of class names, one a line.")
    ] = None,
    checkpoint: Checkpoint = None,
    input_size: InputSize = None,
    num_classes: NumClasses = None,
    model_args: ModelArguments = None,
    as_json: AsJson = False,
) -> None:
    """Export a network for an inference engine, folded first, and check the file by running it."""
    get_engine(engine)
    from refold.export.placing import check_destination

    check_destination(output, FORMATS[engine])
    normalization = _parse_normalization(mean, std)
    names = None if class_names is None else _read_lines(class_names)
    form: Literal["training", "plain"] = "training" if keep_branches else "plain"
    model = network_from(target, checkpoint, num_classes, model_args, form=form)
    result = export(
        model,
        output,
        example_for(model, input_size),
        engine=engine,
        dynamic_batch=not fixed_batch,
        half=half,
        normalize=normalize if normalization is None else normalization,
        softmax=softmax,
        class_names=names,
        detections=detections,
        dynamic_size=dynamic_size,
        fold=not keep_branches,
    )
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
        return
    table = Table.grid(padding=(0, 2))
    table.add_row("file", f"{escape(result.path)} ({result.bytes / 1e6:.2f} MB)")
    table.add_row("form", f"{result.form}{', float16' if result.half else ''}")
    if result.contents.operators:
        kinds = result.contents.operators.items()
        table.add_row("operators", ", ".join(f"{n} {kind}" for kind, n in kinds))
    for note in result.notes:
        table.add_row("note", escape(note))
    console.print(table)
    if result.checked:
        console.print(_trial_table(result))


def _trial_table(report: ExportReport) -> Table:
    table = Table(
        title=f"{FORMATS[report.engine].title} beside PyTorch", title_justify="left", caption_justify="left"
    )
    table.caption = f"spread of the outputs {report.spread:.3g}; {report.tolerance:.0e} of it is allowed"
    table.add_column("inputs")
    for title in ("batch", "max |Δ|", "of the spread", "same top-1"):
        table.add_column(title, justify="right")
    for trial in report.trials:
        table.add_row(
            trial.inputs,
            str(trial.batch_size),
            f"{trial.max_difference:.1e}",
            f"{trial.relative_difference:.1e}",
            "" if trial.same_top1 is None else f"{trial.same_top1} of {trial.batch_size}",
        )
    return table


def _parse_normalization(mean: str | None, std: str | None) -> Normalization | None:
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise InputError("--mean and --std go together; give both.")
    try:
        return [float(value) for value in mean.split(",")], [float(value) for value in std.split(",")]
    except ValueError as error:
        raise InputError(
            f"The normalization '{mean}' and '{std}' is not understood; give numbers such as 0.485,0.456,0.406."
        ) from error


def _read_lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The class names '{path}' cannot be read: {error}.") from error


def bench(
    targets: Annotated[
        list[str] | None,
        typer.Argument(metavar=MODEL, help=MODEL_HELP),
    ] = None,
    form: Annotated[
        list[str] | None,
        typer.Option(
            "--form", help="training, plain or shortcut-folded; repeat it.", show_default="first two"
        ),
    ] = None,
    engine: Engines = None,
    batch_size: Annotated[
        list[int] | None, typer.Option("--batch-size", help="Images a call; repeat it.", show_default="1")
    ] = None,
    threads: ThreadCounts = None,
    precision: Precisions = None,
    device: Device = "cpu",
    execution: Executions = None,
    memory_format: MemoryFormats = None,
    checkpoint: Checkpoints = None,
    input_size: InputSize = None,
    model_args: ModelArguments = None,
    rounds: Rounds = 30,
    warm_up: WarmUp = 5,
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline",
            help="What ratios refer to: a model, form, engine, precision or execution, or several: ghostnet_100,plain.",
            show_default="training",
        ),
    ] = None,
    breakdown: Annotated[
        bool, typer.Option("--breakdown", help="Add the time by kind of operator, where the engine tells.")
    ] = False,
    roofline: Annotated[
        bool,
        typer.Option("--roofline", help="Measure the machine's roofs, and each model's distance from them."),
    ] = False,
    output: Annotated[
        list[Path] | None,
        typer.Option("--output", "-o", help="A .json (kept as the run goes), .csv or .md file; repeat it."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Measure only what the .json output does not hold yet.")
    ] = False,
    merge: Annotated[
        list[Path] | None,
        typer.Option("--merge", help="Add an earlier .json, of this or another machine; repeat it."),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", help="Write one page with plots and tables that needs nothing else."),
    ] = None,
    plots: Plots = None,
    accuracy: Annotated[
        Path | None, typer.Option("--accuracies", help="Accuracies by model name, as CSV or JSON.")
    ] = None,
    machine: MachineName = None,
    note: MachineNote = "",
    time_limit: TimeLimit = 120.0,
    as_json: AsJson = False,
) -> None:
    """Measure models side by side: forms, engines, batch sizes and threads, taking turns."""
    from refold.bench.command import BenchmarkOptions, run
    from refold.bench.runner import BenchmarkInterrupted
    from refold.bench.tables import to_rich

    models = _models(targets or [], checkpoint, model_args)
    size = None if not models else parse_size(input_size, next(iter(models.values())))
    for model in models.values():
        example_for(model, input_size)  # a size that one of them does not take is said before any is measured
    measuring = {
        "forms": form or ["training", "plain"],
        "engine": engine or ["onnxruntime"],
        "batch_sizes": batch_size or [1],
        "threads": threads or [1],
        "precisions": precision or ["float32"],
        "device": device,
        "executions": execution or ["eager"],
        "memory_formats": memory_format or ["channels_first"],
        "input_size": size,
        "rounds": rounds,
        "warm_up": warm_up,
        "breakdown": breakdown,
        "roofline": roofline,
        "machine": machine,
        "note": note,
        "time_limit": time_limit,
    }
    options = BenchmarkOptions(
        output or [], merge or [], accuracy, baseline, resume, html=html, plots=plots, measuring=measuring
    )
    try:
        result = run(models, options, error_console if as_json else console)
    except BenchmarkInterrupted as stopped:
        console.print(to_rich(stopped.result))
        kept = [str(path) for path in output or () if path.suffix.lower() == ".json"]
        advice = (
            f"{kept[0]} holds what was measured, --resume goes on" if kept else "no .json output was given"
        )
        print(f"refold: stopped; {advice}.", file=sys.stderr)
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps(result.to_dict(), indent=1))
    else:
        console.print(to_rich(result))


def _models(
    targets: list[str], checkpoints: list[Path] | None, model_args: list[str] | None
) -> dict[str, nn.Module]:
    """The models by the names to show; one that is given twice is measured once, which is said."""
    from refold.targets import distinct_names

    models: dict[str, nn.Module] = {}
    files = paired(targets, checkpoints)
    for name, target, file in zip(distinct_names(targets, files), targets, files, strict=True):
        if name in models:
            say(f"'{target}' is given twice and measured once.")
        else:
            models[name] = network_from(target, file, model_args=model_args)
    return models
