"""The report: every number of it in the table, in JSON and in the pickled model."""

import dataclasses
import io
import json
import pickle
from typing import Any

import pytest
import torch
from checking import Deciding, Net, Parallel, conv_bn, images, trained
from rich.console import Console
from torch import nn

import refold
from refold.folding import Cost, FoldedRegion, FoldReport, Proof


def network() -> nn.Module:
    return trained(
        nn.Sequential(
            Parallel(conv_bn(3, 8, 3), conv_bn(3, 8, 1), nn.Conv2d(3, 8, 1, groups=1)),
            nn.BatchNorm2d(8),
            *conv_bn(8, 8, 3, groups=4),
            nn.ReLU(),
            Deciding(conv_bn(8, 4)),
            nn.Flatten(),
            nn.Linear(4 * 12 * 12, 5),
            nn.BatchNorm1d(5),
        )
    )


@pytest.fixture(params=[torch.float64, torch.float32, torch.float16], ids=str)
def plain(request: pytest.FixtureRequest) -> Any:
    return refold.fold(network().to(request.param).train(), images(3)[0].to(request.param))


def strict(text: str) -> Any:
    """JSON as the standard has it: no Infinity, no NaN."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def rendered(report: FoldReport, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(report)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_what_it_counts(plain: Any) -> None:
    report: FoldReport = plain.fold_report
    assert report.model == "Sequential"
    assert (report.before.convolutions, report.after.convolutions) == (5, 3)
    assert (report.before.batch_norms, report.after.batch_norms) == (6, 1)
    assert report.after.macs < report.before.macs
    assert report.after.parameters == sum(parameter.numel() for parameter in plain.parameters())
    assert len(report.regions) == 4
    merged = report.regions[0]
    assert merged.path == "0"
    assert merged.operators == {"convolution": 3, "batch norm": 2, "add": 2}
    assert merged.layer == "3×3 convolution, 3 to 8 channels"
    assert {region.layer for region in report.regions[1:]} == {
        "3×3 convolution, 8 to 8 channels, 4 groups",
        "3×3 convolution, 8 to 4 channels",
        "linear, 576 to 5 channels",
    }
    assert dict(report.left).keys() == {"1", "5"}
    assert any("training mode" in note for note in report.notes)


def test_json_has_all_of_it(plain: Any) -> None:
    report: FoldReport = plain.fold_report
    facts = strict(report.to_json())
    assert facts == strict(json.dumps(report.to_dict()))
    assert Cost(**facts["before"]) == report.before
    assert Cost(**facts["after"]) == report.after
    assert [FoldedRegion(**region) for region in facts["regions"]] == report.regions
    assert [(item["name"], item["reason"]) for item in facts["left"]] == report.left
    assert Proof(**{**facts["proof"], "inputs": tuple(facts["proof"]["inputs"])}) == report.proof
    rebuilt = FoldReport(
        facts["model"],
        [FoldedRegion(**region) for region in facts["regions"]],
        [(item["name"], item["reason"]) for item in facts["left"]],
        Cost(**facts["before"]),
        Cost(**facts["after"]),
        Proof(**{**facts["proof"], "inputs": tuple(facts["proof"]["inputs"])}),
        facts["notes"],
        facts["options"],
        record=report.record,
    )
    assert rebuilt == report
    assert FoldReport.from_dict(facts).to_dict() == facts
    assert {field.name for field in dataclasses.fields(report)} == set(facts)


def test_json_of_a_proof_without_a_finite_number() -> None:
    """float16 overflows before and after: infinite distances are written so that any reader takes them."""
    model = trained(nn.Sequential(*conv_bn(3, 4, 1), nn.ReLU())).half()
    model[1].weight.data.fill_(6e4)
    plain: Any = refold.fold(model, images(3)[0].half() * 1000)
    strict(plain.fold_report.to_json())


def test_the_table_has_the_numbers(plain: Any) -> None:
    report: FoldReport = plain.fold_report
    text = rendered(report)
    for number in (
        *(report.before.parameters, report.after.parameters, report.before.macs, report.after.macs),
        *(report.before.operator_count, report.after.operator_count),
    ):
        assert f"{number:,}" in text
    row = next(line for line in text.splitlines() if "batch norm" in line and "│" in line)
    assert [cell.strip() for cell in row.split("│")][2:4] == ["6", "1"]
    assert "4 regions" in text
    for _, reason in report.left:
        assert reason[:40] in text
    assert report.proof is not None
    assert f"{report.proof.distance_float64:.0e}" in text
    assert "2×3×12×12" in text
    assert all(note in text for note in report.notes)


def test_the_table_fits_a_narrow_terminal(plain: Any) -> None:
    text = rendered(plain.fold_report, width=60)
    assert max(map(len, text.splitlines())) <= 60
    assert f"{plain.fold_report.after.parameters:,}" in text


def test_words_in_brackets_are_printed_as_they_are() -> None:
    plain: Any = refold.fold(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), images(3)[0].float())
    plain.fold_report.left.append(("1", "[bold] and [/red] are no styles here"))
    assert "[bold] and [/red] are no styles here" in rendered(plain.fold_report)


def test_a_fold_without_proof_says_so() -> None:
    plain: Any = refold.fold(network(), images(3)[0].float(), prove=False)
    assert "not proved" in rendered(plain.fold_report)
    assert strict(plain.fold_report.to_json())["proof"] is None


def test_it_goes_with_the_model_but_not_with_its_weights() -> None:
    model = trained(Net(forward, a=conv_bn(3, 4, 3), b=conv_bn(3, 4, 1)))
    plain: Any = refold.fold(model, images(3)[0].float())
    assert pickle.loads(pickle.dumps(plain.fold_report)) == plain.fold_report
    assert pickle.loads(pickle.dumps(plain)).fold_report == plain.fold_report
    assert not [name for name in plain.state_dict() if "report" in name]


def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
    """Two branches; a function with a name, so that it pickles."""
    return torch.relu(net.a(x) + net.b(x))
