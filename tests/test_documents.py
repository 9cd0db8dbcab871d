"""What the documents show is true: code runs, commands exist as they are written, the site builds, no link is dead."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
from torch import nn

import refold
from refold import models
from refold.cli import app

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
# Run, with what they need, by tests of their own.
ELSEWHERE = ("deployment.md", "journeys.md", "extending.md")
PAGES = sorted(DOCS.glob("*.md"))


def blocks(page: Path, *languages: str) -> list[str]:
    return re.findall(rf"```(?:{'|'.join(languages)})\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p, "python") and p.name not in ELSEWHERE], ids=lambda p: p.name
)
def test_python_runs_as_it_stands(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    create = models.create_model

    def without_weights(name: str, pretrained: bool = False, **arguments: Any) -> nn.Module:
        return create(name, **arguments)  # nothing can be fetched where tests run

    monkeypatch.setattr(refold, "create_model", without_weights, raising=False)
    code = compile("\n".join(blocks(page, "python")), str(page), "exec")
    exec(code, {"train": lambda net: None})


def commands() -> list[tuple[str, str]]:
    """Each call of refold in the documents, with where it stands."""
    found = []
    for page in [ROOT / "CONTRIBUTING.md", *PAGES]:
        for block in blocks(page, "sh", "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                starts = [i for i, word in enumerate(words) if word.rpartition("/")[2] == "refold"]
                found += [(page.name, shlex.join(words[i + 1 :])) for i in starts]
    return found


@pytest.mark.parametrize(("page", "words"), commands())
def test_commands_are_written_as_they_are_read(page: str, words: str) -> None:
    known: Any = typer.main.get_command(app)
    name, *arguments = shlex.split(words)
    known.commands[name].make_context(name, arguments)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="pip install 'refold[docs]'")
    pytest.importorskip("mkdocs_jupyter", reason="pip install 'refold[docs]'")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    start = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "Convolutional networks that train with many branches" in start
    api = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    assert "A plain network that computes what" in api
    reference = (tmp_path / "commands" / "index.html").read_text(encoding="utf-8")
    assert all(f"refold {name}" in reference for name in typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    missing = [
        (page.relative_to(tmp_path), link)
        for page in tmp_path.rglob("*.html")
        if page.name != "404.html"
        for link in re.findall(r'(?:href|src)="([^"#?]+)', page.read_text(encoding="utf-8"))
        if "://" not in link and not link.startswith(("mailto:", "data:")) and not _exists(page.parent / link)
    ]
    assert missing == []


def _exists(target: Path) -> bool:
    return target.is_file() or (target / "index.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("book", sorted((DOCS / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_run(book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = pytest.importorskip("nbclient", reason="pip install 'refold[docs]'")
    pytest.importorskip("ipykernel", reason="pip install 'refold[docs]'")
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    notebook = nbformat.read(book, as_version=4)
    client.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
