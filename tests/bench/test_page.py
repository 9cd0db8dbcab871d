"""The page needs nothing else and holds every figure; the plots are files as well."""

import dataclasses
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import pytest
from fakes import a_benchmark, a_machine, configuration, row
from PIL import Image

from refold.bench.breakdown import KINDS
from refold.bench.drawings import MOST, STYLE, TEXT, pareto_front
from refold.bench.page import to_html
from refold.bench.plots import plots, save_plots
from refold.bench.results import Benchmark


def test_pareto_front() -> None:
    points = [(3.0, 70.0), (1.0, 60.0), (2.0, 59.0), (3.0, 71.0), (9.0, 71.0)]
    assert pareto_front(points) == [(1.0, 60.0), (3.0, 71.0)]
    assert pareto_front([]) == []


class Reader(HTMLParser):
    """Collects what a page refers to, its ids and its table cells."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href"):
                self.references.append(value or "")
            if name == "id":
                self.ids.append(value or "")


def test_the_page_needs_nothing_else() -> None:
    result = a_benchmark()
    result.accuracies = {"slow": 75.0, "fast": 70.0}
    result.rows.append(row(configuration("<b>odd</b>"), [7.0]))
    page = to_html(result)
    reader = Reader()
    reader.feed(page)
    assert all(reference.startswith("#") for reference in reader.references)
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert {reference[1:] for reference in reader.references} <= set(reader.ids)
    assert len(reader.ids) == len(set(reader.ids))  # also between the drawings
    assert "b" not in reader.tags
    assert reader.tags.count("svg") == 2 * 4
    assert reader.tags.count("table") == 3
    for said in ("36.00", "SIGSEGV", "depthwise convolution", "2 cores, 8 GiB", "on the Pareto front are"):
        assert said in page


def test_sections_need_their_figures() -> None:
    assert [plot.section for plot in plots(a_benchmark())].count("Accuracy against latency") == 0
    result = a_benchmark()
    assert "Throughput" not in {plot.section for plot in plots(result)}
    result.rows.append(row(configuration("fast", "plain", batch_size=8), [7.0]))
    drawn = plots(result)
    assert "Throughput" in {plot.section for plot in drawn}
    assert len({plot.name for plot in drawn}) == len(drawn)


def test_plots_as_files(tmp_path: Path) -> None:
    result = a_benchmark()
    result.rows = result.rows[:2]
    paths = save_plots(result, tmp_path / "plots")
    names = {path.name for path in paths}
    assert {"latency-onnxruntime.png", "latency-onnxruntime.svg", "roofline-onnxruntime.svg"} <= names
    assert {path.name for path in (tmp_path / "plots").iterdir()} == names
    with Image.open(tmp_path / "plots" / "latency-onnxruntime.png") as image:
        assert image.format == "PNG"
        colours = {colour for _, colour in image.convert("RGB").getcolors(2**24) or ()}
    assert {(0x7A, 0x8C, 0xA3), (0x2A, 0x78, 0xB8)} <= colours
    assert "<svg" in (tmp_path / "plots" / "latency-onnxruntime.svg").read_text()


def test_summaries_name_the_fastest() -> None:
    latency = {plot.name: plot.summary for plot in plots(a_benchmark()) if plot.section == "Latency"}
    assert latency["latency-pytorch"].endswith("fast (plain) is fastest, 9 ms")


@pytest.mark.parametrize("count", [0, 1])
def test_a_page_of_little(count: int) -> None:
    result = a_benchmark()
    result.rows = result.rows[:count]
    assert "</html>" in to_html(result)


def test_titles_say_what_tells_plots_apart() -> None:
    rows = [row(configuration(engine="pytorch", batch_size=size), [1234.0] * 4) for size in (1, 8)]
    drawn = plots(Benchmark({"a processor": a_machine()}, rows))
    titles = {plot.title for plot in drawn if plot.section == "Latency"}
    assert titles == {"pytorch, batch 1", "pytorch, batch 8"}
    assert {plot.title for plot in drawn if plot.section == "Throughput"} == {"pytorch"}
    assert any("1234" in plot.svg() for plot in drawn)
    assert all("e+03" not in plot.svg() for plot in drawn)


def many() -> Benchmark:
    """Fourteen networks, one of them with a long name, in two forms and at two batch sizes."""
    names = [f"mobilenetv4_conv_small_{number}" for number in range(13)]
    names.append("runs/photos-of-birds-in-november/trained-for-three-hundred-epochs/plain.safetensors")
    kinds = {kind: 1.0 + place for place, kind in enumerate(KINDS)}
    rows = [
        dataclasses.replace(
            row(configuration(name, form, batch_size=size), [(place + 1) * factor * size * 100] * 4),
            breakdown=kinds,
        )
        for place, name in enumerate(names)
        for form, factor in (("training", 2.0), ("plain", 1.0))
        for size in (1, 8)
    ]
    return Benchmark(
        {"a processor": a_machine()}, rows, "training", {name: 60.0 + i % 9 for i, name in enumerate(names)}
    )


def test_no_drawing_shows_more_than_eight_and_none_is_missing() -> None:
    result = many()
    models = {row.configuration.model for row in result.rows}
    drawn = plots(result)
    assert len({plot.name for plot in drawn}) == len(drawn)
    for section in {plot.section for plot in drawn}:
        mine = [plot for plot in drawn if plot.section == section]
        shown = Counter(plot.on_demand for plot in mine)
        assert shown[False] == (1 if section == "Throughput" else 2), "one a batch size"
        assert shown[True] > 0
        words = {
            text.get_text().replace("\n", "")
            for plot in mine
            for text in plot.figure.findobj(matplotlib.text.Text)
            if text.get_visible()
        }
        assert all(any(model in word for word in words) for model in models), section
    for plot in drawn:
        (axes,) = plot.figure.axes
        if plot.section == "Latency":
            assert len(axes.patches) <= MOST
        if plot.section == "Time by kind of operator":
            assert len({patch.get_y() for patch in axes.patches}) <= MOST
            assert len({patch.get_facecolor() for patch in axes.patches}) <= MOST
        if plot.section == "Throughput":
            assert len(axes.lines) <= MOST


def test_nothing_is_cut_or_too_small_for_a_phone() -> None:
    for plot in plots(many()):
        with matplotlib.rc_context(STYLE):
            plot.figure.draw_without_rendering()
            page = plot.figure.bbox
            (axes,) = plot.figure.axes
            outside = {  # matplotlib keeps labels of ticks that it does not draw
                label
                for axis, place in ((axes.xaxis, 0), (axes.yaxis, 1))
                for label in axis.get_ticklabels()
                if not min(axis.get_view_interval())
                <= label.get_position()[place]
                <= max(axis.get_view_interval())
            }
            for text in set(plot.figure.findobj(matplotlib.text.Text)) - outside:
                if text.get_visible() and text.get_text():
                    box = text.get_window_extent()
                    assert box.x0 >= -1, (plot.name, text)
                    assert box.x1 <= page.x1 + 1, (plot.name, text)
                    assert box.y0 >= -1, (plot.name, text)
                    assert box.y1 <= page.y1 + 1, (plot.name, text)
                    assert text.get_fontsize() >= TEXT
        width = plot.figure.get_figwidth() * 72
        # 390 pixels less the margins of the page.
        assert TEXT * 358 / width >= 14


def test_the_page_fits_a_phone_and_the_dark() -> None:
    page = to_html(many())
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    style = page[page.index("<style>") : page.index("</style>")]
    screen = style[: style.index("@media print")]
    sizes = [float(size) for size in re.findall(r"font-size: ([\d.]+)rem", screen)]
    assert min(sizes) * 16 >= 14
    assert page.count('<div class="scroll">\n<table>') == page.count("<table>") == 3
    light, dark = (
        dict(re.findall(r"(--[\w-]+): (#\w+)", part))
        for part in screen.split("@media (prefers-color-scheme: dark)")
    )
    assert light.keys() == dark.keys()
    assert light["--ground"] != dark["--ground"]
    for drawing in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        assert not re.search(r": ?#[0-9a-f]{6}", drawing), "a colour that does not change in the dark"
        assert set(re.findall(r"var\((--[\w-]+)\)", drawing)) <= light.keys()
    assert page.count("<details>") == len({plot.section for plot in plots(many())})
