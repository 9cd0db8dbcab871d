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

from refold.bench.drawings import SECTIONS, STYLE
from refold.bench.results import Benchmark, Measurement
from refold.files import PathLike, make_folder, written_aside


@dataclass(frozen=True)
class Scene:
    """What one group of plots has in common; no batch size where they show several."""

    machine: str
    batch_size: int | None
    threads: int
    precision: str
    variant: str

    def __str__(self) -> str:
        return ", ".join(part for part in self._parts() if part)

    def _parts(self) -> list[str]:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        batch = "" if self.batch_size is None else f"batch {self.batch_size}"
        return [self.machine, batch, threads, self.precision, self.variant]

    def among(self, scenes: Sequence[Scene]) -> str:
        """What tells this scene from the others; empty where there are none."""
        others = [scene._parts() for scene in scenes]
        return ", ".join(
            part for place, part in enumerate(self._parts()) if len({parts[place] for parts in others}) > 1
        )


@dataclass(frozen=True)
class Plot:
    """One drawing: `name` for a file, `section` and `title` for a reader, `summary` for one who cannot see it.

    A page shows one that is ``on_demand`` where it is asked for.
    """

    name: str
    section: str
    title: str
    summary: str
    figure: Figure
    on_demand: bool = False

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
    """Every plot that the measurements allow, section by section, some for each engine where it is too many for one."""
    with matplotlib.rc_context(STYLE):
        return [plot for name in SECTIONS for plot in _of_section(benchmark, name)]


def _of_section(benchmark: Benchmark, section: str) -> list[Plot]:
    groups: dict[tuple[Scene, str], list[Measurement]] = {}
    for row in benchmark.measured:
        scene = _scene(row)
        if section == "Throughput":
            scene = dataclasses.replace(scene, batch_size=None)
        groups.setdefault((scene, row.configuration.engine), []).append(row)
    scenes = list(dict.fromkeys(scene for scene, _ in groups))
    found = []
    for (scene, engine), rows in sorted(groups.items(), key=lambda group: scenes.index(group[0][0])):
        parts = SECTIONS[section].split(benchmark, rows)
        for part, mine in enumerate(parts, start=1):
            drawn = SECTIONS[section].draw(benchmark, mine, rows)
            if drawn is None:
                continue
            figure, summary = drawn
            name, title = _file_name(section, engine, scene, scenes), _title(engine, scene, scenes)
            if len(parts) > 1:
                title = f"{title}, part {part} of {len(parts)}"
                name = name if part == 1 else f"{name}-{part}"
            described = f"{section}, {engine}, {scene}: {summary}"
            found.append(Plot(name, section, title, described, figure, on_demand=part > 1))
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


def _scene(row: Measurement) -> Scene:
    key = row.configuration
    return Scene(row.machine, key.batch_size, key.threads, key.precision, key.way.variant)


def _file_name(section: str, engine: str, scene: Scene, scenes: Sequence[Scene]) -> str:
    return _slug(f"{section}-{engine}" if len(scenes) == 1 else f"{section}-{engine}-{scene}")


def _title(engine: str, scene: Scene, scenes: Sequence[Scene]) -> str:
    return ", ".join(part for part in (engine, scene.among(scenes)) if part)


def _slug(text: str) -> str:
    words = "".join(letter if letter.isalnum() else " " for letter in text.lower()).split()
    return "-".join(words)
