"""The command ``refold``: parse, call, print."""

# Heavy imports are inside the commands, so that --help and mistyped options answer at once.

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from refold.errors import InputError, RefoldError
from refold.export import FORMATS, export, get_engine

if TYPE_CHECKING:
    from torch import nn

    from refold.export import ExportReport, Normalization
    from refold.folding import Cost

app = typer.Typer(
    help="Convolutional networks that train with many branches and run with one.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
console = Console()

_CHECKPOINT_SUFFIXES = {".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".tar"}

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


def main() -> None:
    """Run the command line; every error of refold's is one line on stderr and exit code 2."""
    try:
        app()
    except RefoldError as error:
        print("refold:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from importlib.metadata import version as installed

        print(f"refold {installed('refold')}")
        raise typer.Exit


@app.command("list")
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


@app.command()
def profile(
    target: Target,
    checkpoint: Checkpoint = None,
    input_size: InputSize = None,
    num_classes: NumClasses = None,
    as_json: AsJson = False,
) -> None:
    """Show what one image costs: the training form beside the plain form."""
    from refold.checkpoints import example_input
    from refold.folding import count, fold

    model = _network(target, checkpoint, num_classes)
    example = example_input(model, _parse_size(input_size, model))
    if hasattr(model, "fold_report"):
        costs = {"plain": count(model, example)}
    else:
        plain = fold(model, example, prove=False)
        costs = {"training form": count(model, example), "plain": count(plain, example)}
    size = list(example.shape[1:])
    if as_json:
        described = {form: cost.to_dict() for form, cost in costs.items()}
        print(json.dumps({"model": target, "input_size": size, **described}, indent=2))
    else:
        console.print(_cost_table(f"{target}, one image {' x '.join(map(str, size))}", costs))


@app.command("fold")
def fold_command(
    target: Target,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The plain checkpoint to write (.safetensors).")
    ],
    report: Annotated[Path | None, typer.Option("--report", help="Also write the report as JSON.")] = None,
    objective: Annotated[
        Literal["macs", "operators"],
        typer.Option(
            help="macs: never more multiply-accumulates; operators: those of depthwise kernels may grow."
        ),
    ] = "macs",
    shortcuts: Annotated[
        Literal["keep", "fold"],
        typer.Option(help="fold: take shortcuts into the convolutions around, at more cost."),
    ] = "keep",
    checkpoint: Checkpoint = None,
    input_size: InputSize = None,
    num_classes: NumClasses = None,
) -> None:
    """Fold a network into its plain form, prove it, and write the plain checkpoint."""
    from refold.checkpoints import example_input, save
    from refold.files import check_writable, write_text
    from refold.folding import fold

    for path in (output, report):
        if path is not None:
            check_writable(path)
    model = _network(target, checkpoint, num_classes)
    example = example_input(model, _parse_size(input_size, model))
    plain: Any = fold(model, example, objective=objective, shortcuts=shortcuts)
    console.print(plain.fold_report)
    save(plain, output)
    console.print(f"Plain checkpoint: {escape(str(output))}", soft_wrap=True)
    if report is not None:
        write_text(report, plain.fold_report.to_json())
        console.print(f"Report: {escape(str(report))}", soft_wrap=True)


@app.command()
def verify(
    reference: Annotated[Path, typer.Argument(help="A checkpoint of refold.save, in either form.")],
    candidate: Annotated[Path, typer.Argument(help="The checkpoint to compare with it.")],
    input_size: InputSize = None,
    as_json: AsJson = False,
) -> None:
    """Prove that two checkpoints compute the same function; exit code 2 where they do not."""
    from refold.checkpoints import example_input, load
    from refold.folding import verify as verify_networks

    first, second = load(reference), load(candidate)
    proof = verify_networks(first, second, example_input(first, _parse_size(input_size, first)))
    if as_json:
        print(json.dumps(proof.to_dict(), indent=2))
        return
    table = Table(title=f"{reference.name} and {candidate.name} compute the same", title_justify="left")
    table.add_column("")
    table.add_column("distance", justify="right")
    table.add_row("both in float64", f"{proof.distance_float64:.1e}")
    for name, distance in (
        (reference.name, proof.original_distance),
        (candidate.name, proof.folded_distance),
    ):
        if distance is not None:
            table.add_row(f"{name} in its own dtype, from float64", f"{distance:.1e}")
    console.print(table)


@app.command("export")
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
    class_names: Annotated[
        Path | None, typer.Option("--class-names", help="A text file of class names, one a line.")
    ] = None,
    checkpoint: Checkpoint = None,
    input_size: InputSize = None,
    num_classes: NumClasses = None,
    as_json: AsJson = False,
) -> None:
    """Export a network for an inference engine, folded first, and check the file by running it."""
    get_engine(engine)
    from refold.checkpoints import example_input
    from refold.export.placing import check_destination

    check_destination(output, FORMATS[engine])
    normalization = _parse_normalization(mean, std)
    names = None if class_names is None else _read_lines(class_names)
    model = _network(target, checkpoint, num_classes)
    result = export(
        model,
        output,
        example_input(model, _parse_size(input_size, model)),
        engine=engine,
        dynamic_batch=not fixed_batch,
        half=half,
        normalize=normalize if normalization is None else normalization,
        softmax=softmax,
        class_names=names,
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
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The class names '{path}' cannot be read: {error}.") from error


@app.command()
def bench(
    targets: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME|CHECKPOINT]...", help="Model names, or files of refold.save."),
    ] = None,
    form: Annotated[
        list[str] | None,
        typer.Option("--form", help="training, plain or shortcut-folded; repeat it. [default: first two]"),
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            "--engine", help="pytorch, an engine of export, or all; repeat it. [default: onnxruntime]"
        ),
    ] = None,
    batch_size: Annotated[
        list[int] | None, typer.Option("--batch-size", help="Images a call; repeat it. [default: 1]")
    ] = None,
    threads: Annotated[
        list[int] | None, typer.Option("--threads", help="Threads of the engine; repeat it. [default: 1]")
    ] = None,
    input_size: InputSize = None,
    rounds: Annotated[int, typer.Option("--rounds", help="Rounds in which each takes a turn.")] = 30,
    warm_up: Annotated[int, typer.Option("--warm-up", help="Rounds before them that do not count.")] = 5,
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline",
            help="What ratios refer to: a model, form or engine, or several: ghostnet_100,plain. "
            "[default: training]",
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
    plots: Annotated[
        Path | None, typer.Option("--plots", help="A folder for every plot as PNG and as SVG.")
    ] = None,
    accuracy: Annotated[
        Path | None, typer.Option("--accuracy", help="Accuracies by model name, as CSV or JSON.")
    ] = None,
    machine: Annotated[
        str | None, typer.Option("--machine", help="The name of this machine. [default: its processor's]")
    ] = None,
    note: Annotated[str, typer.Option("--note", help="Kept with the machine's facts.")] = "",
    time_limit: Annotated[
        float, typer.Option("--time-limit", help="Seconds after which a silent engine is given up.")
    ] = 120.0,
    as_json: AsJson = False,
) -> None:
    """Measure models side by side: forms, engines, batch sizes and threads, taking turns."""
    from refold.bench.command import Settings, run
    from refold.bench.runner import BenchmarkInterrupted

    models: dict[str, nn.Module] = {}
    for target in targets or ():
        is_file = Path(target).suffix in _CHECKPOINT_SUFFIXES
        models[Path(target).stem if is_file else target] = _network(target, None, None)
    size = None if not models else _parse_size(input_size, next(iter(models.values())))
    measuring = {
        "forms": form or ["training", "plain"],
        "engine": engine or ["onnxruntime"],
        "batch_sizes": batch_size or [1],
        "threads": threads or [1],
        "input_size": size,
        "rounds": rounds,
        "warm_up": warm_up,
        "breakdown": breakdown,
        "roofline": roofline,
        "machine": machine,
        "note": note,
        "time_limit": time_limit,
    }
    settings = Settings(
        output or [], merge or [], accuracy, baseline, resume, html=html, plots=plots, measuring=measuring
    )
    try:
        result = run(models, settings, Console(stderr=True) if as_json else console)
    except BenchmarkInterrupted as stopped:
        console.print(stopped.result)
        kept = [str(path) for path in output or () if path.suffix.lower() == ".json"]
        advice = (
            f"{kept[0]} holds what was measured, --resume goes on" if kept else "no .json output was given"
        )
        print(f"refold: stopped; {advice}.", file=sys.stderr)
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps(result.to_dict(), indent=1))
    else:
        console.print(result)


@app.command()
def quickstart(
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Your own images, one folder a class, instead of the digits."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The run's folder [default: runs/quickstart-TIME].")
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="[default: what fits the data]")] = None,
    image_size: Annotated[int, typer.Option("--image-size", help="Side of the images in pixels.")] = 48,
    threads: Annotated[
        int, typer.Option("--threads", help="PyTorch threads; a small network gains little from more.")
    ] = 1,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the weights, the split and the training.")] = 0,
) -> None:
    """Train a multi-branch network, fold it, prove it, export it, and compare the forms in one table."""
    from refold.quickstart import Settings, default_output, render, render_files, run

    folder = output or default_output()
    try:
        result = run(Settings(folder, data, epochs, image_size, seed, threads), console)
    except KeyboardInterrupt:
        kept = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        left = f"; {folder} holds {', '.join(kept)}" if kept else ""
        print(f"refold: stopped{left}.", file=sys.stderr)
        raise typer.Exit(130) from None
    console.print(render(result))
    console.print(render_files(result), soft_wrap=True)


DataOption = Annotated[
    str | None,
    typer.Option(
        "--data", help="digits, a folder with one folder of images a class, or CIFAR as distributed."
    ),
]
RunOutput = Annotated[
    Path | None, typer.Option("--output", "-o", help="The run's folder [default: runs/COMMAND-TIME].")
]
NetworkOption = Annotated[str, typer.Option("--network", help="The network to train, any model name.")]
RecipeOption = Annotated[str, typer.Option("--recipe", help="A recipe's name, or a YAML file.")]
RecipeSettings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A value of the recipe, such as epochs=30; repeatable."),
]
StartFrom = Annotated[Path | None, typer.Option("--checkpoint", help="Weights of the network to start from.")]
UnfoldPlan = Annotated[
    str | None, typer.Option("--unfold", metavar="PLAN", help="Train with the branches of this plan.")
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the weights, the split and the training.")]
Workers = Annotated[int, typer.Option("--workers", min=0, help="Processes that prepare images.")]
Threads = Annotated[int, typer.Option("--threads", min=1, help="PyTorch threads.")]
Accelerator = Annotated[str, typer.Option("--accelerator", help="auto, cpu, gpu or mps.")]
Precision = Annotated[str, typer.Option("--precision", help="32-true, bf16-mixed or 16-mixed.")]
Accumulate = Annotated[int, typer.Option("--accumulate", min=1, help="Batches that make one step.")]
UnreadableLimit = Annotated[
    int, typer.Option("--unreadable", min=0, help="Images that may be unreadable before it is an error.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and stop.")]


@app.command("train")
def train_command(
    data: DataOption = None,
    network: NetworkOption = "repghostnet_050",
    recipe: RecipeOption = "finetune",
    settings: RecipeSettings = None,
    output: RunOutput = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", help="Go on with the run of this folder, as it was started.")
    ] = None,
    checkpoint: StartFrom = None,
    unfold: UnfoldPlan = None,
    seed: Seed = 0,
    workers: Workers = 0,
    threads: Threads = 1,
    accelerator: Accelerator = "auto",
    precision: Precision = "32-true",
    accumulate: Accumulate = 1,
    unreadable: UnreadableLimit = 10,
    dry_run: DryRun = False,
) -> None:
    """Train a network on images, fold it, prove it, save it and export it; --resume goes on after a stop."""
    _train("train", **locals())


@app.command("distill")
def distill_command(
    teacher: Annotated[
        str,
        typer.Option("--teacher", help="A model name, whose published weights are taken, or a checkpoint."),
    ],
    data: DataOption = None,
    network: NetworkOption = "repghostnet_050",
    teacher_checkpoint: Annotated[
        Path | None, typer.Option("--teacher-checkpoint", help="Weights for the teacher's model name.")
    ] = None,
    recipe: RecipeOption = "finetune",
    settings: RecipeSettings = None,
    output: RunOutput = None,
    checkpoint: StartFrom = None,
    unfold: UnfoldPlan = None,
    seed: Seed = 0,
    workers: Workers = 0,
    threads: Threads = 1,
    accelerator: Accelerator = "auto",
    precision: Precision = "32-true",
    accumulate: Accumulate = 1,
    unreadable: UnreadableLimit = 10,
    dry_run: DryRun = False,
) -> None:
    """Train a network to answer as a teacher does, beside the classes; else the same as train."""
    _train("distill", resume=None, **locals())


def _train(
    command: str,
    *,
    data: str | None,
    recipe: str,
    settings: list[str] | None,
    output: Path | None,
    resume: Path | None,
    dry_run: bool,
    **others: Any,
) -> None:
    try:
        from refold.training.recipe import load_recipe, parse_overrides
        from refold.training.rendering import render_recipe, render_result
        from refold.training.run import Settings, default_output, train
        from refold.training.run import resume as go_on
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in {"lightning", "torchmetrics", "yaml"}:
            raise
        raise InputError(f"Training needs {missing}; install it: pip install 'refold[train]'.") from error

    resolved = load_recipe(recipe, parse_overrides(settings or []))
    if dry_run:
        console.print(render_recipe(resolved))
        return
    if resume is not None and (data or settings or output):
        raise InputError(
            "--resume goes on with a run as it was started; leave --data, --set and --output out."
        )
    if resume is None and data is None:
        raise InputError("There is nothing to train on; give --data digits, or --data FOLDER.")
    folder = resume or output or default_output(command)
    try:
        if resume is None:
            plain: dict[str, Any] = {
                key: str(value) if isinstance(value, Path) else value for key, value in others.items()
            }
            result = train(Settings(folder, data or "", recipe=resolved, **plain), console)
        else:
            result = go_on(resume, console)
    except KeyboardInterrupt:
        print(f"refold: stopped; go on with: refold train --resume {folder}", file=sys.stderr)
        raise typer.Exit(130) from None
    console.print(render_result(result, folder))


@app.command()
def predict(
    target: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT|ONNX|NAME",
            help="A file of refold.save, an ONNX file of a training run, or a model name.",
        ),
    ],
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", help="Image files, and folders of them.")
    ],
    top: Annotated[int, typer.Option("--top", min=1, help="How many classes.")] = 5,
    checkpoint: Checkpoint = None,
    num_classes: NumClasses = None,
    as_json: AsJson = False,
) -> None:
    """Name the likeliest classes of images; a model name without --checkpoint takes its published weights."""
    from refold.models import create_model
    from refold.training.predicting import find_images, network_classifier, onnx_classifier

    files = find_images(images)
    path = Path(target)
    if path.suffix == ".onnx":
        classifier = onnx_classifier(path)
    elif checkpoint is None and path.suffix not in _CHECKPOINT_SUFFIXES:
        classifier = network_classifier(create_model(target, pretrained=True, num_classes=num_classes))
    else:
        classifier = network_classifier(_network(target, checkpoint, num_classes))
    predictions = classifier.predict(files, top)
    if as_json:
        print(json.dumps([prediction.to_dict() for prediction in predictions], indent=2))
        return
    for prediction in predictions:
        if prediction.error is not None:
            print(f"refold: {prediction.error}", file=sys.stderr)
            continue
        shown = ", ".join(f"{name} {probability:.1%}" for name, probability in prediction.classes)
        print(f"{prediction.image}: {shown}")


def _network(target: str, checkpoint: Path | None, num_classes: int | None) -> nn.Module:
    """Load a checkpoint file, or create a named model and fill it from ``checkpoint``."""
    from refold.checkpoints import load
    from refold.models import create_model, load_checkpoint

    arguments: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    path = Path(target)
    if path.is_file() or path.suffix in _CHECKPOINT_SUFFIXES:
        if checkpoint is not None:
            raise InputError(f"'{target}' is a checkpoint already; leave --checkpoint out or name a model.")
        return load(path, **arguments)
    model = create_model(target, **arguments)
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model.eval()


def _parse_size(text: str | None, model: nn.Module) -> list[int] | None:
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


if __name__ == "__main__":
    main()
