"""An engine that crashes or hangs on what was written is an error, leaves nothing, and the next export works."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import refold
from refold.errors import InputError
from refold.export import running
from refold.export.apart import Apart

IMAGE = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(1))
FAULTY = """
import os, signal, time
from refold.export.apart import serve

class Runner:
    def run(self, **files):
        print("an engine may say what it likes")
        {deed}

serve(Runner())
"""


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Let files run in a process whose ONNX Runtime does something, within a second."""
    code = tmp_path / "code"
    code.mkdir()
    monkeypatch.syspath_prepend(str(code))

    def faulty(deed: str, time_limit: float = 60.0) -> None:
        (code / "faulty_engine.py").write_text(FAULTY.format(deed=deed))
        running._end()
        monkeypatch.setattr(running, "Apart", lambda *_: Apart("faulty_engine", time_limit))

    yield faulty
    running._end()


@pytest.mark.parametrize(
    ("deed", "time_limit", "reason"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", 60.0, "its process ended with SIGSEGV"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 60.0, "its process ended with SIGKILL; the memory may not"),
        ("time.sleep(600)", 1.0, "no answer within 1 s; its process was ended"),
        ("raise MemoryError('no room')", 60.0, "MemoryError: no room"),
    ],
)
def test_a_fault_is_one_sentence(
    deed: str, time_limit: float, reason: str, process: Any, tmp_path: Path
) -> None:
    process(deed, time_limit)
    folder = tmp_path / "to"
    folder.mkdir()
    with pytest.raises(InputError, match=f"ONNX Runtime cannot run 'net.onnx': {reason}"):
        refold.export(nn.Conv2d(3, 3, 1), folder / "net.onnx", IMAGE, dynamic_batch=False)
    assert list(folder.iterdir()) == []


def test_after_a_fault_the_next_file_runs(
    process: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process("os.abort()")
    with pytest.raises(InputError, match="SIGABRT"):
        running.run_apart("onnxruntime", tmp_path / "net.onnx", [(IMAGE,)])
    monkeypatch.undo()
    assert refold.export(nn.Conv2d(3, 3, 1), tmp_path / "net.onnx", IMAGE, dynamic_batch=False).checked


def test_ctrl_c_leaves_no_answer_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    running.start()
    first = running._kept[0]
    monkeypatch.setattr(Apart, "ask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        running.run_apart("onnxruntime", tmp_path / "net.onnx", [(IMAGE,)])
    assert not first.is_running
    assert running._kept == []
    with pytest.raises(ProcessLookupError):
        os.kill(first._process.pid, signal.SIGCONT)
