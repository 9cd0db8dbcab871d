"""The README's commands and its Python are true."""

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from refold.cli import app

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize(("number", "files"), [(0, ["net.onnx"]), (1, ["net.onnx", "plain.safetensors"])])
def test_python_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, files: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    example = blocks("python")[number]
    exec(compile(example, "README.md", "exec"), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    assert len(blocks("python")) == 2


def test_the_first_two_commands_set_up_and_run() -> None:
    first, second = (block.strip().split(" && ") for block in blocks("sh")[:2])
    assert first == ["python3 -m venv .venv", ".venv/bin/pip install .", ".venv/bin/refold quickstart"]
    assert second[:2] == ["python3 -m venv .venv", ".venv/bin/pip install '.[dev]'"]
    assert second[2].startswith(".venv/bin/pytest")
    # .ci/run takes the second one from here.
    assert len([line for line in README.splitlines() if re.match("python3 -m venv .*pytest", line)]) == 1


def test_command_line_examples_parse() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    lines = [line.partition(" #")[0] for block in blocks("sh")[2:] for line in block.splitlines()]
    assert {shlex.split(line)[1] for line in lines} == set(commands)
    for line in lines:
        name, *arguments = shlex.split(line)[1:]
        commands[name].make_context(name, arguments)


def test_links_and_pictures_are_there() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", README)
    paths = [link or picture for link, picture in targets]
    assert "docs/block.svg" in paths
    assert [path for path in paths if "://" not in path and not (ROOT / path).exists()] == []
