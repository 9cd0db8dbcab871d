"""The command `paper`: the tables and figures of the papers, measured here beside what is published."""

# Heavy imports are inside the command, so that --help and mistyped options answer at once.

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from refold.cli.shared import (
    AsJson,
    Engines,
    MachineName,
    MachineNote,
    Plots,
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

    With --accuracy its rows are trained instead, small networks on CIFAR-10 or on images of yours.
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
    if accuracy:
        if as_csv:
            raise InputError("Trained accuracies are no CSV; give --json or --markdown.")
        given = {key: value for key, value in of_training.items() if value is not None}
        _train_rows(
            name,
            given,
            (threads or [1])[0],
            only or (),
            output or (),
            "json" if as_json else "markdown" if as_markdown else "",
        )
        return
    if alone := [f"--{key}" for key, value in of_training.items() if value is not None]:
        raise InputError(f"{', '.join(alone)} is about training; add --accuracy, or leave it out.")
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


def _train_rows(
    name: str, given: dict[str, Any], threads: int, only: Sequence[str], output: Sequence[Path], form: str
) -> None:
    """Train the rows of an exhibit, write what is known after each run, and print it at the end."""
    from refold import replication
    from refold.replication.report import check_suffix
    from refold.training.recipe import parse_overrides

    for path in output:
        check_suffix(path)
    if "data" not in given:
        raise InputError("There is nothing to train on; give --data FOLDER, such as that of CIFAR-10.")
    training = replication.Training(
        given["data"],
        given.get("runs", Path("runs") / name.replace("/", "-")),
        seeds=given.get("seeds", 3),
        full=given.get("full", False),
        overrides=parse_overrides(given.get("set", [])),
        threads=threads,
        accelerator=given.get("accelerator", "auto"),
    )

    def write(found: replication.Replication) -> None:
        for path in output:
            replication.save(found, path)

    try:
        found = replication.replicate(
            name, training, error_console if form else console, only=only, on_run=write
        )
    except KeyboardInterrupt:
        print(f"refold: stopped; the same command goes on with the runs of {training.runs}.", file=sys.stderr)
        raise typer.Exit(130) from None
    write(found)
    if form == "json":
        print(json.dumps(replication.to_dict(found), indent=1))
    elif form:
        print(replication.to_markdown(found), end="")
    else:
        console.print(replication.to_rich(found))


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
