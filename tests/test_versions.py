"""What the package says that it needs is what was tested."""

import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
# Extras that no test installs, and tools that the package does without.
_UNTESTED = {"executorch", "coreml", "tensorrt", "litert", "docs", "dev"}


def lower_bounds() -> dict[str, str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *(n for extra in extras.keys() - _UNTESTED for n in extras[extra])]
    found = [
        re.match(r"([\w-]+)>=([\d.]+)(?:;.*)?$", text) for text in needed if not text.startswith("refold[")
    ]
    assert all(found), needed
    return {match[1].lower(): match[2] for match in found if match}


def test_the_lower_bounds_are_the_versions_of_the_floor() -> None:
    lines = (ROOT / "constraints" / "floor.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))
    assert lower_bounds() == pinned


def test_everything_that_can_be_installed_together_is_in_all() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    (every,) = extras["all"]
    named = set(re.findall(r"\w+", every.partition("[")[2]))
    assert extras.keys() - named == {"all", "dev", "docs", "executorch", "litert", "tensorrt"}
