"""The worked examples of docs/extending.md run as they stand there."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from refold.export import FORMATS
from refold.recording import operators

DOCUMENT = Path(__file__).parents[1] / "docs" / "extending.md"


def test_the_worked_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tables: list[dict[Any, Any]] = [operators._BY_NAME, operators._BY_MODULE, operators.COUNTED, FORMATS]
    before = [dict(table) for table in tables]
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 4
    try:
        exec(compile("\n".join(blocks), str(DOCUMENT), "exec"), {"__name__": "extending"})
        assert "exported" in FORMATS
    finally:
        for table, old in zip(tables, before, strict=True):
            table.clear()
            table.update(old)
        sys.modules.pop("own_engine", None)
