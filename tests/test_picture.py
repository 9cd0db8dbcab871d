"""The picture of a fold: every region is in it, equal blocks once, all reasons, and nothing that needs the network."""

import json
import math
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import pytest
import timm
import torch
from torch import nn

import refold
from refold import cli
from refold.errors import InputError
from refold.folding import Decision, FoldedRegion, FoldReport
from refold.folding.proof import Proof
from refold.picture import draw, save_picture
from refold.picture.blocks import block_of, drawings, shortened
from refold.picture.page import to_html
from refold.picture.pieces import WIDTH, wrapped
from refold.picture.words import verdict
from refold.recording.cost import Cost

SVG = "{http://www.w3.org/2000/svg}"
NAMES = ("repvgg_a0", "ghostnetv3_050", "repghostnet_050", "densenet121", "unfoldable")


class Unfoldable(nn.Module):
    """There is nothing here to fold."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.conv(x))


@cache
def folded(name: str) -> FoldReport:
    torch.manual_seed(0)
    builders: dict[str, Callable[[], nn.Module]] = {
        "densenet121": lambda: timm.create_model("densenet121", num_classes=3),
        "unfoldable": Unfoldable,
    }
    net = builders.get(name, lambda: refold.create_model(name))().eval()
    report: FoldReport = refold.fold(net, torch.randn(1, 3, 64, 64), prove=name == "repvgg_a0").fold_report
    return report


def made_up(
    paths: list[str], left: list[tuple[str, str]] | None = None, layer: str = "linear", word: str = "add"
) -> FoldReport:
    cost = Cost(1, 2, 3, 4, {"convolution": 1})
    regions = [FoldedRegion(path, {word: 1}, layer) for path in paths]
    return FoldReport("Net", regions, left or [], cost, cost, None)


def words(svg: str) -> list[str]:
    """The text of the picture, element by element."""
    return ["".join(text.itertext()) for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]


@pytest.mark.parametrize("name", NAMES)
def test_every_region_is_drawn_and_equal_blocks_once(name: str) -> None:
    report = folded(name)
    drawn = drawings(report.regions)
    assert sum(drawing.regions for drawing in drawn) == len(report.regions)
    keys = [tuple(part.key for part in drawing.parts) for drawing in drawn]
    assert len(set(keys)) == len(keys)
    counts = [int(text[1:]) for text in words(draw(report)) if re.fullmatch(r"×\d+", text)]
    assert counts == [len(drawing.paths) for drawing in drawn if len(drawing.paths) > 1]


def test_the_blocks_of_repvgg() -> None:
    first, inner = drawings(folded("repvgg_a0").regions)
    assert first.paths == ("stem", "stages.0.0", "stages.1.0", "stages.2.0", "stages.3.0")
    assert shortened(inner.paths) == "stages.0.1, stages.1.1–3, stages.2.1–13"
    (part,) = inner.parts
    assert part.operators == (("convolution", 2), ("batch norm", 3), ("add", 2))
    assert (part.kind, part.details) == ("3×3 convolution", "48…192 channels")
    found = words(draw(folded("repvgg_a0"), "repvgg_a0"))
    assert found[:2] == ["repvgg_a0", "RepVGG"]
    assert {"22 parts were folded into plain layers.", "168", "46", "9.11 M", "8.31 M"} <= set(found)
    assert any(text.startswith("Proved in float64: each part to ") for text in found)


@pytest.mark.parametrize(
    ("path", "block"),
    [
        ("stages.1.0.shortcut.0", "stages.1.0"),
        ("stages.0.blocks.2", "stages.0.blocks.2"),
        ("stages.0.blocks.2.mlp.conv.0", "stages.0.blocks.2"),
        ("layer2.0.downsample.1", "layer2.0"),
        ("features.denseblock1.denselayer2.norm2", "features.denseblock1.denselayer2"),
        ("stem", "stem"),
        ("stem.conv", "stem"),
        ("", ""),
    ],
)
def test_the_block_of_a_path(path: str, block: str) -> None:
    assert block_of(path) == block


@pytest.mark.parametrize("name", NAMES)
def test_it_fits_a_phone(name: str) -> None:
    svg = draw(folded(name))
    root = ElementTree.fromstring(svg)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    assert (width, root.attrib["width"]) == (WIDTH, "100%")
    # Two pages of paper hold about 2,600 units where the page has two columns.
    assert height < 2600
    for text in root.iter(f"{SVG}text"):
        assert float(text.attrib["font-size"]) >= 11
        assert 0 <= float(text.attrib["x"]) < WIDTH


def test_what_was_left_is_named_with_its_reason() -> None:
    report = folded("densenet121")
    text = " ".join(words(draw(report)))
    assert report.left
    for reason in {reason for _, reason in report.left}:
        assert reason in text
        assert f"{sum(reason == other for _, other in report.left)}×" in text
    page = to_html(report)
    assert report.left[0][1] in page


def test_where_nothing_was_folded() -> None:
    report = folded("unfoldable")
    assert not report.regions
    assert "Nothing was folded: the network stays as it was." in " ".join(words(draw(report)))
    assert "Nothing was folded" in to_html(report)


def test_what_paths_and_reasons_hold_is_escaped() -> None:
    report = made_up(["a<b&c.'d\""], [("x<y", "since 1 < 2 && \x00 3 > 2")], 'a <script>"&', "f<g&h>")
    report.notes.append("<i>&amp;</i>")
    found = " ".join(words(draw(report, "<title> & more")))
    for expected in ("<title> & more", "a<b&c", "1 < 2 &&", "x<y", "<script>", "f<g&h>", "<i>&amp;</i>"):
        assert expected in found
    assert not re.search(r"<(script|i|title>) ", to_html(report, "<title> & more"))
    assert "&lt;script&gt;" in to_html(report)


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    report = folded("repvgg_a0")
    save_picture(report, tmp_path / "fold.html", title="repvgg_a0")
    page = (tmp_path / "fold.html").read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[^\"' ]*", page)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(script|link|img|iframe)|url\(|@import", page)
    for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        ElementTree.fromstring(svg)
    parameters = f"{report.before.parameters:,}"
    for expected in (
        parameters,
        "stages.0.1, stages.1.1–3, stages.2.1–13",
        "2 convolution, 3 batch norm, 2 add",
    ):
        assert expected in page


def test_proofs_and_measurements_in_words() -> None:
    report = made_up(["a"])
    assert verdict(report) == "Not proved, as asked."
    for distance, said in ((3e-15, ", the whole network to 3e-15"), (math.nan, "")):
        report.proof = Proof(distance, ("1×3",), regions=1, worst_region=2e-16)
        for same in (report, FoldReport.from_dict(json.loads(report.to_json()))):
            assert verdict(same) == f"Proved in float64: each part to 2e-16{said}."
    report.decisions = [Decision("a", "kind", "change", True), Decision("b", "kind", "change", False)]
    report.measured = {"engine": "onnxruntime", "threads": 1}
    assert "onnxruntime, 1 thread: 1 of 2 rewrites were kept." in " ".join(words(draw(report)))


def test_paths_in_one_line() -> None:
    assert shortened(["", "b.1", "b.2", "b.3", "b.5"]) == "the network itself, b.1–3, b.5"
    assert (
        shortened(["layer1.norm1", "layer2.norm1", "layer1.0", "layer2.0"])
        == "layer1–2.norm1, layer1.0, layer2.0"
    )
    assert shortened(["x", "x", "y.01", "y.02", "y.9", "y.10"]) == "x, x, y.01, y.02, y.9–10"


def test_it_is_made_of_the_report_alone(tmp_path: Path) -> None:
    report = folded("repvgg_a0")
    again = FoldReport.from_dict(json.loads(report.to_json()))
    assert draw(again) == draw(report)
    save_picture(again, tmp_path / "fold.SVG")
    assert (tmp_path / "fold.SVG").read_text(encoding="utf-8") == draw(report)
    with pytest.raises(InputError, match=r"let it end in \.svg or \.html\.$"):
        save_picture(report, tmp_path / "fold.png")
    assert [path.name for path in tmp_path.iterdir()] == ["fold.SVG"]


def test_long_words_and_many_operators_stay_inside() -> None:
    assert wrapped("", 100, 12) == []
    lines = wrapped("a.very.long.path." * 9 + "x" * 90, 100, 11, mono=True)
    assert "".join(lines) == "a.very.long.path." * 9 + "x" * 90
    assert max(map(len, lines)) <= 100 / (11 * 0.6)
    report = made_up(["blocks." + "y" * 80], layer="z" * 80)
    report.regions[0].operators["batch norm"] = 40
    for rect in ElementTree.fromstring(draw(report)).iter(f"{SVG}rect"):
        assert float(rect.attrib.get("x", 0)) + float(rect.attrib["width"]) <= WIDTH


def test_the_command_draws(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.console, "width", 100)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["refold", "fold", "repghostnet_050", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        captured = capsys.readouterr()
        return int(left.value.code or 0), captured.out, captured.err

    size = ("--input-size", "64", "-o", "plain.safetensors")
    code, out, _ = call(*size, "--picture", "fold.svg", "--report", "fold.json")
    assert code == 0
    assert "Picture: fold.svg" in out
    report = FoldReport.from_dict(json.loads((tmp_path / "fold.json").read_text()))
    assert (tmp_path / "fold.svg").read_text(encoding="utf-8") == draw(report, "repghostnet_050")
    before = {path.name for path in tmp_path.iterdir()}
    for picture, said in (
        ("fold.png", "let it end in .svg"),
        ("missing/fold.svg", "'missing' does not exist"),
    ):
        code, out, err = call(*size, "--picture", picture)
        assert (code, out) == (2, "")
        assert said in err
    assert call(*size, "--picture", "f.svg", "--original")[0] == 2
    assert {path.name for path in tmp_path.iterdir()} == before
