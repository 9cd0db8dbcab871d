"""Whatever ends a run, and whenever: it goes on, with the same bits, and nothing is left behind."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("killed_at_every_write.py")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("how", "stride"), [("SIGKILL", 4), ("SIGTERM", 9)])
def test_a_run_that_is_ended_at_any_write_goes_on(tmp_path: Path, how: str, stride: int) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path), how, str(stride)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[-1]) > 50
