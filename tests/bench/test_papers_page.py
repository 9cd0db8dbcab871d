"""The page of the papers names every exhibit and equation of theirs, and what it names exists."""

import re
from importlib import import_module
from pathlib import Path

import pytest
import typer.main

from refold.bench.papers import find_exhibit, list_papers
from refold.cli import app

ROOT = Path(__file__).resolve().parents[2]
PAPERS = ROOT.parent / "shared" / "papers"
SECTIONS = {
    "RepVGG report": "repvgg-report.txt",
    "GhostNets": "ghostnets-heterogeneous-devices.txt",
    "GhostNetV3": "ghostnetv3.txt",
    "RepGhost": "repghost.txt",
    "RepNeXt": "repnext.txt",
}


def listed() -> dict[str, dict[str, str]]:
    """By paper and exhibit, what the page says of it."""
    page = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    found: dict[str, dict[str, str]] = {}
    for section in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        title, *lines = section.splitlines()
        rows = [re.match(r"\| ((?:table|figure|equation) \d+) \| .+? \| (.+) \|$", line) for line in lines]
        if any(rows):
            found[title] = {row[1]: row[2] for row in rows if row}
    return found


def captions(text: str) -> set[str]:
    """Tables and figures by their captions, equations by their numbers at the end of a line."""
    kinds = {"table": "table", "figure": "figure", "fig": "figure"}
    found = {
        f"{kinds[kind.lower()]} {number}"
        for kind, number in re.findall(r"^\W*(Table|Figure|Fig)\.? (\d+)\b", text, flags=re.MULTILINE)
    }
    numbers = re.findall(r"\((\d{1,2})\)\s*(?:\$\$)?$|\\tag\{(\d+)\}", text, flags=re.MULTILINE)
    return found | {f"equation {first or second}" for first, second in numbers}


@pytest.mark.parametrize("paper", SECTIONS)
def test_every_exhibit_and_equation_is_listed(paper: str) -> None:
    if not PAPERS.is_dir():
        pytest.skip("the papers are not here")
    text = (PAPERS / SECTIONS[paper]).read_text(encoding="utf-8")
    assert captions(text) <= listed()[paper].keys()


def test_every_measured_exhibit_is_named_where_it_belongs() -> None:
    page = listed()
    for exhibit in list_papers():
        if exhibit.number == "official repository":
            continue
        said = page[exhibit.paper.name][exhibit.number]
        assert f"refold paper {exhibit.name}" in said, exhibit.name
        assert ("trained with `--accuracy`" in said) == bool(exhibit.trained), exhibit.name


def test_what_is_named_exists() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for rows in listed().values():
        for said in rows.values():
            for name in re.findall(r"`refold ([\w-]+)", said):
                assert name in commands
            for name in re.findall(r"refold paper ([\w/-]+)", said):
                assert find_exhibit(name)
            for path in re.findall(r"`(refold(?:\.\w+)+)", said):
                assert _exists(path), path


def _exists(path: str) -> bool:
    """Whether a dotted path is a module, or an attribute of one; of an instance, its constructor's text has it."""
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for name in parts[count:]:
            if not hasattr(found, name):
                source = Path(import_module(found.__module__).__file__ or "").read_text(encoding="utf-8")
                return f"self.{name}" in source
            found = getattr(found, name)
        return True
    return False
