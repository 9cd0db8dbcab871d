"""The table of all networks in docs/models.md is that of the present networks and of the published sizes."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path += [str(REPOSITORY / "benchmarks"), str(REPOSITORY / "tests" / "models")]

from test_networks import OF_TABLES, OFFICIAL_COST  # noqa: E402

from list_networks import BEGIN, DOCUMENT, END, read_figures, table, write_between_marks  # noqa: E402
from refold import list_papers  # noqa: E402
from refold.bench.papers.measuring import count_size  # noqa: E402
from refold.models import list_models  # noqa: E402

ROW = re.compile(r"\| `(\w+)` \| (\d+) \| " + r" \| ".join([r"([\d,.]+)"] * 6) + r" \| (.+) \|")
# Plain forms by the official conversions, where they leave no batch norm.
PLAIN = {
    "repvgg_a0": (8_309_384, 1361.5, 1.79),
    "repvgg_b3g2": (87_404_776, 19446.0, 7.55),
    "repvgg_d2se": (120_387_572, 32829.6, 11.49),
    "mobileone_s0": (2_078_504, 275.1, 3.79),
    "mobileone_s4": (14_838_352, 2979.3, 11.81),
    "repnext_u3_b": (88_533_224, 15355.0, None),
}


def text_between_marks() -> str:
    return DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].strip("\n")


@pytest.fixture(scope="module")
def records() -> dict[str, dict[str, Any]]:
    found = {}
    for line in text_between_marks().splitlines():
        if row := ROW.fullmatch(line):
            name, pixels, *counts = row.groups()[:8]
            numbers = [float(count.replace(",", "")) for count in counts]
            forms = {
                form: {"parameters": round(a), "macs": round(b * 1e6), "activations": round(c * 1e6)}
                for form, (a, b, c) in (("training", numbers[:3]), ("plain", numbers[3:]))
            }
            found[name] = {"name": name, "pixels": int(pixels), **forms}
    return found


def test_it_lists_every_network_as_it_is(records: dict[str, dict[str, Any]]) -> None:
    rewrite = "run `python benchmarks/list_networks.py`, it writes the table"
    assert sorted(records) == list_models() == sorted({*OFFICIAL_COST, *OF_TABLES}), rewrite
    for name, (parameters, macs, activations) in OFFICIAL_COST.items():
        training, plain = records[name]["training"], records[name]["plain"]
        assert training["parameters"] == parameters, f"{name}: {rewrite}"
        assert abs(training["macs"] / 1e6 - macs) <= 0.051, f"{name}: {rewrite}"
        assert abs(training["activations"] / 1e6 - activations) <= 0.0051, f"{name}: {rewrite}"
        assert all(plain[quantity] <= training[quantity] for quantity in plain), name


@pytest.mark.parametrize("name", PLAIN)
def test_plain_forms_are_those_of_the_official_conversions(
    name: str, records: dict[str, dict[str, Any]]
) -> None:
    parameters, macs, activations = PLAIN[name]
    plain = records[name]["plain"]
    assert plain["parameters"] == parameters
    assert abs(plain["macs"] / 1e6 - macs) <= 0.5
    assert activations is None or plain["activations"] / 1e6 == activations


def test_published_figures_are_met_where_no_note_says_how_not(records: dict[str, dict[str, Any]]) -> None:
    compared = 0
    for exhibit in list_papers():
        columns = exhibit.columns_of("parameters", "macs", "macs_and_norms", "activations")
        for row in exhibit.rows:
            sizes = records.get(row.network or "", {}).get(row.form)
            printed = [(column, row.values[place]) for place, column in columns if row.values[place]]
            if sizes is None or row.arguments or row.pixels is not None or not printed:
                continue
            if exhibit.columns_of("macs_and_norms"):
                # Folding leaves none of these networks a norm; the table in the document does not count them.
                norms = (
                    count_size(row, "training").macs_and_norms if row.form == "training" else sizes["macs"]
                )
                sizes = {**sizes, "macs_and_norms": norms}
            met = all(column.is_printed_as(sizes[column.quantity], text) for column, text in printed)
            assert met == (row.note is None), (exhibit.source, row)
            compared += 1
    assert compared >= 90


def test_each_published_size_stands_once_with_all_its_sources() -> None:
    figures = read_figures()
    assert len(figures) == len({(figure.network, figure.form, figure.printed) for figure in figures}) > 60
    ghostnet = [figure for figure in figures if figure.network == "ghostnet_100"]
    assert [figure.sources for figure in ghostnet] == [
        ("GhostNets, table 8", "GhostNetV3, table 9", "RepGhost, table 4")
    ]
    assert ghostnet[0].printed == ("5.2 M", "141 M")


def test_the_table_is_what_the_script_writes(records: dict[str, dict[str, Any]]) -> None:
    assert table(records.values(), read_figures()) == text_between_marks()


def test_only_what_is_between_the_marks_changes(tmp_path: Path) -> None:
    document = tmp_path / "models.md"
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_between_marks(document, "new")
    assert document.read_text() == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    document.write_text("no marks")
    with pytest.raises(ValueError, match="has no lines <!-- networks: begin -->"):
        write_between_marks(document, "new")
