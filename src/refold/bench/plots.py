"""The plots of a benchmark: which drawings its measurements allow, their names, and their files."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from refold.bench.drawings import SECTIONS, STYLE, draw_throughput
from refold.bench.results import Benchmark, Measurement
from refold.files import PathLike, make_folder, written_aside


@dataclass(frozen=True)
class Scene:
    """What one group of plots has in common; no batch size where they show several."""

    machine: str
    batch_size: int | None
    threads: int
    precision: str

    def __str__(self) -> str:
        return ", ".join(part for part in self._parts() if part)

    def _parts(self) -> list[str]:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        batch = "" if self.batch_size is None else f"batch {self.batch_size}"
        return [self.machine, batch, threads, self.precision]

    def among(self, scenes: Sequence[Scene]) -> str:
        """What tells this scene from the others; empty where there are none."""
        others = [scene._parts() for scene in scenes]
        return ", ".join(
            part for place, part in enumerate(self._parts()) if len({parts[place] for parts in others}) > 1
        )


@dataclass(frozen=True)
class Plot:
    """One drawing: `name` for a file, `section` and `title` for a reader, `summary` for one who cannot see it."""

    name: str
    section: str
    title: str
    summary: str
    figure: Figure

    def svg(self) -> str:
        """The drawing as an SVG element to put into a page; its text stays text."""
        buffer = io.BytesIO()
        # Names inside a page must differ from plot to plot, and be the same from run to run.
        with matplotlib.rc_context({**STYLE, "svg.hashsalt": self.name}):
            self.figure.savefig(buffer, format="svg", metadata={"Date": None})
        text = buffer.getvalue().decode("utf-8")
        # Groups carry names that nothing refers to and that every drawing uses again.
        return re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])

    def save(self, path: PathLike) -> None:
        """Write the drawing as .svg or .png."""
        kind = Path(path).suffix.lower().removeprefix(".")
        salt = {**STYLE, "svg.hashsalt": self.name}
        with matplotlib.rc_context(salt), written_aside(path) as aside:
            self.figure.savefig(aside, format=kind, dpi=200)


def plots(benchmark: Benchmark) -> list[Plot]:
    """Every plot that the measurements allow, section by section, one for each engine."""
    rows = benchmark.measured
    found: list[Plot] = []
    scenes = list(dict.fromkeys(_scene(row) for row in rows))
    with matplotlib.rc_context(STYLE):
        for section, draw in SECTIONS.items():
            for scene in scenes:
                here = [row for row in rows if _scene(row) == scene]
                for engine in dict.fromkeys(row.configuration.engine for row in here):
                    mine = [row for row in here if row.configuration.engine == engine]
                    plot = draw(benchmark, mine)
                    if plot is None:
                        continue
                    figure, summary = plot
                    name = _file_name(section, engine, scene, scenes)
                    title = _title(engine, scene, scenes)
                    found.append(
                        Plot(name, section, title, f"{section}, {engine}, {scene}: {summary}", figure)
                    )
        found += _throughput_plots(benchmark)
    return found


def save_plots(benchmark: Benchmark, folder: PathLike) -> list[Path]:
    """Write every plot as PNG and as SVG; returns the paths. Raises `InputError` where that is not possible."""
    target = make_folder(folder)
    paths = []
    for plot in plots(benchmark):
        for suffix in (".png", ".svg"):
            paths.append(target / f"{plot.name}{suffix}")
            plot.save(paths[-1])
    return paths


def _throughput_plots(benchmark: Benchmark) -> list[Plot]:
    """Images a second against the batch size, for machines, engines and threads with several batch sizes."""
    groups: dict[tuple[str, Scene], list[Measurement]] = {}
    for row in benchmark.measured:
        scene = dataclasses.replace(_scene(row), batch_size=None)
        groups.setdefault((row.configuration.engine, scene), []).append(row)
    scenes = list(dict.fromkeys(scene for _, scene in groups))
    found = []
    for (engine, scene), rows in groups.items():
        figure = draw_throughput(rows)
        if figure is not None:
            summary = f"Throughput by batch size, {engine}, {scene}"
            name = _file_name("throughput", engine, scene, scenes)
            found.append(Plot(name, "Throughput", _title(engine, scene, scenes), summary, figure))
    return found


def _scene(row: Measurement) -> Scene:
    key = row.configuration
    return Scene(row.machine, key.batch_size, key.threads, key.precision)


def _file_name(section: str, engine: str, scene: Scene, scenes: Sequence[Scene]) -> str:
    return _slug(f"{section}-{engine}" if len(scenes) == 1 else f"{section}-{engine}-{scene}")


def _title(engine: str, scene: Scene, scenes: Sequence[Scene]) -> str:
    return ", ".join(part for part in (engine, scene.among(scenes)) if part)


def _slug(text: str) -> str:
    words = "".join(letter if letter.isalnum() else " " for letter in text.lower()).split()
    return "-".join(words)
