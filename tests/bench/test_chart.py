"""The chart is a PNG that shows every value given."""

from pathlib import Path

from PIL import Image

from refold.bench.chart import training_and_comparison_chart


def test_chart_is_a_png_with_the_colours_of_all_forms(tmp_path: Path) -> None:
    path = tmp_path / "chart.png"
    training_and_comparison_chart(
        path,
        title="a network",
        losses=[2.0, 1.0],
        scores=[0.5, 0.9],
        score_title="accuracy",
        comparison={
            "operators": {"training form": 300.0, "plain": 150.0},
            "zero": {"training form": 0, "plain": 0},
            "unknown": {"training form": 3.0, "plain": None},
        },
    )
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width > 1000
        colours = {colour for _, colour in image.convert("RGB").getcolors(2**24)}
    assert {(0x7A, 0x8C, 0xA3), (0x2A, 0x78, 0xB8)} <= colours
    assert [file.name for file in tmp_path.iterdir()] == ["chart.png"]
