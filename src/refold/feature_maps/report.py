"""What is written of a network's maps: a picture of each layer, the table of its pairs, and one page of all."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from refold.feature_maps.capture import Maps, feature_maps
from refold.feature_maps.drawing import draw_maps, draw_similarity, png
from refold.feature_maps.pairs import KERNEL_SIZES, Pair, Similarity, similar_pairs, similarity
from refold.files import PathLike, make_folder, write_text, written_aside
from refold.templates import template

HEADINGS = (
    "source",
    "target",
    "correlation",
    "variance",
    "mean square",
    *(f"error, d={size}" for size in KERNEL_SIZES),
)


@dataclass(frozen=True)
class LayerReport:
    """A layer's maps with the pairs that are most alike; ``similar`` is None where they were not asked for."""

    maps: Maps
    pairs: tuple[Pair, ...] = ()
    similar: Similarity | None = None

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """The pairs as text, in the columns of `HEADINGS`."""
        return [
            (
                str(pair.source),
                str(pair.target),
                f"{pair.correlation:+.3f}",
                f"{pair.variance:.3g}",
                f"{pair.square:.3g}",
                *(f"{error:.3g}" for error in pair.errors.values()),
            )
            for pair in self.pairs
        ]

    @property
    def picture(self) -> str:
        """The grid of maps, as base64 of a PNG."""
        return base64.b64encode(png(draw_maps(self.maps, self.pairs))).decode()

    @property
    def all_pairs(self) -> str:
        """The drawing of all pairs, as base64 of a PNG."""
        assert self.similar is not None
        return base64.b64encode(png(draw_similarity(self.similar, self.maps.layer))).decode()


def report_layers(
    model: nn.Module, image: Tensor, layers: Sequence[str], *, pairs: int = 0
) -> list[LayerReport]:
    """The maps of named layers for an image ``(1, channels, height, width)``, with up to ``pairs`` that are alike.

    Raises `InputError` where a layer gives no maps, or one map of which pairs are asked for.
    """
    reports = []
    for layer in layers:
        maps = feature_maps(model, image, layer)
        if not pairs:
            reports.append(LayerReport(maps))
            continue
        similar = similarity(maps.values)
        reports.append(LayerReport(maps, tuple(similar_pairs(similar, pairs)), similar))
    return reports


def save_maps(reports: Sequence[LayerReport], folder: PathLike, *, network: str, image: str) -> list[Path]:
    """Write ``LAYER.png``, ``LAYER-pairs.png`` where there are pairs, and ``index.html``, which needs no other file.

    Returns the paths. Raises `InputError` where the folder cannot be made.
    """
    target = make_folder(folder)
    paths = []
    for report in reports:
        name = re.sub(r"[^\w.-]", "_", report.maps.layer)
        pictures = {f"{name}.png": report.picture}
        if report.similar is not None:
            pictures[f"{name}-pairs.png"] = report.all_pairs
        for file, content in pictures.items():
            paths.append(target / file)
            with written_aside(paths[-1]) as aside:
                aside.write_bytes(base64.b64decode(content))
    page = template("refold.feature_maps", "maps.html.jinja").render(
        network=network, image=image, layers=reports, headings=HEADINGS
    )
    paths.append(target / "index.html")
    write_text(paths[-1], page)
    return paths
