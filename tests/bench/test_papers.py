"""The papers' tables: the published values are those of the papers, ours are counted and timed beside them."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import timm
import torch
from fakes import a_machine, configuration, row
from typer.testing import CliRunner

import refold
from refold.bench.papers import (
    PaperTable,
    find_exhibit,
    list_papers,
    paper,
    save_paper_plots,
    save_paper_table,
    to_csv,
    to_markdown,
)
from refold.bench.papers.measuring import count_size
from refold.bench.papers.networks import GhostOperators, build
from refold.bench.papers.published import SIZES, TIMES, Exhibit, PaperColumn, PaperForm
from refold.bench.papers.results import TimingSetup
from refold.bench.results import Benchmark
from refold.bench.subjects import FORMS
from refold.bench.timing import Timing
from refold.bench.ways import Way
from refold.blocks import GhostModule
from refold.cli import app
from refold.errors import InputError
from refold.models import create_model, list_models
from refold.training.recipe import load_recipe

PAPERS = Path(__file__).resolve().parents[2].parent / "shared" / "papers"
TEXTS = {
    "repvgg": "repvgg-report.txt",
    "ghostnets": "ghostnets-heterogeneous-devices.txt",
    "ghostnetv3": "ghostnetv3.txt",
    "repghost": "repghost.txt",
    "repnext": "repnext.txt",
}
REQUIRED = {
    "repvgg": ("figure-4", "figure-5", "figure-6"),
    "ghostnets": tuple(f"table-{number}" for number in (4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 18)),
    "ghostnetv3": ("table-9",),
    "repghost": ("table-1", "figure-2", *(f"table-{number}" for number in (4, 6, 8, 11, 12))),
    "repnext": tuple(f"table-{number}" for number in (2, 3, 4, 5, 6)),
}
EXHIBITS = list_papers()


def is_within(wanted: list[str], tokens: list[str]) -> bool:
    """Whether the wanted tokens occur in this order."""
    rest = iter(tokens)
    return all(token in rest for token in wanted)


def test_the_tables_of_all_five_papers_are_there() -> None:
    names = [exhibit.name for exhibit in EXHIBITS]
    assert {f"{key}/{number}" for key, numbers in REQUIRED.items() for number in numbers} <= set(names)
    assert len(names) == len(set(names))
    assert {exhibit.paper.key for exhibit in EXHIBITS} == set(TEXTS)
    assert [exhibit.name for exhibit in list_papers("repnext/*")] == [
        n for n in names if n.startswith("repnext/")
    ]
    assert set(get_args(PaperForm)) == set(FORMS)


@pytest.mark.parametrize("exhibit", EXHIBITS, ids=lambda exhibit: exhibit.name)
def test_every_value_is_a_number_with_a_unit_and_a_source(exhibit: Exhibit) -> None:
    assert exhibit.paper.title
    assert re.fullmatch(r"(table|figure) \d+|official repository", exhibit.number)
    assert exhibit.settings or not any(value for row in exhibit.rows for value in times(exhibit, row.values))
    known = set(list_models(include_timm=True))
    for line in exhibit.rows:
        assert all(re.fullmatch(r"\d+(\.\d+)?|", value) for value in line.values)
        if line.network is not None and "/" not in line.network:
            assert line.network in known


def times(exhibit: Exhibit, values: tuple[str, ...]) -> list[str]:
    return [values[place] for place, _ in exhibit.columns_of(*TIMES)]


@pytest.mark.parametrize("exhibit", EXHIBITS, ids=lambda exhibit: exhibit.name)
def test_the_values_are_those_of_the_paper(exhibit: Exhibit) -> None:
    if not PAPERS.is_dir():
        pytest.skip("the papers are not here")
    lines = (PAPERS / TEXTS[exhibit.paper.key]).read_text(encoding="utf-8").splitlines()
    tokens = [re.findall(r"\d+(?:\.\d+)?", line) for line in lines]
    for line in exhibit.rows:
        printed = [value for value in line.values if value]
        if printed and exhibit.number != "official repository":
            assert any(is_within(printed, found) for found in tokens), line


def test_what_rows_were_trained_with_can_be_asked_for() -> None:
    trained = [(exhibit, line) for exhibit in EXHIBITS for line in exhibit.rows if line.recipe is not None]
    assert {exhibit.name for exhibit, _ in trained} >= {
        f"ghostnetv3/table-{number}" for number in (3, 4, 6, 7, 8)
    }
    for exhibit, line in trained:
        assert load_recipe(exhibit.recipe, line.recipe, line.network or "").recipe
        assert line.teacher is None or timm.is_model(line.teacher)
    assert all(load_recipe(exhibit.recipe) for exhibit in EXHIBITS if exhibit.recipe)
    printed = to_markdown(paper("ghostnetv3/table-3", only=["DeiT-B, α=0.9"]))
    assert "--teacher deit_base_patch16_224 --set alpha=0.9" in printed
    assert "refold distill --recipe ghostnetv3 --network NETWORK" in printed


def test_a_row_has_the_branches_of_its_plan() -> None:
    bare, branched = (
        sum(isinstance(module, torch.nn.BatchNorm2d) for module in build(line).modules())
        for line in find_exhibit("repghost/table-3").rows[2:]
    )
    assert branched > bare


@pytest.mark.parametrize(
    ("printed", "count", "expected"),
    [("7.3", 7_358_820, True), ("7.4", 7_358_820, True), ("7.2", 7_358_820, False), ("7", 6_999_999, True)],
)
def test_a_printed_size_is_rounded_or_cut_off(printed: str, count: int, expected: bool) -> None:
    assert PaperColumn("parameters", "M").is_printed_as(count, printed) == expected


def test_a_column_has_a_unit_of_its_quantity_and_a_time_its_device() -> None:
    for wrong in (
        ("latency", "M", "phone"),
        ("macs", "ms", ""),
        ("latency", "ms", ""),
        ("macs", "B", "phone"),
    ):
        with pytest.raises(ValueError, match=r"unit|device"):
            PaperColumn(wrong[0], wrong[1], on=wrong[2])  # type: ignore[arg-type]


def test_our_networks_have_the_printed_sizes_where_no_note_says_how_not() -> None:
    """Those with arguments; the table of all networks is held to the others."""
    own = set(list_models())
    counted = 0
    for exhibit in EXHIBITS:
        columns = exhibit.columns_of(*SIZES)
        for line in exhibit.rows:
            special = bool(line.arguments) or line.pixels is not None
            printed = [(column, line.values[place]) for place, column in columns if line.values[place]]
            if line.network not in own or line.form != "training" or not special or not printed:
                continue
            cost = count_size(line, "training")
            met = all(column.is_printed_as(getattr(cost, column.quantity), text) for column, text in printed)
            assert met == (line.note is None), (exhibit.name, line)
            for column, text in printed:  # and never far from it
                assert column.scaled(getattr(cost, column.quantity)) == pytest.approx(float(text), rel=0.035)
            counted += 1
    assert counted >= 25


def test_the_operators_alone_have_the_shapes_of_ghostnet() -> None:
    seen = []
    with torch.device("meta"):
        network = create_model("ghostnet_100").eval()
        for module in network.modules():
            if isinstance(module, GhostModule):
                module.primary.register_forward_hook(lambda *args: seen.append(tuple(args[2].shape[1:])))
        network(torch.empty(1, 3, 224, 224))
        alone = GhostOperators("none")
        shapes = [tuple(first(torch.empty(1, 3, 224, 224)).shape[1:]) for first in alone.first]
    assert shapes == seen
    assert len(shapes) == 32


def test_the_operators_alone_differ_in_nothing_else() -> None:
    networks = {name: GhostOperators(name).eval() for name in ("concatenation", "addition", "none")}
    for network in networks.values():
        network.load_state_dict(networks["none"].state_dict())
    image = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        joined, added, neither = (network(image) for network in networks.values())
    assert torch.allclose(joined, neither, atol=1e-6)  # the mean of what is concatenated is that of its parts
    first = GhostOperators("none").first[0][0].out_channels
    assert torch.allclose(added[:, :first], neither[:, :first] + neither[:, first : 2 * first], atol=1e-5)
    assert torch.equal(added[:, first : 2 * first], neither[:, :first])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("repghost/table-44", "There is no 'table-44' of repghost that can be measured.*repghost/table-4"),
        ("repgost/table-1", "There is no paper 'repgost'; the nearest names are repghost/table-1,"),
        ("repnext", "'repnext' is a paper; name one.*repnext/table-2"),
    ],
)
def test_unknown_names_are_one_sentence_with_the_nearest(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_exhibit(name)
    result = CliRunner().invoke(app, ["paper", name])
    assert isinstance(result.exception, InputError)  # which `main` makes one line and exit code 2


def a_table() -> PaperTable:
    """RepGhost's table 1 at batches 1 and 2, with chosen times."""
    exhibit = find_exhibit("repghost/table-1")
    times = {"concatenation": (7.0, 8.0), "addition": (6.0, 6.0), "none": (5.0, 5.0)}
    rows = [
        row(
            configuration(line.subject, "training", batch_size=size),
            [size * ms for ms in times[line.arguments["operator"]]],
        )
        for line in exhibit.rows
        for size in (1, 2)
    ]
    setups = tuple(TimingSetup(Way("onnxruntime"), 1, size) for size in (1, 2))
    return PaperTable(exhibit, {}, Benchmark({"a processor": a_machine()}, rows), setups)


def test_a_difference_is_taken_round_by_round() -> None:
    table = a_table()
    concatenation, add, _ = table.exhibit.rows
    assert table.timing(concatenation, table.setups[0]) == Timing((2.0, 3.0))
    assert table.ratio(concatenation, table.setups[1]) == 2.5
    assert table.ratio(add, table.setups[0]) is None
    text = to_markdown(table)
    assert "| Concatenation | training | 1 | 5.2 (2.00) | 2.50 (2.50) |" in text
    # Batches of 8 and 32 were not measured: what stands for them is shown once.
    assert "| Add | training | 32 | 149.8 |  |" in text
    lines = list(csv.DictReader(io.StringIO(to_csv(table))))
    ours = [line for line in lines if line["engine"] == "onnxruntime" and line["model"] == "Concatenation"]
    assert [(line["batch_size"], line["here"], line["ratio"]) for line in ours] == [
        ("1", "2.5", "2.5"),
        ("2", "5.0", "2.5"),
    ]
    assert all(line["source"] == "RepGhost, table 1" for line in lines)


def test_plots_of_what_was_measured(tmp_path: Path) -> None:
    names = {path.name for path in save_paper_plots(a_table(), tmp_path)}
    assert {"throughput-onnxruntime.png", "throughput-onnxruntime.svg"} <= names
    assert all((tmp_path / name).stat().st_size > 1000 for name in names)


def test_sizes_without_latency(tmp_path: Path) -> None:
    table = paper("ghostnets/table-9", latency=False, only=["Net-[AD]"], accuracies={"cghost_net_a": 12.5})
    assert [row.model for row in table.exhibit.rows] == ["Net-A", "Net-D"]
    assert table.sizes["Net-A"]["training"].parameters == 2_583_660
    assert table.sizes["Net-A"]["plain"].parameters == 2_577_692
    assert (
        "| Net-D | cghost_net_d | 2.0 | 2.04 → 2.03 | +2.0% | 42 | 42.2 | +0.4% | 61.0 |  |"
        in to_markdown(table)
    )
    assert "| 64.2 | 12.5 |" in to_markdown(table)
    assert {path.name for path in save_paper_plots(table, tmp_path)} == {
        "accuracy-against-cost.png",
        "accuracy-against-cost.svg",
    }
    save_paper_table(table, tmp_path / "t.json")
    content = json.loads((tmp_path / "t.json").read_text())
    deviations = [value["deviation"] for value in content["values"] if value["deviation"] is not None]
    assert len(deviations) == 4
    assert max(map(abs, deviations)) < 2.2
    assert content["benchmark"] is None


def test_a_row_is_measured_together_with_the_row_it_is_compared_with() -> None:
    assert [row.model for row in find_exhibit("repghost/table-4").only(("repghostnet_130",)).rows] == [
        "GhostNet 1.3×",
        "RepGhostNet 1.3×",
    ]
    with pytest.raises(
        InputError, match=r"No row of repghost/table-6 matches 'x\*'; its networks are mobileone_s2,"
    ):
        paper("repghost/table-6", only=["x*"])


def test_linear_rows_compute_the_folded_network_on_linear_layers() -> None:
    exhibit = find_exhibit("repnext/table-4")
    line = exhibit.row("RepNeXt-u3-T →r, linear")
    assert line.subject == "repnext_u3_t(linear)"
    assert (line.form, line.timed) == ("plain", "plain")


def test_on_the_command_line(tmp_path: Path) -> None:
    def run(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["paper", *arguments])

    listed = json.loads(run("list", "--json").stdout)
    assert {entry["name"] for entry in listed} == {exhibit.name for exhibit in EXHIBITS}
    first = next(entry for entry in listed if entry["name"] == "repghost/table-4")
    assert first["measures"] == ["sizes", "latency", "accuracy (quoted)"]
    assert "repghost/table-4" in run("list").stdout
    results = tmp_path / "results.json"
    measuring = ["--engine", "pytorch", "--rounds", "2", "--warm-up", "1", "--largest-batch", "1"]
    shown = run(
        "repghost/table-1", *measuring, "--results", str(results), "-o", str(tmp_path / "t.md"), "--csv"
    )
    assert shown.exit_code == 0, shown.output
    assert sum(",pytorch," in line for line in shown.stdout.splitlines()) == 3
    assert "| neither | training | 1 |" in (tmp_path / "t.md").read_text()
    before = Benchmark.load(results)
    assert run("repghost/table-1", *measuring, "--results", str(results)).exit_code == 0
    assert Benchmark.load(results) == before  # nothing is measured again
    assert isinstance(run("repghost/table-1", "--csv", "--json").exception, InputError)
    assert isinstance(run("repghost/table-1", "-o", "t.txt").exception, InputError)


def test_it_is_public() -> None:
    assert refold.paper is paper
    assert refold.list_papers() == EXHIBITS
    assert build(find_exhibit("ghostnets/table-8").row("ShuffleNetV2 0.5×"), device="meta") is not None


def test_yolov5_has_the_official_sizes_and_an_addition_saves_half_a_convolution() -> None:
    """The official parameters before folding; its GFLOPs, 4.5 and 16.5, count two for each of ours, and norms, too."""
    found = {}
    for line in find_exhibit("repghost/table-10").rows:
        cost = count_size(line, "training")
        found[line.model.split(", ")[0], line.arguments.get("joined")] = cost.parameters, cost.macs
    assert found["YOLOv5n", None][0] == 1_872_157
    assert found["YOLOv5s", None][0] == 7_235_389
    assert [round(2 * found[name, None][1] / 1e9, 1) for name in ("YOLOv5n", "YOLOv5s")] == [4.5, 16.4]
    # Eight modules of 32, 64, 128, 256, 128, 64, 128 and 256 channels at width 0.25.
    saved = sum(channels // 2 * channels for channels in (32, 64, 128, 256, 128, 64, 128, 256))
    assert found["YOLOv5n", None][0] - found["YOLOv5n", "addition"][0] == saved
