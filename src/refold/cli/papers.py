"""The command `paper`: the tables and figures of the papers, measured here beside what is published."""

# Heavy imports are inside the command, so that --help and mistyped options answer at once.

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from refold.cli.shared import (
    AsJson,
    Device,
    Engines,
    Executions,
    MachineName,
    MachineNote,
    MemoryFormats,
    Plots,
    Precisions,
    Rounds,
    ThreadCounts,
    TimeLimit,
    WarmUp,
    console,
    error_console,
)
from refold.errors import InputError

if TYPE_CHECKING:
    from refold.bench.papers import Exhibit


def paper_command(
    name: Annotated[
        str, typer.Argument(metavar="list|PAPER/NUMBER", help="list, or a table such as repghost/table-4.")
    ],
    no_latency: Annotated[bool, typer.Option("--no-latency", help="Sizes and costs only.")] = False,
    engine: Engines = None,
    precision: Precisions = None,
    device: Device = "cpu",
    execution: Executions = None,
    memory_format: MemoryFormats = None,
    threads: ThreadCounts = None,
    largest_batch: Annotated[
        int | None,
        typer.Option("--largest-batch", help="Measure larger batches of the paper with this size."),
    ] = None,
    rounds: Rounds = 30,
    warm_up: WarmUp = 5,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", help="Rows or networks to measure, such as 'repghostnet*'; repeat it."),
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(
            "--results", help="A .json of refold bench, kept as the run goes; what it holds is not measured."
        ),
    ] = None,
    output: Annotated[
        list[Path] | None, typer.Option("--output", "-o", help="A .json, .csv or .md file; repeat it.")
    ] = None,
    plots: Plots = None,
    accuracies: Annotated[
        Path | None,
        typer.Option("--accuracies", help="Accuracies of what was trained here, by network, as CSV or JSON."),
    ] = None,
    accuracy: Annotated[
        bool,
        typer.Option(
            "--accuracy",
            help="Train the rows in place of measuring them, and say which of the paper's relations hold.",
        ),
    ] = False,
    data: Annotated[
        str | None, typer.Option("--data", help="With --accuracy: the images, as refold train takes them.")
    ] = None,
    runs: Annotated[
        Path | None,
        typer.Option("--runs", help="With --accuracy: the folder of its runs.", show_default="runs/NAME"),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option("--seeds", help="With --accuracy: runs a row.", show_default="3")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="With --accuracy: a value of all rows' recipe; repeatable."
        ),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="With --accuracy: the paper's own networks, by its recipe.")
    ] = False,
    pretrained: Annotated[
        Path | None,
        typer.Option(
            "--pretrained",
            metavar="FOLDER",
            help="Fetch the published weights, and ask them about ImageNet's photos, one folder a class.",
        ),
    ] = None,
    accelerator: Annotated[
        str | None, typer.Option("--accelerator", help="With --accuracy: auto, cpu, gpu or mps.")
    ] = None,
    machine: MachineName = None,
    note: MachineNote = "",
    time_limit: TimeLimit = 120.0,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, a line for each value.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """Measure a table or figure of the papers and print it beside the published values; list names them.

    With --accuracy its rows are trained instead, small networks on CIFAR-10 or on images of yours; with --pretrained
    their published weights are asked about ImageNet's photos.
    """
    from refold.bench.papers import find_exhibit, list_papers

    if as_json + as_csv + as_markdown > 1:
        raise InputError("--json, --csv and --markdown exclude each other; give one.")
    if name == "list":
        _print_list(list_papers(), as_json)
        return
    find_exhibit(name)  # before what takes seconds to import
    of_training = {
        "data": data, "runs": runs, "seeds": seeds, "set": overrides, "full": full or None, "accelerator": accelerator,
    }  # fmt: skip
    stated = {key: value for key, value in of_training.items() if value is not None}
    if stated and not accuracy:
        options = ", ".join(f"--{key}" for key in stated)
        raise InputError(f"{options} is about training; add --accuracy, or leave it out.")
    if accuracy or pretrained is not None:
        from refold.cli.accuracies import evaluate_rows, train_rows

        if as_csv or (accuracy and pretrained is not None):
            raise InputError(
                "--accuracy, --pretrained and --csv exclude each other; give --json or --markdown for a file."
            )
        form = "json" if as_json else "markdown" if as_markdown else ""
        if accuracy:
            train_rows(name, stated, (threads or [1])[0], only or (), output or (), form)
        elif pretrained is not None:
            evaluate_rows(name, pretrained, only or (), output or (), form)
        return
    from refold.bench import papers
    from refold.bench.command import progress
    from refold.bench.results import read_accuracies
    from refold.bench.tables import check_suffix
    from refold.files import check_writable

    for path in output or ():
        check_suffix(check_writable(path))
    trained = {} if accuracies is None else read_accuracies(accuracies)
    is_plain = as_json or as_csv or as_markdown
    try:
        with progress(error_console if is_plain else console) as on_progress:
            table = papers.paper(
                name,
                latency=not no_latency,
                engine=engine or "onnxruntime",
                precisions=precision or ["float32"],
                device=device,
                executions=execution or ["eager"],
                memory_formats=memory_format or ["channels_first"],
                threads=threads or [1],
                largest_batch=largest_batch,
                rounds=rounds,
                warm_up=warm_up,
                only=only or (),
                results=results,
                accuracies=trained,
                machine=machine,
                note=note,
                time_limit=time_limit,
                on_progress=on_progress,
            )
    except KeyboardInterrupt:
        advice = "no --results were kept" if results is None else f"the same command goes on with {results}"
        print(f"refold: stopped; {advice}.", file=sys.stderr)
        raise typer.Exit(130) from None
    for path in output or ():
        papers.save_paper_table(table, path)
    if plots is not None:
        papers.save_paper_plots(table, plots)
    if as_json:
        print(json.dumps(papers.to_dict(table), indent=1))
    elif is_plain:
        print((papers.to_csv if as_csv else papers.to_markdown)(table), end="")
    else:
        console.print(papers.to_rich(table))


def _print_list(exhibits: list[Exhibit], as_json: bool) -> None:
    if as_json:
        described = [
            {
                "name": exhibit.name,
                "paper": exhibit.paper.title,
                "number": exhibit.number,
                "title": exhibit.title,
                "measures": exhibit.measures,
            }
            for exhibit in exhibits
        ]
        print(json.dumps(described, indent=2))
        return
    table = Table()
    for heading in ("name", "what it shows", "what is measured"):
        table.add_column(heading, overflow="fold")
    paper = None
    for exhibit in exhibits:
        if exhibit.paper != paper:
            paper = exhibit.paper
            table.add_section()
            table.add_row("", f"[bold]{escape(paper.title)}[/] ({escape(paper.authors)})", "")
        table.add_row(exhibit.name, escape(exhibit.title), ", ".join(exhibit.measures))
    console.print(table)
