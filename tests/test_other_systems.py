"""Windows and macOS, as far as they can be played on another system."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_everything_is_imported_without_what_only_linux_has(platform: str) -> None:
    script = Path(__file__).with_name("other_systems.py")
    done = subprocess.run([sys.executable, script, platform], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("imported ")
