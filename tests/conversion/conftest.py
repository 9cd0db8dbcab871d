"""Let the tests of this folder import `golden`, which serves all folders and lies above them."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
