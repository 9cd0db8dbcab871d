"""The examples of the public functions run and give what they say."""

import doctest
import inspect
from pathlib import Path

import pytest

import refold

# Exceptions, what a call returns, and what asks for a hub or for minutes.
WITHOUT = {"CheckpointError", "InputError", "NotEquivalent", "NotFoldable", "RefoldError", "UnknownModel"} | {
    "FoldReport", "Proof", "UnfoldReport", "list_papers", "paper", "push",
}  # fmt: skip
SLOW = {"Latency", "benchmark"}
NAMES = [
    pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
    for name in sorted(set(refold.__all__) - WITHOUT)
]


@pytest.mark.parametrize("name", NAMES)
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    thing = getattr(refold, name)
    text = inspect.getdoc(thing) or ""
    example = doctest.DocTestParser().get_doctest(text, {}, name, None, None)
    assert example.examples, f"{name} shows no example"
    printed: list[str] = []
    failed, _ = doctest.DocTestRunner(verbose=False).run(example, out=printed.append)
    assert failed == 0, "".join(printed)


def test_every_public_name_is_described() -> None:
    assert [
        name for name in refold.__all__ if not (inspect.getdoc(getattr(refold, name)) or "").strip()
    ] == []
